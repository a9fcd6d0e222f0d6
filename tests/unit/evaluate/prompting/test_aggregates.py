"""Errors and differences of metrics that are functions of sums over items."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from firth.evaluate.prompting.metrics import Counts, bootstrap_difference, class_counts, jackknife_error, value_of
from firth.evaluate.prompting.prompt_task import ItemResult, PromptConfig
from firth.evaluate.prompting.results import compare, read_results, write_results
from firth.evaluate.prompting.runner import TaskResult, metric_value


def classified(pairs: Sequence[tuple[int, int]], kind: str = "mcc") -> list[Counts]:
    """Return the counts of (gold, predicted) pairs."""
    return [class_counts(kind, gold, predicted, 2) for gold, predicted in pairs]


def test_the_error_agrees_with_the_spread_over_samples() -> None:
    """Matthews' correlation of 200 items drawn many times; and of the same items four times over, in groups."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> list[Counts]:
        gold = rng.integers(2, size=n)
        predicted = np.where(rng.random(n) < 0.8, gold, 1 - gold)
        return classified(list(zip(gold.tolist(), predicted.tolist(), strict=True)))

    spread = np.std([value_of(draw(200)) for _ in range(300)])
    counts = draw(200)
    error = jackknife_error(counts, [""] * 200)
    assert error == pytest.approx(spread, rel=0.15)
    assert jackknife_error(counts * 4, [str(i) for i in range(200)] * 4) == pytest.approx(error)
    assert np.isnan(jackknife_error(counts[:1], [""]))


def test_the_difference_of_two_models_has_an_interval() -> None:
    """A model that is always right against one that is right in two of three; and a model against itself."""
    gold = [0, 1] * 60
    right = classified([(g, g) for g in gold])
    other = classified([(g, 1 - g if i % 3 == 0 else g) for i, g in enumerate(gold)])
    rng = np.random.default_rng(0)
    draws = bootstrap_difference(right, other, [""] * 120, 500, rng)
    difference = value_of(right) - value_of(other)
    assert draws.mean() == pytest.approx(difference, abs=0.02) and draws.min() > 0
    assert not bootstrap_difference(right, right, [""] * 120, 10, rng).any()


def test_results_use_the_counts(tmp_path: Path) -> None:
    """The value of a task is that of the sums, two models are compared by it, and it is read again from its files."""

    def result(name: str, pairs: Sequence[tuple[int, int]]) -> TaskResult:
        found = [
            ItemResult(f"a:{i}", "", "", 0, "", {}, {"mcc": float(a == b)}, [], counts={"mcc": one})
            for i, ((a, b), one) in enumerate(zip(pairs, classified(pairs), strict=True))
        ]
        return TaskResult("t", name, 0, 0, {"mcc": metric_value("mcc", found)}, {}, found)

    good = result("good", [(0, 0), (1, 1)] * 20)
    bad = result("bad", [(0, 1), (1, 1)] * 20)
    assert good.metrics["mcc"].value == 1 and bad.metrics["mcc"].value == 0
    [found] = compare([good, bad])
    assert found.better == "good" and found.difference == 1
    write_results(tmp_path, [bad], PromptConfig())
    [(again, _)] = read_results(tmp_path)
    assert again.metrics == bad.metrics and compare([good, again]) == [found]
