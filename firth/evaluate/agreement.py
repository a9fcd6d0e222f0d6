"""Agreement between annotators beyond chance: the kappas of Cohen (1960) and of Fleiss (1971).

    kappa = (observed agreement - expected agreement) / (1 - expected agreement)

1 is full agreement, 0 what chance gives. Cohen's kappa is of two annotators, whose categories may be differently frequent; Fleiss' is
of any number of annotators, who need not be the same for each item. Both are NaN where only one category was ever used.

>>> cohen_kappa(["a", "a", "b", "b"], ["a", "a", "b", "a"])
0.5
>>> round(fleiss_kappa(np.array([[2, 0], [0, 2], [1, 1]])), 4)
0.3333
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np


def cohen_kappa(first: Sequence[Hashable], second: Sequence[Hashable]) -> float:
    """Return Cohen's kappa of two annotators who gave each item a category.

    Args:
        first: Categories of the items by one annotator.
        second: Those by the other.

    Raises:
        ValueError: There are no items, or not as many categories of both.
    """
    if not first or len(first) != len(second):
        raise ValueError(
            f"categories of {len(first)} and {len(second)} items: both must be of the same items, at least one"
        )
    index = {category: i for i, category in enumerate(dict.fromkeys((*first, *second)))}
    table = np.zeros((len(index), len(index)))
    np.add.at(table, ([index[one] for one in first], [index[one] for one in second]), 1 / len(first))
    return _kappa(float(np.trace(table)), float(table.sum(1) @ table.sum(0)))


def fleiss_kappa(counts: np.ndarray) -> float:
    """Return Fleiss' kappa.

    Args:
        counts: How many annotators gave each item each category, (items, categories); the same number of annotators, two or more, for
            each item.

    Raises:
        ValueError: There is no item, or the numbers of annotators differ or are below two.
    """
    counts = np.asarray(counts, np.float64)
    annotators = counts.sum(1) if counts.ndim == 2 and len(counts) else np.zeros(1)
    if annotators[0] < 2 or (annotators != annotators[0]).any():
        raise ValueError("each item needs the categories of the same number of annotators, two or more")
    n = annotators[0]
    observed = ((counts * (counts - 1)).sum(1) / (n * (n - 1))).mean()
    shares = counts.sum(0) / counts.sum()
    return _kappa(float(observed), float(shares @ shares))


def _kappa(observed: float, expected: float) -> float:
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan
