"""Regression: records with a number through the head that a finetuned run has for it; STS-B's two correlations.

The head of an exported model tells numbers in the units of the data, so nothing is to be undone here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from firth.data.labeled import ScoredTexts, TextFields
from firth.evaluate import metrics
from firth.evaluate.heads import HeadOutput, readings
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task
from firth.evaluate.tasks.classification import examples, needs, texts, where
from firth.objectives.regression import Regression


def source(evaluated: EvaluatedModel, paths: Sequence[str], asked: bool = True) -> ScoredTexts:
    """The records of the files, read with the fields and the length of the run's recipe if it has one."""
    needs(evaluated, "score", "numbers", "regression")
    return ScoredTexts(paths, evaluated.tokenizer, evaluated.context, TextFields.of(evaluated.examples), labeled=asked)


def read(evaluated: EvaluatedModel, items: ScoredTexts, progress: Progress) -> Iterator[HeadOutput]:
    """What the head says of each text."""
    objective = Regression(position=where(evaluated), mean=0.0, std=1.0)
    return readings(evaluated.model, objective, "score", examples(items, progress), evaluated.vocab)


def answer(evaluated: EvaluatedModel, items: ScoredTexts, progress: Progress) -> Answers:
    """The number that the records have and the one that the head tells."""
    found = list(read(evaluated, items, progress))
    return items.scores.tolist(), [float(scores[0]) for _, scores in found]


def tell(evaluated: EvaluatedModel, items: ScoredTexts, progress: Progress) -> Iterator[dict[str, Any]]:
    """{"score"}."""
    for _, scores in read(evaluated, items, progress):
        yield {"score": round(float(scores[0]), 6)}


REGRESSION = Task(
    "regression", source, answer,
    {"pearson": metrics.pearson, "spearman": metrics.spearman, "rmse": metrics.root_mean_square}, predict=tell,
    input_schema=texts,
)  # fmt: skip
