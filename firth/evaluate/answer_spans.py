"""The answer to a question among the windows of its passage (BERT, Devlin 2019, sections 4.2 and 4.3).

The score of a span is the sum of its two ends', over ends in their order and at most LONGEST tokens apart (all pairs are
looked at, not the twenty best of each, as BERT's run_squad does). Where a question may have no answer, there is none if the
least of the windows' scores of "nowhere" is above the best span's (a threshold of 0).

    windows = [best(scores, offsets, nowhere=0) for ...]        of one question
    chosen(windows, context, may_lack=True)                     {"answer": "Anne Lee", "start": 15, "probability": 0.83}
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from firth.data.question_answering import QuestionRecords
from firth.data.source import Source
from firth.evaluate import metrics

LONGEST = 30
"""Tokens of an answer."""


@dataclass(frozen=True)
class FoundSpan:
    """The best span of a window: its score, its characters in the passage, its probability; the score of nowhere, and its
    probability."""

    score: float
    start: int
    end: int
    probability: float
    nowhere: float
    no_answer_margin: float = 0.0


def best(scores: np.ndarray, offsets: np.ndarray, nowhere: int) -> FoundSpan:
    """The best span of a window: scores (T, 2), offsets (T, 2) with -1 outside of the passage. It neither begins nor ends at
    a token of white space alone, of which the offsets are alike.

    >>> best(np.array([[0.0, 0.0], [3.0, 0.0], [1.0, 2.0]]), np.array([[-1, -1], [0, 4], [5, 9]]), 0).end
    9
    """
    scores = scores.astype(np.float64)
    total = np.log(np.exp(scores - scores.max(0)).sum(0)).sum() + scores.max(0).sum()
    none = float(scores[nowhere].sum())
    lacking = float(np.exp(none - total))
    inside = offsets[:, 1] > offsets[:, 0]
    if not inside.any():
        return FoundSpan(-np.inf, 0, 0, 0.0, none, lacking)
    starts, ends = (np.where(inside, scores[:, side], -np.inf) for side in (0, 1))
    behind = np.concatenate((ends, np.full(LONGEST - 1, -np.inf)))
    both = starts[:, None] + np.lib.stride_tricks.sliding_window_view(behind, LONGEST)  # (T, LONGEST)
    first, more = divmod(int(both.argmax()), LONGEST)
    score = float(both[first, more])
    chance = float(np.exp(score - total))
    return FoundSpan(score, int(offsets[first, 0]), int(offsets[first + more, 1]), chance, none, lacking)


def chosen(windows: Sequence[FoundSpan], context: str, may_lack: bool) -> dict[str, Any]:
    """{"answer": its text, empty where there is none, "start": its character or -1, "probability": of what is told, in the
    window that tells it}."""
    top, least = max(windows, key=lambda one: one.score), min(windows, key=lambda one: one.nowhere)
    if may_lack and least.nowhere > top.score:
        return {"answer": "", "start": -1, "probability": least.no_answer_margin}
    return {"answer": context[top.start : top.end], "start": top.start, "probability": top.probability}


def by_question(
    items: QuestionRecords, found: Iterator[np.ndarray], may_lack: bool, at: Literal["first", "last"] = "first"
) -> Iterator[dict[str, Any]]:
    """`chosen` for each question in turn, of the scores of each window (T, 2)."""
    spans = (best(scores, items.offsets(i), nowhere(scores, at)) for i, scores in enumerate(found))
    for number, windows in groupby(zip(items.record_ids.tolist(), spans, strict=True), lambda pair: pair[0]):
        yield chosen([span for _, span in windows], items.question_of(number).context, may_lack)


def nowhere(scores: np.ndarray, at: str) -> int:
    """The token of a window that says that the answer is not there."""
    return len(scores) - 1 if at == "last" else 0


def measured(source: Source, found: Sequence[np.ndarray], may_lack: bool, at: str) -> dict[str, float]:
    """SQuAD's two measures over the questions of any source of windows, of the scores of each."""
    windows: dict[int, list[FoundSpan]] = {}
    asked = {}
    for i, (owner, scores) in enumerate(zip(source.record_ids.tolist(), found, strict=True)):
        beside = source.metadata(i)
        asked[owner] = beside["question"]
        windows.setdefault(owner, []).append(best(scores, beside["offsets"], nowhere(scores, at)))
    told = ((asked[owner], chosen(some, asked[owner].context, may_lack)) for owner, some in windows.items())
    pairs = [metrics.squad(question.right, one["answer"]) for question, one in told]
    return {"exact_match": metrics.mean([exact for exact, _ in pairs]), "f1": metrics.mean([f1 for _, f1 in pairs])}
