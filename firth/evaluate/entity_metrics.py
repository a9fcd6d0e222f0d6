"""Precision, recall and F1 of named entities, counted as conlleval does (Tjong Kim Sang & De Meulder 2003).

An entity is correct if its start, end and type are.

>>> gold, predicted = ["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "I-PER", "O", "B-ORG"]
>>> counts(gold, predicted), scores(*np.array([counts(gold, predicted)]).T)["f1"]
((2, 2, 1), 0.5)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from firth.data.tags import names


def counts(gold: Sequence[str], predicted: Sequence[str]) -> tuple[int, int, int]:
    """Return the number of gold, of predicted and of correct entities in one sentence."""
    expected, found = names(gold), names(predicted)
    return len(expected), len(found), len({*expected} & {*found})


def scores(gold: np.ndarray, predicted: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Return precision, recall and F1 over sentences; 0 where there is no entity.

    Args:
        gold: Gold entities of each sentence (n,), as `counts` has them.
        predicted: Predicted entities (n,).
        correct: Correct entities (n,).
    """
    right = float(correct.sum())
    return {
        "precision": right / max(1, int(predicted.sum())),
        "recall": right / max(1, int(gold.sum())),
        "f1": f1(gold, predicted, correct),
    }


def f1(gold: np.ndarray, predicted: np.ndarray, correct: np.ndarray) -> float:
    """Return the harmonic mean of precision and recall."""
    return 2 * float(correct.sum()) / max(1, int(gold.sum() + predicted.sum()))


def by_kind(sentences: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, Any]]:
    """Return a row for each entity type: number of gold entities, precision, recall and F1.

    Args:
        sentences: Gold and predicted tags of each sentence.
    """
    expected, found, correct = Counter[str](), Counter[str](), Counter[str]()
    for gold, predicted in sentences:
        a, b = names(gold), names(predicted)
        expected.update(kind for kind, *_ in a)
        found.update(kind for kind, *_ in b)
        correct.update(kind for kind, *_ in {*a} & {*b})
    return [
        {"class": kind, "examples": expected[kind]}
        | scores(np.array([expected[kind]]), np.array([found[kind]]), np.array([correct[kind]]))
        for kind in sorted({*expected, *found})
    ]
