"""How well names are found: precision, recall and F1 of whole names with their kind, as conlleval counts them
(Tjong Kim Sang & De Meulder 2003). A name counts if both ends and the kind are right.

>>> right, said = ["B-PER", "I-PER", "O", "B-LOC"], ["B-PER", "I-PER", "O", "B-ORG"]
>>> counts(right, said), scores(*np.array([counts(right, said)]).T)["f1"]
((2, 2, 1), 0.5)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from firth.data.tags import names


def counts(right: Sequence[str], said: Sequence[str]) -> tuple[int, int, int]:
    """Of one sentence: the names that are there, those that are said, those that are both."""
    there, found = names(right), names(said)
    return len(there), len(found), len({*there} & {*found})


def scores(there: np.ndarray, said: np.ndarray, both: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 over sentences, each (n,) of `counts`; 0 where nothing is there or said."""
    right = float(both.sum())
    return {
        "precision": right / max(1, int(said.sum())),
        "recall": right / max(1, int(there.sum())),
        "f1": f1(there, said, both),
    }


def f1(there: np.ndarray, said: np.ndarray, both: np.ndarray) -> float:
    """The harmonic mean of both."""
    return 2 * float(both.sum()) / max(1, int(there.sum() + said.sum()))


def by_kind(sentences: Sequence[tuple[Sequence[str], Sequence[str]]]) -> list[dict[str, Any]]:
    """A row for each kind of name, over (right, said) sentences: how many there are, precision, recall, F1."""
    there, found, both = Counter[str](), Counter[str](), Counter[str]()
    for right, said in sentences:
        a, b = names(right), names(said)
        there.update(kind for kind, *_ in a)
        found.update(kind for kind, *_ in b)
        both.update(kind for kind, *_ in {*a} & {*b})
    return [
        {"class": kind, "examples": there[kind]}
        | scores(np.array([there[kind]]), np.array([found[kind]]), np.array([both[kind]]))
        for kind in sorted({*there, *found})
    ]
