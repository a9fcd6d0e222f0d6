"""Extractive question answering: the best span over all windows of a passage, by SQuAD's exact match and F1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from firth.data.question_answering import QuestionRecords
from firth.evaluate import metrics
from firth.evaluate.answer_spans import by_question
from firth.evaluate.heads import readings
from firth.evaluate.prediction_inputs import InputSchema
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task
from firth.evaluate.tasks.classification import examples, needs, where
from firth.objectives.extractive_qa import QuestionAnswering
from firth.types import UserError


def source(evaluated: EvaluatedModel, paths: Sequence[str], asked: bool = True) -> QuestionRecords:
    """The questions of the files, read in the windows of the run's recipe if it has one."""
    needs(evaluated, "span", "spans", "answer")
    told = evaluated.examples
    return QuestionRecords(
        paths, evaluated.tokenizer, evaluated.context, stride=told.get("doc_stride", 128), question=told.get("max_question_length", 64),
        context=told.get("context_field", "context"), labeled=asked, keep=True,
    )  # fmt: skip


def read(evaluated: EvaluatedModel, items: QuestionRecords, progress: Progress) -> Iterator[dict[str, Any]]:
    """The answer to each question: its text (empty: there is none), its place and how probable it is."""
    at: Literal["first", "last"] = "last" if where(evaluated) == "last" else "first"
    may_lack = evaluated.objective.get("has_unanswerable")
    may_lack = items.unanswerable > 0 if may_lack is None else may_lack
    found = readings(
        evaluated.model, QuestionAnswering(position=at), "span", examples(items, progress), evaluated.vocab
    )
    return by_question(items, (scores for _, scores in found), may_lack, at)


def answer(evaluated: EvaluatedModel, items: QuestionRecords, progress: Progress) -> Answers:
    """Exact match and F1 of each question."""
    return compared(items, read(evaluated, items, progress))


def compared(items: QuestionRecords, told: Iterator[dict[str, Any]]) -> Answers:
    """`answer`, of what was told of each question."""
    right = (items.question_of(number).right for number in range(items.questions))
    pairs = [metrics.squad(texts, one["answer"]) for texts, one in zip(right, told, strict=True)]
    return [exact for exact, _ in pairs], [f1 for _, f1 in pairs]


def wanted(evaluated: EvaluatedModel) -> InputSchema:
    """A question and its passage: more than a line holds."""
    context = evaluated.examples.get("context_field", "context")

    def line(text: str) -> dict[str, Any]:
        raise UserError(
            "this task reads a question and its passage, so lines of text are not enough: give JSON lines, or SQuAD's JSON"
        )

    def says(record: dict[str, Any]) -> Sequence[Any]:
        return [record.get(context), record.get("question")]

    return InputSchema("question", line, says, passages=True)


def tell(evaluated: EvaluatedModel, items: QuestionRecords, progress: Progress) -> Iterator[dict[str, Any]]:
    """{"answer": empty where there is none, "start": its character, "probability": of its two ends in their window}."""
    for told in read(evaluated, items, progress):
        yield told | {"probability": round(told["probability"], 6)}


QUESTION_ANSWERING = Task(
    "spans", source, answer,
    {"exact_match": lambda exact, f1: metrics.mean(exact), "f1": lambda exact, f1: metrics.mean(f1)}, predict=tell,
    input_schema=wanted,
)  # fmt: skip
