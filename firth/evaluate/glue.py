"""GLUE score (Wang 2018, section 4): the mean over tasks; a task with two metrics contributes their mean.

>>> rounded = score({"cola": {"matthews": 0.5}, "mrpc": {"accuracy": 0.8, "f1": 0.9}, "stsb": {"pearson": 0.8, "spearman": 0.7}})
>>> round(rounded, 2)
70.0

AX is not part of the score. MNLI's two development sets are two metrics of one task. WNLI is included, as on the leaderboard.

    firth train glue:mnli init_from=MODEL data=MNLI/train.tsv "data.validation_path=[MNLI/dev_matched.tsv, MNLI/dev_mismatched.tsv]"
    firth evaluate runs/glue-mnli MNLI/dev_matched.tsv MNLI/dev_mismatched.tsv      accuracy and accuracy_mismatched
    firth evaluate runs/glue-cola runs/glue-mnli runs/glue-rte --task glue          the score on the development files of these runs
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from firth.io.yaml_files import read_yaml
from firth.types import UserError

TASK_METRICS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",), "sst2": ("accuracy",), "mrpc": ("accuracy", "f1"), "stsb": ("pearson", "spearman"),
    "qqp": ("accuracy", "f1"), "mnli": ("accuracy", "accuracy_mismatched"), "qnli": ("accuracy",), "rte": ("accuracy",),
    "wnli": ("accuracy",),
}  # fmt: skip
"""Task -> metrics of `firth evaluate` that count in the score."""


def score(found: Mapping[str, Mapping[str, float]]) -> float:
    """Return the score, 0 to 100, over the tasks present.

    Args:
        found: Metrics of each task. With fewer than nine tasks, report which tasks the score covers.

    Raises:
        UserError: A task is unknown, or has none of its metrics.
    """
    each = []
    for task, values in found.items():
        if task not in TASK_METRICS:
            raise UserError(f"GLUE has no task {task!r}: its tasks are {', '.join(TASK_METRICS)}")
        known = [values[name] for name in TASK_METRICS[task] if name in values]
        if not known:
            raise UserError(
                f"GLUE's {task} is scored by {' and '.join(TASK_METRICS[task])}, but the metrics are {', '.join(values)}"
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


def board(runs: Sequence[Path], measure: Callable[[Path, Sequence[str]], Mapping[str, Any]]) -> dict[str, Any]:
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
        if task not in TASK_METRICS:
            raise UserError(f"{run}: this is not a run of a GLUE recipe (glue:{', glue:'.join(TASK_METRICS)})")
        files = recipe["data"]["validation_path"]
        if not files:
            raise UserError(f"{run}: this run has no validation file: train it with data.validation_path=dev.tsv")
        if task in found:
            raise UserError(f"{run}: another run has the task {task} already; give one run for each task")
        values = measure(run, files)
        found[task] = {name: float(values[name]) for name in TASK_METRICS[task] if name in values}
    each = {f"{task}_{name}": value for task, values in found.items() for name, value in values.items()}
    missing = [task for task in TASK_METRICS if task not in found]
    return {"score": score(found), "tasks": list(found), **({"missing_tasks": missing} if missing else {}), **each}
