"""Extractive question answering: the best span over all windows of a passage, by SQuAD's exact match and F1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from firth.data.question_answering import QuestionsConfig, has_unanswerable, question_of
from firth.data.records import Records
from firth.evaluate import metrics
from firth.evaluate.heads import HeadOutput, by_question
from firth.evaluate.prediction_inputs import FormField, InputSchema
from firth.evaluate.task import Answers, EvaluatedModel, HeadTask, Progress, Task
from firth.evaluate.tasks.classification import check_head, readout_position
from firth.objectives.token_tasks import QuestionAnswering
from firth.types import UserError


def load(evaluated: EvaluatedModel, paths: Sequence[str], labeled: bool = True) -> Records:
    """Load questions in the windows of the run's recipe, if it has one."""
    check_head(evaluated, "span", "spans", "question_answering")
    return evaluated.records(QuestionsConfig, paths, labeled)


def no_answer_position(evaluated: EvaluatedModel) -> Literal["first", "last"]:
    """Return which token of a window represents "no answer"."""
    return "last" if readout_position(evaluated) == "last" else "first"


def objective(evaluated: EvaluatedModel, items: Records) -> QuestionAnswering:
    """Return the objective that reads the head."""
    return QuestionAnswering(position=no_answer_position(evaluated))


def answers(evaluated: EvaluatedModel, items: Records, outputs: Iterator[HeadOutput]) -> Iterator[dict[str, Any]]:
    """Yield the answer to each question: its text (empty for no answer), start and probability."""
    unanswerable = evaluated.objective.get("has_unanswerable")
    unanswerable = has_unanswerable(items) if unanswerable is None else unanswerable
    return by_question(items, (scores for _, scores in outputs), unanswerable, no_answer_position(evaluated))


def respond(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return exact match and F1 of each question."""
    return score_answers(items, answers(evaluated, items, HEAD.outputs(evaluated, items, progress)))


def score_answers(items: Records, answers: Iterator[dict[str, Any]]) -> Answers:
    """Return exact match and F1 of given answers, one per question."""
    gold = (question_of(items, number).right for number in dict.fromkeys(items.record_ids.tolist()))
    pairs = [metrics.squad(texts, one["answer"]) for texts, one in zip(gold, answers, strict=True)]
    return [exact for exact, _ in pairs], [f1 for _, f1 in pairs]


def input_schema(evaluated: EvaluatedModel) -> InputSchema:
    """Return the schema of a question and its passage; a line of text cannot hold both."""
    fields = QuestionsConfig.of(evaluated.examples)

    def line(text: str) -> dict[str, Any]:
        raise UserError(
            "this task reads a question and its passage, which lines of text cannot give: give JSON lines or SQuAD's JSON"
        )

    def texts(record: dict[str, Any]) -> Sequence[Any]:
        return [record.get(name) for name in fields.read_fields]

    return InputSchema("question", line, texts, passages=True)


def form(evaluated: EvaluatedModel) -> list[FormField]:
    """Return the fields of a passage and a question."""
    passage = FormField(QuestionsConfig.of(evaluated.examples).context_field, "Passage", "passage")
    return [passage, FormField("question", "Question")]


def rows(evaluated: EvaluatedModel, items: Records, outputs: Iterator[HeadOutput]) -> Iterator[dict[str, Any]]:
    """Yield {"answer": empty for no answer, "start": character, "probability": in its window} for each question."""
    for answer in answers(evaluated, items, outputs):
        yield answer | {"probability": round(answer["probability"], 6)}


HEAD = HeadTask("span", objective, rows)
QUESTION_ANSWERING = Task(
    "question_answering", load, respond,
    {"exact_match": lambda exact, f1: metrics.mean(exact), "f1": lambda exact, f1: metrics.mean(f1)}, predict=HEAD.predict,
    input_schema=input_schema, route="answer", form=form, head=HEAD,
)  # fmt: skip
