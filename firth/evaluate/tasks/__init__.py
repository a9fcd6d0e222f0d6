"""Evaluation tasks by name, and the default task of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from firth.corpora.readers import first_record
from firth.data.conversations import comparison, messages_of
from firth.evaluate.prompting.task_files import builtin_names
from firth.evaluate.task import EvaluatedModel, Task
from firth.evaluate.tasks.classification import CLASSIFICATION
from firth.evaluate.tasks.generation import GENERATION, SUMMARIZATION, TRANSLATION, can_generate
from firth.evaluate.tasks.multiple_choice import MULTIPLE_CHOICE
from firth.evaluate.tasks.option_scoring import OPTION_SCORING
from firth.evaluate.tasks.preferences import PREFERENCES
from firth.evaluate.tasks.question_answering import QUESTION_ANSWERING
from firth.evaluate.tasks.regression import REGRESSION
from firth.evaluate.tasks.token_classification import TOKEN_CLASSIFICATION
from firth.io import user_code
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


def find(name: str) -> Task:
    """Return the task of a name, or what `module:name` names in a user's module.

    Raises:
        UserError: There is no such task.
    """
    if name in TASKS:
        return TASKS[name]
    if ":" not in name:
        raise UserError(
            f"there is no task {name!r}; the tasks are likelihood, {', '.join(TASKS)}, glue, objective; in prompts "
            f"{', '.join(builtin_names())}, a YAML file or a task.json of BIG-bench; one of your own is module:TASK"
        )
    found = user_code.find(name, "task")
    if not isinstance(found, Task):
        raise UserError(f"{name!r} is a {type(found).__name__} and no firth.evaluate.task.Task")
    return found


DEFAULTS = {
    "classes": CLASSIFICATION.name, "score": REGRESSION.name, "choice": MULTIPLE_CHOICE.name, "tags": TOKEN_CLASSIFICATION.name,
    "span": QUESTION_ANSWERING.name, "reward": PREFERENCES.name, "lm": "likelihood",
}  # fmt: skip
"""Head of a model -> its default task, in order of precedence."""

GENERATIVE_OBJECTIVE = "seq2seq"
"""Objective of a run whose default task is generation."""


def default_task(evaluated: EvaluatedModel) -> str:
    """Return the task that a model was trained for, by the objective of its run and by its heads; empty if there is none."""
    if "lm" in evaluated.model.heads and evaluated.objective.get("kind") == GENERATIVE_OBJECTIVE:
        return GENERATION.name
    return next((name for head, name in DEFAULTS.items() if head in evaluated.model.heads), "")


def default_for(evaluated: EvaluatedModel, paths: Sequence[str]) -> str:
    """Return the default task of a model for files: "generation" in place of "likelihood" if they hold dialogues.

    Args:
        evaluated: The model.
        paths: Files or directories, of text or of records.

    Raises:
        UserError: The files hold dialogues and the model was not trained on any, or they hold preferences.
    """
    name = default_task(evaluated)
    found = first_record(paths) if name == "likelihood" and can_generate(evaluated) else None
    if found is None or "text" in found[1]:
        return name
    location, record = found
    fields = f"{location}: this record has {', '.join(record)} but no `text`, which the default task (likelihood) needs"
    if _is_readable(comparison, record):
        raise UserError(f"{fields}: use --task objective for a run of dpo, or evaluate a run of reward_model")
    if not _is_readable(messages_of, record):
        return name
    if not evaluated.is_chat_model:
        raise UserError(f"{fields}: use --task generation to score the model's completions of the prompts")
    return GENERATION.name


def _is_readable(reader: Callable[[Mapping[str, Any]], object], record: Mapping[str, Any]) -> bool:
    """Return whether a reader accepts a record."""
    try:
        reader(record)
    except UserError:
        return False
    return True
