"""Metrics that are not a mean over items: F1, Matthews' correlation, BLEU. Each is a function of counts summed over items.

>>> round(value_of([Counts("f1", (1, 1, 1)), Counts("f1", (0, 1, 0)), Counts("f1", (0, 0, 0))]), 3)
0.667
>>> value_of([Counts("mcc", (1, 0, 0, 0)), Counts("mcc", (0, 0, 0, 1))])
1.0
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from firth.evaluate.text_overlap import bleu


@dataclass(frozen=True)
class Counts:
    """What one item adds to a metric.

    Args:
        kind: Name in `AGGREGATES`.
        values: The counts; as many for every item.
    """

    kind: str
    values: tuple[float, ...]


def class_counts(kind: str, gold: int, predicted: int, classes: int) -> Counts:
    """Return the counts of a classified item for "f1" (of class 1), or "mcc" and "macro_f1" (the confusion matrix)."""
    if kind == "f1":
        return Counts(kind, (float(gold == predicted == 1), float(gold == 1), float(predicted == 1)))
    return Counts(kind, tuple(float(i == gold * classes + predicted) for i in range(classes**2)))


def _f1(sums: np.ndarray) -> float:
    hits, gold, predicted = sums
    return float(2 * hits / (gold + predicted)) if hits else 0.0


def _square(sums: np.ndarray) -> np.ndarray:
    size = math.isqrt(len(sums))
    return sums.reshape(size, size)


def _mcc(sums: np.ndarray) -> float:
    """Return Matthews' correlation for any number of classes (Gorodkin 2004); 0 where one side has a single class."""
    table = _square(sums)
    n, gold, predicted = table.sum(), table.sum(1), table.sum(0)
    variance = (n**2 - predicted @ predicted) * (n**2 - gold @ gold)
    return float((np.trace(table) * n - gold @ predicted) / math.sqrt(variance)) if variance > 0 else 0.0


def _macro_f1(sums: np.ndarray) -> float:
    """Return the mean F1 of the classes that occur as gold answer or prediction."""
    table = _square(sums)
    sizes = table.sum(0) + table.sum(1)
    present = sizes > 0
    return float((2 * np.diag(table)[present] / sizes[present]).mean())


AGGREGATES: dict[str, Callable[[np.ndarray], float]] = {
    "f1": _f1, "mcc": _mcc, "macro_f1": _macro_f1, "bleu": bleu,
}  # fmt: skip
"""Kind of counts -> the metric of their sum."""


def value_of(counts: Sequence[Counts]) -> float:
    """Return the metric over items."""
    return AGGREGATES[counts[0].kind](np.sum([one.values for one in counts], 0))


def jackknife_error(counts: Sequence[Counts], groups: Sequence[str]) -> float:
    """Return the standard error of a metric by leaving out one item at a time, or one group where there are several.

    Args:
        counts: Counts of each item.
        groups: Group of each item.
    """
    sums = cluster_sums(counts, groups)
    n = len(sums)
    if n < 2:
        return math.nan
    function, total = AGGREGATES[counts[0].kind], sums.sum(0)
    values = np.array([function(total - one) for one in sums])
    return float(math.sqrt((n - 1) / n * ((values - values.mean()) ** 2).sum()))


def cluster_sums(counts: Sequence[Counts], groups: Sequence[str]) -> np.ndarray:
    """Return the counts summed by group where there are several, otherwise those of each item, (clusters, numbers)."""
    rows = np.array([one.values for one in counts], np.float64)
    names, index = np.unique(np.array(groups, dtype=str), return_inverse=True)
    if len(names) < 2:
        return rows
    sums = np.zeros((len(names), rows.shape[1]))
    np.add.at(sums, index, rows)
    return sums


def bootstrap_difference(
    first: Sequence[Counts], second: Sequence[Counts], groups: Sequence[str], draws: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the difference of a metric between two models in each of `draws` samples of the items (or groups), (draws,)."""
    function = AGGREGATES[first[0].kind]
    sums, other = cluster_sums(first, groups), cluster_sums(second, groups)
    n = len(sums)
    weights = (rng.multinomial(n, np.full(n, 1 / n)) for _ in range(draws))
    return np.array([function(w @ sums) - function(w @ other) for w in weights])
