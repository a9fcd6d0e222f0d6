"""The tasks that `evaluate` knows by name, and which of them a model answers unasked."""

from __future__ import annotations

from firth.evaluate.task import Subject, Task
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

WRITTEN = "text_to_text"
"""The objective of a run that writes answers."""


def default(subject: Subject) -> str:
    """The task that a model was trained for, by its run's objective and by its parts; empty where there is none."""
    if "lm" in subject.model.parts and subject.objective.get("kind") == WRITTEN:
        return ANSWERS.name
    return next((name for part, name in DEFAULTS.items() if part in subject.model.parts), "")
