"""Regression of labeled records with the head of a finetuned run, scored by the two correlations of STS-B.

The head of an exported model predicts in the units of the data, so its outputs need no rescaling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from firth.data.labeled import ScoredConfig
from firth.data.records import Records
from firth.evaluate import metrics
from firth.evaluate.heads import HeadOutput
from firth.evaluate.task import Answers, EvaluatedModel, HeadTask, Progress, Task
from firth.evaluate.tasks.classification import check_head, form, input_schema, readout_position
from firth.objectives.classification import Regression


def load(evaluated: EvaluatedModel, paths: Sequence[str], labeled: bool = True) -> Records:
    """Load records with the fields and the maximum length of the run's recipe, if it has one."""
    check_head(evaluated, "score", "numbers", "regression")
    return evaluated.records(ScoredConfig, paths, labeled)


def objective(evaluated: EvaluatedModel, items: Records) -> Regression:
    """Return the objective that reads the head."""
    return Regression(position=readout_position(evaluated), mean=0.0, std=1.0)


def respond(evaluated: EvaluatedModel, items: Records, progress: Progress) -> Answers:
    """Return the labels and the predictions."""
    found = list(HEAD.outputs(evaluated, items, progress))
    return items.column("label").whole.tolist(), [float(scores[0]) for _, scores in found]


def rows(evaluated: EvaluatedModel, items: Records, outputs: Iterator[HeadOutput]) -> Iterator[dict[str, Any]]:
    """Yield {"score"} for each text."""
    for _, scores in outputs:
        yield {"score": round(float(scores[0]), 6)}


HEAD = HeadTask("score", objective, rows)
REGRESSION = Task(
    "regression", load, respond,
    {"pearson": metrics.pearson, "spearman": metrics.spearman, "rmse": metrics.root_mean_square}, predict=HEAD.predict,
    input_schema=input_schema, route="classify", form=form, head=HEAD,
)  # fmt: skip
