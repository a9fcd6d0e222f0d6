"""The tasks that `evaluate` knows by name, and which of them a model answers unasked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from firth.corpora.readers import first_record
from firth.data.conversations import comparison, messages_of
from firth.evaluate.task import EvaluatedModel, Task
from firth.evaluate.tasks.classification import CLASSIFICATION
from firth.evaluate.tasks.comparisons import PREFERENCES
from firth.evaluate.tasks.generation import GENERATION, writes_answers
from firth.evaluate.tasks.multiple_choice import MULTIPLE_CHOICE
from firth.evaluate.tasks.option_scoring import OPTION_SCORING
from firth.evaluate.tasks.question_answering import QUESTION_ANSWERING
from firth.evaluate.tasks.regression import REGRESSION
from firth.evaluate.tasks.text_generation import SUMMARIZATION, TRANSLATION
from firth.evaluate.tasks.token_classification import TOKEN_CLASSIFICATION
from firth.types import UserError

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        CLASSIFICATION,
        REGRESSION,
        MULTIPLE_CHOICE,
        TOKEN_CLASSIFICATION,
        QUESTION_ANSWERING,
        PREFERENCES,
        OPTION_SCORING,
        GENERATION,
        TRANSLATION,
        SUMMARIZATION,
    )
}

DEFAULTS = {
    "classes": CLASSIFICATION.name, "score": REGRESSION.name, "choice": MULTIPLE_CHOICE.name, "tags": TOKEN_CLASSIFICATION.name,
    "span": QUESTION_ANSWERING.name, "reward": PREFERENCES.name, "lm": "likelihood",
}  # fmt: skip
"""Part of a model -> the task that it is there for, in the order in which they are looked for."""

WRITTEN = "seq2seq"
"""The objective of a run that writes answers."""


def default(evaluated: EvaluatedModel) -> str:
    """The task that a model was trained for, by its run's objective and by its parts; empty where there is none."""
    if "lm" in evaluated.model.heads and evaluated.objective.get("kind") == WRITTEN:
        return GENERATION.name
    return next((name for part, name in DEFAULTS.items() if part in evaluated.model.heads), "")


def default_for(evaluated: EvaluatedModel, paths: Sequence[str]) -> str:
    """Return the default task of a model for files: "answers" in place of "likelihood" where they hold dialogues.

    Args:
        subject: The model.
        paths: Files or directories, of text or of records.

    Raises:
        UserError: The files hold dialogues and the model was not trained on any, or they hold preferences.
    """
    name = default(evaluated)
    found = first_record(paths) if name == "likelihood" and writes_answers(evaluated) else None
    if found is None or "text" in found[1]:
        return name
    place, record = found
    fields = f"{place}: this record has {', '.join(record)} and no `text`, whose likelihood is measured without --task"
    if _is_shaped(comparison, record):
        raise UserError(f"{fields}: choose --task objective for a run of dpo, or evaluate a run of reward")
    if not _is_shaped(messages_of, record):
        return name
    if not evaluated.is_chat_model:
        raise UserError(f"{fields}: choose --task answers to score what the model writes to each prompt")
    return GENERATION.name


def _is_shaped(reader: Callable[[Mapping[str, Any]], object], record: Mapping[str, Any]) -> bool:
    """Whether a record has the shape that a reader wants."""
    try:
        reader(record)
    except UserError:
        return False
    return True
