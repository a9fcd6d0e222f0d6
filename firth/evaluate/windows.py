"""The answer to a question, from the scores of all windows of its passage; SQuAD's exact match and F1 of the answers.

The score of a span is the sum of its two ends', over ends in their order and at most LONGEST tokens apart (BERT, Devlin
2019, section 4.2; all pairs are looked at, not the twenty best of each). Where a question may have no answer, there is
none if the least of the windows' scores of "nowhere" is above the best span's (section 4.3, with a threshold of 0), and
what is told then is how probable nowhere is in that window.

Training's checks and `firth evaluate` both measure by this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from firth.data.source import Source
from firth.evaluate import metrics

LONGEST = 30
"""Tokens of an answer."""


@dataclass(frozen=True)
class Found:
    """The best span of a window: its score, its characters in the passage, its probability; the score of nowhere and how
    probable that is."""

    score: float
    start: int
    end: int
    probability: float
    nowhere: float
    absent: float


def best(scores: np.ndarray, offsets: np.ndarray, nowhere: int) -> Found:
    """The best span of a window: scores (T, 2), offsets (T, 2) with -1 outside of the passage.

    >>> best(np.array([[0.0, 0.0], [3.0, 0.0], [1.0, 2.0]]), np.array([[-1, -1], [0, 4], [5, 9]]), 0).end
    9
    """
    inside = offsets[:, 0] >= 0
    total = np.log(np.exp(scores - scores.max(0)).sum(0)).sum() + scores.max(0).sum()
    none = float(scores[nowhere].sum())
    absent = float(np.exp(none - total))
    if not inside.any():
        return Found(-np.inf, 0, 0, 0.0, none, absent)
    both = np.where(inside, scores[:, 0], -np.inf)[:, None] + np.where(inside, scores[:, 1], -np.inf)[None]
    n = len(scores)
    allowed = np.triu(np.ones((n, n), bool)) & ~np.triu(np.ones((n, n), bool), LONGEST)
    first, last = np.unravel_index(np.where(allowed, both, -np.inf).argmax(), both.shape)
    score = float(both[first, last])
    return Found(score, int(offsets[first, 0]), int(offsets[last, 1]), float(np.exp(score - total)), none, absent)


def by_question(
    items: Source, found: Iterator[np.ndarray], may_lack: bool, at: Literal["first", "last"] = "first"
) -> Iterator[dict[str, Any]]:
    """The answer to each question: its text (empty: there is none), its place and how probable it is, and the texts that
    are right. found: of each window of `items` (`firth.data.questions`) the scores (T, 2), whoever's they are."""
    windows = ((items.origin(i), scores) for i, scores in enumerate(found))
    for _, some in groupby(zip(items.owners.tolist(), windows, strict=True), lambda pair: pair[0]):
        origins, spans = zip(
            *((o, best(s, o["offsets"], len(s) - 1 if at == "last" else 0)) for _, (o, s) in some), strict=True
        )
        question = origins[0]["question"]
        top, least = max(spans, key=lambda span: span.score), min(spans, key=lambda span: span.nowhere)
        told = {"id": question.id, "right": question.right}
        if may_lack and least.nowhere > top.score:
            yield told | {"answer": "", "start": -1, "probability": least.absent}
        else:
            text = question.context[top.start : top.end]
            yield told | {"answer": text, "start": top.start, "probability": top.probability}


def compared(told: Iterator[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Exact match and F1 of each answer."""
    pairs = [metrics.squad(one["right"], one["answer"]) for one in told]
    return [exact for exact, _ in pairs], [f1 for _, f1 in pairs]
