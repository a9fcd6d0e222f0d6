"""Regression of labeled records with the head of a finetuned run, scored by the two correlations of STS-B.

The head of an exported model predicts in the units of the data, so its outputs need no rescaling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from firth.data.labeled import ScoredConfig
from firth.data.records import Records
from firth.evaluate import metrics
from firth.evaluate.heads import HeadOutput, head_outputs
from firth.evaluate.task import Answers, EvaluatedModel, Progress, Task
from firth.evaluate.tasks.classification import check_head, examples, input_schema, readout_position
from firth.objectives.classification import Regression


def load(evaluated: EvaluatedModel, paths: Sequence[str], labeled: bool = True) -> Records:
    """Load records with the fields and the maximum length of the run's recipe, if it has one."""
    check_head(evaluated, "score", "numbers", "regression")
    return evaluated.records(ScoredConfig, paths, labeled)


def read(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Iterator[HeadOutput]:
    """Yield the label and the prediction of each text."""
    objective = Regression(position=readout_position(evaluated), mean=0.0, std=1.0)
    return head_outputs(evaluated.model, objective, "score", examples(items, progress), evaluated.vocab)


def respond(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return the labels and the predictions."""
    found = list(read(evaluated, items, progress))
    return items.column("label").whole.tolist(), [float(scores[0]) for _, scores in found]


def predict(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Iterator[dict[str, Any]]:
    """Yield {"score"} for each text."""
    for _, scores in read(evaluated, items, progress):
        yield {"score": round(float(scores[0]), 6)}


REGRESSION = Task(
    "regression", load, respond,
    {"pearson": metrics.pearson, "spearman": metrics.spearman, "rmse": metrics.root_mean_square}, predict=predict,
    input_schema=input_schema,
)  # fmt: skip
