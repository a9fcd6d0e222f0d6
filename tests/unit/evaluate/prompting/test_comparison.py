"""Comparisons of models: paired bootstrap, weights, groups, and Holm's correction."""

from math import erfc, sqrt

import numpy as np
import pytest

from firth.evaluate.prompting.prompt_task import ItemResult
from firth.evaluate.prompting.results import compare, holm, paired_bootstrap
from firth.evaluate.prompting.runner import TaskResult, task_result


def result(
    model: str, values: list[float], metric: str = "acc", weights: list[float] | None = None, first: int = 0, task: str = "t"
) -> TaskResult:  # fmt: skip
    items = [
        ItemResult(
            f"q.jsonl:{first + i}", "", "p", 0, "yes", {}, {metric: value}, [], {metric: weights[i]} if weights else {}
        )
        for i, value in enumerate(values)
    ]
    return task_result(task, model, items)


def test_holm_is_that_of_a_step_down_by_hand() -> None:
    """The example of statsmodels' and R's documentation: p.adjust(c(.01, .02, .03, .04), "holm")."""
    assert holm([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm([0.5, 0.01, 0.9]) == pytest.approx([1.0, 0.03, 1.0])
    assert holm([]) == []


def test_the_interval_and_p_are_those_of_the_normal_limit() -> None:
    """With 400 items the bootstrap agrees with the z test of the differences."""
    rng = np.random.default_rng(0)
    a, b = (rng.random(400) < 0.55).astype(float), (rng.random(400) < 0.5).astype(float)
    found = paired_bootstrap(result("a", a.tolist()), result("b", b.tolist()), "acc")
    assert found is not None
    differences = a - b
    error = differences.std() / 20
    assert found.difference == pytest.approx(differences.mean())
    assert (found.low, found.high) == pytest.approx(
        (differences.mean() - 1.96 * error, differences.mean() + 1.96 * error), abs=0.006
    )
    assert found.p == pytest.approx(erfc(abs(differences.mean()) / error / sqrt(2)), abs=0.03)


def test_lower_bits_per_byte_are_better() -> None:
    """The difference is that of the sums over bytes, not the mean over texts."""
    weights = [100.0, 300.0] * 15
    one = result("one", [1.0 + 0.01 * i for i in range(30)], "bits_per_byte", weights)
    other = result("other", [1.5 + 0.01 * i for i in range(30)], "bits_per_byte", weights)
    mixed = result("mixed", [2.0 + 0.01 * i if i % 2 else 1.0 + 0.01 * i for i in range(30)], "bits_per_byte", weights)
    assert [one.better for one in compare([one, other])] == ["one"]
    found = paired_bootstrap(one, mixed, "bits_per_byte")
    assert found is not None and found.difference == pytest.approx(-0.75)  # 300 of 400 bytes differ by 1


def test_a_result_alone_is_no_result_among_many() -> None:
    """p of about 0.03 passes for two models and not for twelve comparisons."""
    base = [float(i % 2) for i in range(40)]
    better = base.copy()
    for i in (0, 2, 4, 6, 8, 10, 12, 14):
        better[i] = 1.0
    better[1] = 0.0
    a, b = result("a", better), result("b", base)
    [alone] = compare([a, b])
    assert alone.better == "a" and 0.005 < alone.p < 0.05 and "is better than" in str(alone)
    noise = [
        result(name, np.random.default_rng(seed).permutation(base).tolist(), task=f"t{seed}")
        for seed in range(1, 12)
        for name in ("c", "d")
    ]
    many = compare([a, b, *noise])
    assert len(many) == 12 and many[0].p == alone.p and many[0].adjusted == pytest.approx(12 * alone.p)
    assert many[0].better == "" and "does not differ from" in str(many[0]) and "12 comparisons" in str(many[0])


def test_only_common_items_are_compared() -> None:
    """Evaluations with another limit share some items; other files share none."""
    found = paired_bootstrap(result("a", [1.0] * 10), result("b", [0.0] * 10, first=6), "acc")
    assert found is not None and found.items == 4
    assert paired_bootstrap(result("a", [1.0]), result("b", [0.0], first=5), "acc") is None
    assert compare([result("a", [1.0, 0.0]), result("b", [0.0, 0.0], first=5)]) == []


def test_a_few_groups_are_no_evidence() -> None:
    """Three groups that agree resample to the same sign always; an exact test of signs gives p = 1/4."""
    items = {
        name: [
            ItemResult(f"q.jsonl:{i}", "abc"[i % 3], "p", 0, "yes", {}, {"acc": float(i < right)}, [])
            for i in range(30)
        ]
        for name, right in (("a", 30), ("b", 0))
    }
    [found] = compare([task_result("t", name, items[name]) for name in "ab"])
    assert (found.low, found.high, found.p) == (1.0, 1.0, 0.25) and found.better == ""
