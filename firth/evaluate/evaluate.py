"""Measure any run or model directory by a task.

    evaluate(Path("runs/gpt"), ["held-out/"])               {"task": "likelihood", "bits_per_byte": 2.31, ...}
    evaluate(Path("runs/verse"), ["held-out.jsonl"])        {"task": "classification", "accuracy": 0.75, ...}

What is asked follows from what the model was trained for: a head for classes answers "classification", a reward head
"comparisons", text to text "answers", another vocabulary head "likelihood", or "answers" where it was trained on dialogues and
the files hold some; `task` chooses another one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from firth.evaluate import glue
from firth.evaluate.task import EvaluatedModel, Progress, Say, load_evaluated_model
from firth.evaluate.tasks import TASKS, default_for
from firth.evaluate.text_perplexity import likelihood
from firth.types import UserError


def evaluate(
    directory: Path,
    paths: Sequence[str],
    *,
    task: str | None = None,
    limit: int | None = None,
    progress: Progress = lambda _: None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measure the model of a run or model directory on files; plain numbers by name.

    task: a name of `firth.evaluate.tasks.TASKS`, "likelihood", or "glue", of which the paths are runs as well; None chooses by
    what the model was trained for.
    limit: at most so many tokens are scored by "likelihood", spread over the text; other tasks read at most so many records, the
    first ones. progress: told the share done. say: told
    what was cut, mended or left out.
    Raises UserError where the directory holds no model, the files no item, or the model cannot do the task.
    """
    if task == "glue":  # the other paths are runs too
        limited = functools.partial(evaluate, limit=limit)
        return {"task": task} | _noted(limit) | glue.board([directory, *map(Path, paths)], limited)
    return measured(load_evaluated_model(directory), paths, task=task, limit=limit, progress=progress, say=say)


def measured(
    evaluated: EvaluatedModel,
    paths: Sequence[str],
    *,
    task: str | None = None,
    limit: int | None = None,
    progress: Progress = lambda _: None,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """`evaluate`, of a model that is open already and for all tasks but "glue"."""
    task = default_for(evaluated, paths) if task is None else task
    if not task:
        parts = ", ".join(evaluated.model.heads) or "no part"
        raise UserError(f"{evaluated.directory}: this model has {parts} and so nothing to measure: name a task")
    if task == "likelihood":
        found = likelihood(evaluated, paths, limit, progress, say)
    elif task in TASKS:
        here, other = glue.sets(evaluated.recipe, paths)
        found = TASKS[task].run(evaluated, here, progress, say, limit) if here else {}
        found |= glue.renamed(TASKS[task].run(evaluated, other, progress, say, limit)) if other else {}
    else:
        raise UserError(f"there is no task {task!r}; there is likelihood, {', '.join(TASKS)}, glue, objective")
    return {"task": task} | _noted(limit) | found


def _noted(limit: int | None) -> dict[str, Any]:
    return {} if limit is None else {"limit": limit}
