"""Multiple choice through the head that a finetuned run has for it (`choices` asks a model that writes, by likelihood)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from firth.data.labeled import MultipleChoiceRecords, OptionFields
from firth.evaluate import metrics
from firth.evaluate.heads import HeadOutput, readings, softmax
from firth.evaluate.prediction_inputs import InputSchema
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task, most_likely
from firth.evaluate.tasks.classification import examples, needs, where
from firth.objectives.multiple_choice import MultipleChoice
from firth.types import UserError


def source(evaluated: EvaluatedModel, paths: Sequence[str], asked: bool = True) -> MultipleChoiceRecords:
    """The questions of the files, read with the fields and the length of the run's recipe if it has one."""
    needs(evaluated, "choice", "choices", "multiple_choice")
    return MultipleChoiceRecords(
        paths, evaluated.tokenizer, evaluated.context, OptionFields.of(evaluated.examples), labeled=asked
    )


def read(evaluated: EvaluatedModel, items: MultipleChoiceRecords, progress: Progress) -> Iterator[HeadOutput]:
    """What the head says of each question's options."""
    objective = MultipleChoice(max_options=items.most, position="last" if where(evaluated) == "last" else "first")
    return readings(evaluated.model, objective, "choice", examples(items, progress), evaluated.vocab)


def answer(evaluated: EvaluatedModel, items: MultipleChoiceRecords, progress: Progress) -> Answers:
    """The place of the right option and of the one with the highest score, as text; "" for a tie."""
    places = [str(place) for place in range(items.most)]
    found = list(read(evaluated, items, progress))
    return [str(int(right)) for right, _ in found], [most_likely(places, scores.tolist()) for _, scores in found]


def wanted(evaluated: EvaluatedModel) -> InputSchema:
    """A text and its options: more than a line holds."""
    told = OptionFields.of(evaluated.examples)

    def line(text: str) -> dict[str, Any]:
        raise UserError("this task reads a text and its options, so lines of text are not enough: give JSON lines")

    return InputSchema(
        told.text_field,
        line,
        lambda record: [record.get(name) for name in (told.text_field, *told.option_fields)],
        told.column_names,
    )


def tell(evaluated: EvaluatedModel, items: MultipleChoiceRecords, progress: Progress) -> Iterator[dict[str, Any]]:
    """{"choice": the place from 0, "probability", "probabilities": one for each option}."""
    for i, (_, scores) in enumerate(read(evaluated, items, progress)):
        shares = [round(float(share), 6) for share in softmax(scores)][: len(items[i]["options"])]
        best = int(np.argmax(shares))
        yield {"choice": best, "probability": shares[best], "probabilities": shares}


MULTIPLE_CHOICE = Task(
    "multiple_choice",
    source,
    answer,
    {"accuracy": metrics.accuracy},
    majority_baseline=True,
    predict=tell,
    input_schema=wanted,
)
