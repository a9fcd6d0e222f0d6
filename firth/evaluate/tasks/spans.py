"""Extractive question answering: the best span over all windows of a passage, by SQuAD's exact match and F1.

How the windows' scores become an answer is told in `firth.evaluate.windows`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from firth.data.questions import Questions
from firth.evaluate import metrics
from firth.evaluate.heads import readings
from firth.evaluate.task import Answers, Progress, Subject, Task
from firth.evaluate.tasks.classification import examples, needs, where
from firth.evaluate.windows import by_question, compared
from firth.objectives.spans import Spans


def source(subject: Subject, paths: Sequence[str], asked: bool = True) -> Questions:
    """The questions of the files, read in the windows of the run's recipe if it has one."""
    needs(subject, "span", "spans", "answer")
    told = subject.segment
    return Questions(
        paths, subject.tokenizer, subject.context, stride=told.get("stride", 128), question=told.get("question", 64),
        context=told.get("context", "context"), asked=asked, keep=True,
    )  # fmt: skip


def read(subject: Subject, items: Questions, progress: Progress) -> Iterator[dict[str, Any]]:
    """`by_question`, of the head's scores."""
    at: Literal["first", "last"] = "last" if where(subject) == "last" else "first"
    may_lack = subject.objective.get("unanswerable")
    may_lack = items.unanswerable > 0 if may_lack is None else may_lack
    found = readings(subject.model, Spans(at=at), "span", examples(items, progress), subject.vocab)
    return by_question(items, (scores for _, scores in found), may_lack, at)


def answer(subject: Subject, items: Questions, progress: Progress) -> Answers:
    """Exact match and F1 of each question."""
    return compared(read(subject, items, progress))


def tell(subject: Subject, paths: Sequence[str], progress: Progress) -> Iterator[dict[str, Any]]:
    """{"id", "answer", "start": its character, "probability": of its two ends in their window}."""
    for told in read(subject, source(subject, paths, asked=False), progress):
        del told["right"]
        yield told | {"probability": round(told["probability"], 6)}


SPANS = Task(
    "spans", source, answer,
    {"exact_match": lambda exact, f1: metrics.mean(exact), "f1": lambda exact, f1: metrics.mean(f1)}, tell=tell,
)  # fmt: skip
