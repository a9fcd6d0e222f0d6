"""Multiple choice with the head of a finetuned run; `option_scoring` is the task for a generative model without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from firth.data.labeled import MultipleChoiceConfig
from firth.data.records import Records
from firth.evaluate import metrics
from firth.evaluate.heads import HeadOutput, softmax
from firth.evaluate.prediction_inputs import FormField, InputSchema
from firth.evaluate.task import Answers, EvaluatedModel, HeadTask, Progress, Task, most_likely
from firth.evaluate.tasks.classification import check_head, readout_position
from firth.objectives.classification import MultipleChoice
from firth.types import UserError


def load(evaluated: EvaluatedModel, paths: Sequence[str], labeled: bool = True) -> Records:
    """Load questions with the fields and the maximum length of the run's recipe, if it has one."""
    check_head(evaluated, "choice", "choices", "multiple_choice")
    return evaluated.records(MultipleChoiceConfig, paths, labeled)


def objective(evaluated: EvaluatedModel, items: Records) -> MultipleChoice:
    """Return the objective that reads the head."""
    last = readout_position(evaluated) == "last"
    return MultipleChoice(max_options=items.longest("lengths"), position="last" if last else "first")


def respond(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return the index of the gold option and of the one with the highest score, as text; "" for a tie."""
    indices = [str(index) for index in range(items.longest("lengths"))]
    found = list(HEAD.outputs(evaluated, items, progress))
    return [str(int(label)) for label, _ in found], [most_likely(indices, scores.tolist()) for _, scores in found]


def input_schema(evaluated: EvaluatedModel) -> InputSchema:
    """Return the schema of a text and its options; a line of text cannot hold both."""
    fields = MultipleChoiceConfig.of(evaluated.examples)

    def line(text: str) -> dict[str, Any]:
        raise UserError("this task reads a text and its options, which lines of text cannot give: give JSON lines")

    return InputSchema(
        fields.text_field,
        line,
        lambda record: [record.get(name) for name in fields.read_fields],
        fields.column_names,
    )


def form(evaluated: EvaluatedModel) -> list[FormField]:
    """Return the fields of a question and its options."""
    choice = MultipleChoiceConfig.of(evaluated.examples)
    found = [FormField(choice.text_field, "Question")]
    if len(choice.option_fields) == 1:
        found.append(FormField(choice.option_fields[0], "Options", "lines", "One option a line."))
    else:
        found += [FormField(name, f"Option {i}") for i, name in enumerate(choice.option_fields, 1)]
    if choice.option_prefix_field:
        found.append(FormField(choice.option_prefix_field, "Beginning of each option"))
    return found


def rows(evaluated: EvaluatedModel, items: Records, outputs: Iterator[HeadOutput]) -> Iterator[dict[str, Any]]:
    """Yield {"choice": index from 0, "probability", "probabilities": one per option} for each question."""
    for i, (_, scores) in enumerate(outputs):
        shares = [round(float(share), 6) for share in softmax(scores)][: len(items[i]["options"])]
        best = int(np.argmax(shares))
        yield {"choice": best, "probability": shares[best], "probabilities": shares}


HEAD = HeadTask("choice", objective, rows)
MULTIPLE_CHOICE = Task(
    "multiple_choice",
    load,
    respond,
    {"accuracy": metrics.accuracy},
    majority_baseline=True,
    predict=HEAD.predict,
    input_schema=input_schema,
    route="classify",
    form=form,
    head=HEAD,
)
