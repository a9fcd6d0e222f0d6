"""The tasks that `evaluate` knows by name, and which of them a model answers unasked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from firth.corpora.readers import first_record
from firth.data.conversations import comparison, messages_of
from firth.evaluate.task import Subject, Task
from firth.evaluate.tasks.classification import CLASSIFICATION
from firth.evaluate.tasks.comparisons import COMPARISONS
from firth.evaluate.tasks.generation import ANSWERS, writes_answers
from firth.evaluate.tasks.multiple_choice import MULTIPLE_CHOICE
from firth.evaluate.tasks.option_scoring import CHOICES
from firth.evaluate.tasks.question_answering import SPANS
from firth.evaluate.tasks.regression import REGRESSION
from firth.evaluate.tasks.text_generation import SUMMARIES, TRANSLATION
from firth.evaluate.tasks.token_classification import TAGGING
from firth.types import UserError

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


def default_for(subject: Subject, paths: Sequence[str]) -> str:
    """Return the default task of a model for files: "answers" in place of "likelihood" where they hold dialogues.

    Args:
        subject: The model.
        paths: Files or directories, of text or of records.

    Raises:
        UserError: The files hold dialogues and the model was not trained on any, or they hold preferences.
    """
    name = default(subject)
    found = first_record(paths) if name == "likelihood" and writes_answers(subject) else None
    if found is None or "text" in found[1]:
        return name
    place, record = found
    fields = f"{place}: this record has {', '.join(record)} and no `text`, whose likelihood is measured without --task"
    if _is_shaped(comparison, record):
        raise UserError(f"{fields}: choose --task objective for a run of dpo, or evaluate a run of reward")
    if not _is_shaped(messages_of, record):
        return name
    if not subject.talks:
        raise UserError(f"{fields}: choose --task answers to score what the model writes to each prompt")
    return ANSWERS.name


def _is_shaped(reader: Callable[[Mapping[str, Any]], object], record: Mapping[str, Any]) -> bool:
    """Whether a record has the shape that a reader wants."""
    try:
        reader(record)
    except UserError:
        return False
    return True
