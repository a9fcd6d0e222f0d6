"""The tasks that `evaluate` knows by name, and which of them a model's part answers unasked."""

from __future__ import annotations

from firth.evaluate.task import Task
from firth.evaluate.tasks.answers import ANSWERS
from firth.evaluate.tasks.choices import CHOICES
from firth.evaluate.tasks.classification import CLASSIFICATION
from firth.evaluate.tasks.comparisons import COMPARISONS
from firth.evaluate.tasks.multiple_choice import MULTIPLE_CHOICE
from firth.evaluate.tasks.regression import REGRESSION
from firth.evaluate.tasks.spans import SPANS
from firth.evaluate.tasks.tagging import TAGGING
from firth.evaluate.tasks.written import SUMMARIES, TRANSLATION

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        CLASSIFICATION,
        REGRESSION,
        MULTIPLE_CHOICE,
        TAGGING,
        SPANS,
        COMPARISONS,
        CHOICES,
        ANSWERS,
        TRANSLATION,
        SUMMARIES,
    )
}

DEFAULTS = {
    "classes": CLASSIFICATION.name, "score": REGRESSION.name, "choice": MULTIPLE_CHOICE.name, "tags": TAGGING.name,
    "span": SPANS.name, "reward": COMPARISONS.name, "lm": "likelihood",
}  # fmt: skip
"""Part of a model -> the task that it is there for, in the order in which they are looked for."""
