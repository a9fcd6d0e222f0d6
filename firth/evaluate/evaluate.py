"""Evaluate a run or a model directory on a task.

    evaluate(Path("runs/gpt"), ["held-out/"])               {"task": "likelihood", "bits_per_byte": 2.31, ...}
    evaluate(Path("runs/verse"), ["held-out.jsonl"])        {"task": "classification", "accuracy": 0.75, ...}

The default task follows from the heads of the model: a classification head has "classification", a reward head
"preferences", an LM head trained as seq2seq "generation", any other LM head "likelihood", or "generation" where it was
trained on dialogues and the files hold dialogues. `task` overrides the default.

The GLUE score (Wang 2018, section 4) is the mean over tasks; a task with two metrics contributes their mean.

>>> rounded = glue_score({"cola": {"matthews": 0.5}, "mrpc": {"accuracy": 0.8, "f1": 0.9}, "stsb": {"pearson": 0.8, "spearman": 0.7}})
>>> round(rounded, 2)
70.0

AX is not part of the score. MNLI's two development sets are two metrics of one task. WNLI is included, as on the leaderboard.

    firth train glue:mnli init_from=MODEL data=MNLI/train.tsv "data.validation_path=[MNLI/dev_matched.tsv, MNLI/dev_mismatched.tsv]"
    firth evaluate runs/glue-mnli MNLI/dev_matched.tsv MNLI/dev_mismatched.tsv      accuracy and accuracy_mismatched
    firth evaluate runs/glue-cola runs/glue-mnli runs/glue-rte --task glue          the score on the development files of these runs
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from firth.evaluate import tasks
from firth.evaluate.task import EvaluatedModel, Progress, load_evaluated_model
from firth.evaluate.tasks.likelihood import likelihood
from firth.io.yaml_files import read_yaml
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
        return {"task": task} | _limit_entry(limit) | glue_board([directory, *map(Path, paths)], limited)
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
        matched, mismatched = split_mnli(evaluated.recipe, paths)
        found = chosen.run(evaluated, matched, progress, limit) if matched else {}
        if mismatched:
            found |= with_mismatched_names(chosen.run(evaluated, mismatched, progress, limit))
    return {"task": task} | _limit_entry(limit) | found


def _limit_entry(limit: int | None) -> dict[str, Any]:
    return {} if limit is None else {"limit": limit}


GLUE_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",), "sst2": ("accuracy",), "mrpc": ("accuracy", "f1"), "stsb": ("pearson", "spearman"),
    "qqp": ("accuracy", "f1"), "mnli": ("accuracy", "accuracy_mismatched"), "qnli": ("accuracy",), "rte": ("accuracy",),
    "wnli": ("accuracy",),
}  # fmt: skip
"""Task -> metrics of `firth evaluate` that count in the score."""


def glue_score(found: Mapping[str, Mapping[str, float]]) -> float:
    """Return the score, 0 to 100, over the tasks present.

    Args:
        found: Metrics of each task. With fewer than nine tasks, report which tasks the score covers.

    Raises:
        UserError: A task is unknown, or has none of its metrics.
    """
    each = []
    for task, values in found.items():
        if task not in GLUE_METRICS:
            raise UserError(f"GLUE has no task {task!r}: its tasks are {', '.join(GLUE_METRICS)}")
        known = [values[name] for name in GLUE_METRICS[task] if name in values]
        if not known:
            raise UserError(
                f"GLUE's {task} is scored by {' and '.join(GLUE_METRICS[task])}, but the metrics are {', '.join(values)}"
            )
        each.append(sum(known) / len(known))
    return 100 * sum(each) / len(each)


MISMATCHED = "mismatched"
"""Part of the name of MNLI's second development file."""


def split_mnli(recipe: Mapping[str, Any], paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split paths into those of MNLI's mismatched development set (second) and all others (first).

    >>> split_mnli({"name": "glue-mnli"}, ["dev_matched.tsv", "dev_mismatched.tsv"])
    (['dev_matched.tsv'], ['dev_mismatched.tsv'])
    """
    other = [path for path in paths if recipe.get("name") == "glue-mnli" and MISMATCHED in Path(path).name]
    return [path for path in paths if path not in other], other


def with_mismatched_names(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return metrics of the mismatched set under names that end in "_mismatched".

    >>> with_mismatched_names({"accuracy": 0.5, "accuracy_interval": (0.4, 0.6)})
    {'accuracy_mismatched': 0.5, 'accuracy_mismatched_interval': (0.4, 0.6)}
    """
    end = "_interval"
    return {f"{k.removesuffix(end)}_{MISMATCHED}{end if k.endswith(end) else ''}": v for k, v in found.items()}


def glue_board(runs: Sequence[Path], measure: Callable[[Path, Sequence[str]], Mapping[str, Any]]) -> dict[str, Any]:
    """Return the GLUE score of several runs, each evaluated on its own validation files (`data.validation_path`).

    Args:
        runs: Run directories of GLUE recipes, one per task.
        measure: Evaluates a run directory on files.

    Returns:
        "score", "tasks", "missing_tasks" (tasks without a run) and the metrics as TASK_METRIC.

    Raises:
        UserError: A run is not of a GLUE recipe or has no validation files, or two runs have one task.
    """
    found: dict[str, dict[str, float]] = {}
    for run in runs:
        file = run / "recipe.yaml"
        recipe = read_yaml(file)[0] if file.is_file() else {}
        task = str(recipe.get("name", "")).removeprefix("glue-")
        if task not in GLUE_METRICS:
            raise UserError(f"{run}: this is not a run of a GLUE recipe (glue:{', glue:'.join(GLUE_METRICS)})")
        files = recipe["data"]["validation_path"]
        if not files:
            raise UserError(f"{run}: this run has no validation file: train it with data.validation_path=dev.tsv")
        if task in found:
            raise UserError(f"{run}: another run has the task {task} already; give one run for each task")
        values = measure(run, files)
        found[task] = {name: float(values[name]) for name in GLUE_METRICS[task] if name in values}
    each = {f"{task}_{name}": value for task, values in found.items() for name, value in values.items()}
    missing = [task for task in GLUE_METRICS if task not in found]
    return {"score": glue_score(found), "tasks": list(found), **({"missing_tasks": missing} if missing else {}), **each}
