"""The tasks that `evaluate` knows by name, and which of them a model's part answers unasked."""

from __future__ import annotations

from firth.evaluate.task import Task
from firth.evaluate.tasks.answers import ANSWERS
from firth.evaluate.tasks.choices import CHOICES
from firth.evaluate.tasks.classification import CLASSIFICATION
from firth.evaluate.tasks.comparisons import COMPARISONS

TASKS: dict[str, Task] = {task.name: task for task in (CLASSIFICATION, COMPARISONS, CHOICES, ANSWERS)}

DEFAULTS = {"classes": CLASSIFICATION.name, "reward": COMPARISONS.name, "lm": "likelihood"}
"""Part of a model -> the task that it is there for, in the order in which they are looked for."""
