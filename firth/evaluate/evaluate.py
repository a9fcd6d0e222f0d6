"""Evaluate a run or a model directory on a task.

    evaluate(Path("runs/gpt"), ["held-out/"])               {"task": "likelihood", "bits_per_byte": 2.31, ...}
    evaluate(Path("runs/verse"), ["held-out.jsonl"])        {"task": "classification", "accuracy": 0.75, ...}

The default task follows from the heads of the model: a classification head has "classification", a reward head
"preferences", an LM head trained as seq2seq "generation", any other LM head "likelihood", or "generation" where it was
trained on dialogues and the files hold dialogues. `task` overrides the default.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from firth.evaluate import glue, tasks
from firth.evaluate.perplexity import likelihood
from firth.evaluate.task import EvaluatedModel, Progress, load_evaluated_model
from firth.types import UserError


def evaluate(
    directory: Path,
    paths: Sequence[str],
    *,
    task: str | None = None,
    limit: int | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Evaluate the model of a run or model directory on files.

    Args:
        directory: A run or model directory.
        paths: Files or directories of text or records; run directories for the task "glue".
        task: A name of `firth.evaluate.tasks.TASKS`, a user's `module:TASK`, "likelihood" or "glue"; None for the default of the model.
        limit: Most tokens that "likelihood" scores, spread over the text; most records, the first ones, for other tasks.
        progress: Called with the share done, 0 to 1.

    Returns:
        Metrics by name.

    Raises:
        UserError: The directory holds no model, the files hold no item, or the model does not support the task.
    """
    if task == "glue":  # the other paths are runs as well
        limited = functools.partial(evaluate, limit=limit)
        return {"task": task} | _limit_entry(limit) | glue.board([directory, *map(Path, paths)], limited)
    return evaluate_model(load_evaluated_model(directory), paths, task=task, limit=limit, progress=progress)


def evaluate_model(
    evaluated: EvaluatedModel,
    paths: Sequence[str],
    *,
    task: str | None = None,
    limit: int | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Evaluate a loaded model on any task but "glue"; arguments and result are those of `evaluate`."""
    task = tasks.default_for(evaluated, paths) if task is None else task
    if not task:
        heads = ", ".join(evaluated.model.heads) or "none"
        raise UserError(
            f"{evaluated.directory}: this model has no head that a task reads (heads: {heads}): give --task"
        )
    if task == "likelihood":
        found = likelihood(evaluated, paths, limit, progress)
    else:
        chosen = tasks.find(task)
        matched, mismatched = glue.split_mnli(evaluated.recipe, paths)
        found = chosen.run(evaluated, matched, progress, limit) if matched else {}
        if mismatched:
            found |= glue.with_mismatched_names(chosen.run(evaluated, mismatched, progress, limit))
    return {"task": task} | _limit_entry(limit) | found


def _limit_entry(limit: int | None) -> dict[str, Any]:
    return {} if limit is None else {"limit": limit}
