"""Extractive question answering: the best span over all windows of a passage, by SQuAD's exact match and F1.

The score of a span is the sum of its two ends', over ends in their order and at most LONGEST tokens apart (BERT, Devlin
2019, section 4.2; all pairs are looked at, not the twenty best of each). Where a question may have no answer, there is
none if the least of the windows' scores of "nowhere" is above the best span's (section 4.3, with a threshold of 0).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from firth.data.questions import Questions
from firth.evaluate import metrics
from firth.evaluate.heads import readings
from firth.evaluate.task import Answers, Progress, Subject, Task
from firth.evaluate.tasks.classification import examples, needs, where
from firth.objectives.spans import Spans

LONGEST = 30
"""Tokens of an answer."""


@dataclass(frozen=True)
class Found:
    """The best span of a window: its score, its characters in the passage, its probability; the score of nowhere."""

    score: float
    start: int
    end: int
    probability: float
    nowhere: float


def best(scores: np.ndarray, offsets: np.ndarray, nowhere: int) -> Found:
    """The best span of a window: scores (T, 2), offsets (T, 2) with -1 outside of the passage.

    >>> best(np.array([[0.0, 0.0], [3.0, 0.0], [1.0, 2.0]]), np.array([[-1, -1], [0, 4], [5, 9]]), 0).end
    9
    """
    inside = offsets[:, 0] >= 0
    if not inside.any():
        return Found(-np.inf, 0, 0, 0.0, float(scores[nowhere].sum()))
    both = np.where(inside, scores[:, 0], -np.inf)[:, None] + np.where(inside, scores[:, 1], -np.inf)[None]
    n = len(scores)
    allowed = np.triu(np.ones((n, n), bool)) & ~np.triu(np.ones((n, n), bool), LONGEST)
    first, last = np.unravel_index(np.where(allowed, both, -np.inf).argmax(), both.shape)
    score = float(both[first, last])
    total = np.log(np.exp(scores - scores.max(0)).sum(0)).sum() + scores.max(0).sum()
    return Found(
        score, int(offsets[first, 0]), int(offsets[last, 1]), float(np.exp(score - total)), float(scores[nowhere].sum())
    )


def source(subject: Subject, paths: Sequence[str], asked: bool = True) -> Questions:
    """The questions of the files, read in the windows of the run's recipe if it has one."""
    needs(subject, "span", "spans", "answer")
    told = subject.segment
    return Questions(
        paths, subject.tokenizer, subject.context, stride=told.get("stride", 128), question=told.get("question", 64),
        context=told.get("context", "context"), asked=asked, keep=True,
    )  # fmt: skip


def read(subject: Subject, items: Questions, progress: Progress) -> Iterator[dict[str, Any]]:
    """The answer to each question: its text (empty: there is none), its place and how probable it is."""
    at: Literal["first", "last"] = "last" if where(subject) == "last" else "first"
    may_lack = subject.objective.get("unanswerable")
    may_lack = items.unanswerable > 0 if may_lack is None else may_lack
    found = readings(subject.model, Spans(at=at), "span", examples(items, progress), subject.vocab)
    return by_question(items, (scores for _, scores in found), may_lack, at)


def by_question(
    items: Questions, found: Iterator[np.ndarray], may_lack: bool, at: Literal["first", "last"] = "first"
) -> Iterator[dict[str, Any]]:
    """`read`, of anybody's scores: of each window one (T, 2)."""
    assert items.asked_of is not None
    spans = (best(scores, items.offsets(i), len(scores) - 1 if at == "last" else 0) for i, scores in enumerate(found))
    for number, windows in groupby(zip(items.owners.tolist(), spans, strict=True), lambda pair: pair[0]):
        some = [span for _, span in windows]
        top = max(some, key=lambda span: span.score)
        lacks = may_lack and min(span.nowhere for span in some) > top.score
        question = items.asked_of[number]
        text = "" if lacks else question.context[top.start : top.end]
        yield {"id": question.id, "answer": text, "start": -1 if lacks else top.start, "probability": top.probability}


def answer(subject: Subject, items: Questions, progress: Progress) -> Answers:
    """Exact match and F1 of each question."""
    return compared(items, read(subject, items, progress))


def compared(items: Questions, told: Iterator[dict[str, Any]]) -> Answers:
    """`answer`, of what was told of each question."""
    assert items.asked_of is not None
    said = [one["answer"] for one in told]
    pairs = [metrics.squad(question.right, text) for question, text in zip(items.asked_of, said, strict=True)]
    return [exact for exact, _ in pairs], [f1 for _, f1 in pairs]


def tell(subject: Subject, paths: Sequence[str], progress: Progress) -> Iterator[dict[str, Any]]:
    """{"id", "answer", "start": its character, "probability": of its two ends in their window}."""
    for told in read(subject, source(subject, paths, asked=False), progress):
        yield told | {"probability": round(told["probability"], 6)}


SPANS = Task(
    "spans", source, answer,
    {"exact_match": lambda exact, f1: metrics.mean(exact), "f1": lambda exact, f1: metrics.mean(f1)}, tell=tell,
)  # fmt: skip
