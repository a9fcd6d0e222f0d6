"""Compare models on the items of tasks: paired bootstrap, with a correction for the number of comparisons.

Two models are compared on the items that both answered, in the first metric of a task that has a standard error. With several
comparisons some intervals exclude 0 by chance, so a model is called better only if the 95% interval of the difference excludes 0
and the p-value is below 0.05 after Holm's correction over all comparisons that are printed together (Holm 1979).

>>> holm([0.01, 0.04, 0.03])
[0.03, 0.06, 0.06]
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from firth.evaluate.prompting.aggregates import bootstrap_difference, value_of
from firth.evaluate.prompting.prompt_task import ItemResult
from firth.evaluate.prompting.runner import LOWER_IS_BETTER, TaskResult

ALPHA = 0.05
DRAWS = 10_000
"""Bootstrap samples: the smallest p-value is 2 in 10,000, which Holm's correction lets pass for up to 249 comparisons."""
CHUNK_PICKS = 2_000_000
"""Items that are drawn at once, which bounds the memory."""


@dataclass(frozen=True)
class Comparison:
    """Difference of a metric between two models on the same items.

    Args:
        task: Name of the task.
        metric: Name of the metric.
        first: Name of the first model.
        second: Name of the second model.
        difference: Value of the first minus value of the second.
        low: Start of its 95% interval.
        high: End of its 95% interval.
        p: Two-sided p-value of the bootstrap.
        items: Number of items that both answered.
        adjusted: The p-value after Holm's correction.
        count: Comparisons that were corrected together.
    """

    task: str
    metric: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    items: int
    adjusted: float = 1.0
    count: int = 1

    @property
    def better(self) -> str:
        """The model that is better; "" if the interval or the corrected p-value does not allow to say so."""
        if self.low <= 0 <= self.high or self.adjusted >= ALPHA:
            return ""
        higher = self.first if self.difference > 0 else self.second
        lower = self.second if self.difference > 0 else self.first
        return lower if base_name(self.metric) in LOWER_IS_BETTER else higher

    def __str__(self) -> str:
        """Return a sentence without its full stop."""
        verdict = {self.first: "is better than", self.second: "is worse than"}.get(self.better, "does not differ from")
        corrected = f" after Holm's correction for {self.count} comparisons" if self.count > 1 else ""
        return (
            f"{self.task}: {self.first} {verdict} {self.second} in {self.metric} (difference {self.difference:+.4f}, 95% interval "
            f"{self.low:+.4f} to {self.high:+.4f}, p {self.adjusted:.2g}{corrected}, {self.items:,} items)"
        )


def base_name(metric: str) -> str:
    """Return the name of a metric without its filter chain."""
    return metric.partition(",")[0]


def main_metric(result: TaskResult) -> str:
    """Return the first metric that has a standard error, by which models are compared; "" if none has."""
    return next((name for name, value in result.metrics.items() if not math.isnan(value.stderr)), "")


def compare(results: Sequence[TaskResult]) -> list[Comparison]:
    """Return the comparisons of each two models of each task, with Holm's correction over all of them.

    Two results without a common item are left out.
    """
    found = []
    for task in dict.fromkeys(result.task for result in results):
        mine = [result for result in results if result.task == task]
        for a, first in enumerate(mine):
            for second in mine[a + 1 :]:
                metric = main_metric(first)
                if metric and metric in second.metrics and (one := paired_bootstrap(first, second, metric)) is not None:
                    found.append(one)
    adjusted = holm([one.p for one in found])
    return [replace(one, adjusted=p, count=len(found)) for one, p in zip(found, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the same order."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def common_items(first: TaskResult, second: TaskResult) -> list[tuple[ItemResult, ItemResult]]:
    """Return the items that both results have: those of equal file, line and gold answer."""
    known = {_identity(item): item for item in second.items}
    return [(item, known[key]) for item in first.items if (key := _identity(item)) in known]


def _identity(item: ItemResult) -> tuple[str, str]:
    return item.location, json.dumps(item.gold, sort_keys=True)


def paired_bootstrap(
    first: TaskResult, second: TaskResult, metric: str, draws: int = DRAWS, seed: int = 0
) -> Comparison | None:
    """Return the difference of a metric between two models, with its 95% interval; None without a common item.

    Items are resampled by group where there are groups. Weighted metrics (bits per byte) are ratios in each sample. The p-value
    is at least what an exact test of signs can give for so many items or groups: few groups always agree with themselves.
    """
    pairs = common_items(first, second)
    if not pairs:
        return None
    differences = np.array([a.metrics[metric] - b.metrics[metric] for a, b in pairs], np.float64)
    weights = np.array([a.weights.get(metric, 1.0) for a, _ in pairs], np.float64)
    names = {group: i for i, group in enumerate(dict.fromkeys(a.group for a, _ in pairs))}
    cluster = np.array([names[a.group] for a, _ in pairs]) if len(names) > 1 else np.arange(len(pairs))
    sums, sizes = np.bincount(cluster, weights * differences), np.bincount(cluster, weights)
    rng, means = np.random.default_rng(seed), []
    difference = float(sums.sum() / sizes.sum())
    if all(metric in one.counts for pair in pairs for one in pair):  # F1, Matthews' correlation, BLEU
        ours, theirs = ([pair[side].counts[metric] for pair in pairs] for side in (0, 1))
        difference = value_of(ours) - value_of(theirs)
        means.append(bootstrap_difference(ours, theirs, [a.group for a, _ in pairs], draws, rng))
    else:
        step = max(1, CHUNK_PICKS // len(sums))
        for start in range(0, draws, step):
            picks = rng.integers(len(sums), size=(min(step, draws - start), len(sums)))
            means.append(sums[picks].sum(1) / sizes[picks].sum(1))
    drawn = np.concatenate(means)
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Comparison(
        first.task, metric, first.model, second.model, difference, float(low), float(high),
        max(min(1.0, 2 * (tail + 1) / (draws + 1)), 2.0 ** (1 - len(sums))), len(pairs),
    )  # fmt: skip
