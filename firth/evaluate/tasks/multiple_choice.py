"""Multiple choice with the head of a finetuned run; `option_scoring` is the task for a generative model without one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from firth.data.labeled import MultipleChoiceConfig
from firth.data.records import Records
from firth.evaluate import metrics
from firth.evaluate.heads import HeadOutput, head_outputs, softmax
from firth.evaluate.prediction_inputs import InputSchema
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task, most_likely
from firth.evaluate.tasks.classification import check_head, examples, readout_position
from firth.objectives.classification import MultipleChoice
from firth.types import UserError


def load(evaluated: EvaluatedModel, paths: Sequence[str], labeled: bool = True) -> Records:
    """Load questions with the fields and the maximum length of the run's recipe, if it has one."""
    check_head(evaluated, "choice", "choices", "multiple_choice")
    return evaluated.records(MultipleChoiceConfig, paths, labeled)


def read(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Iterator[HeadOutput]:
    """Yield the label and the option scores of each question."""
    last = readout_position(evaluated) == "last"
    objective = MultipleChoice(max_options=items.longest("lengths"), position="last" if last else "first")
    return head_outputs(evaluated.model, objective, "choice", examples(items, progress), evaluated.vocab)


def respond(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return the index of the gold option and of the one with the highest score, as text; "" for a tie."""
    indices = [str(index) for index in range(items.longest("lengths"))]
    found = list(read(evaluated, items, progress))
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


def predict(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Iterator[dict[str, Any]]:
    """Yield {"choice": index from 0, "probability", "probabilities": one per option} for each question."""
    for i, (_, scores) in enumerate(read(evaluated, items, progress)):
        shares = [round(float(share), 6) for share in softmax(scores)][: len(items[i]["options"])]
        best = int(np.argmax(shares))
        yield {"choice": best, "probability": shares[best], "probabilities": shares}


MULTIPLE_CHOICE = Task(
    "multiple_choice",
    load,
    respond,
    {"accuracy": metrics.accuracy},
    majority_baseline=True,
    predict=predict,
    input_schema=input_schema,
)
