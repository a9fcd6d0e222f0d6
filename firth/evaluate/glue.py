"""The GLUE score (Wang 2018, section 4): the mean over tasks of each task's own numbers, themselves a mean where it has two.

>>> rounded = score({"cola": {"matthews": 0.5}, "mrpc": {"accuracy": 0.8, "f1": 0.9}, "stsb": {"pearson": 0.8, "spearman": 0.7}})
>>> round(rounded, 2)
70.0

AX is no task of the score. MNLI's two development sets are two numbers of one task. WNLI's is among them, as on the board.

    firth train glue:mnli init_from=MODEL data=MNLI/train.tsv "data.validation_path=[MNLI/dev_matched.tsv, MNLI/dev_mismatched.tsv]"
    firth evaluate runs/glue-mnli MNLI/dev_matched.tsv MNLI/dev_mismatched.tsv      accuracy and accuracy_mismatched
    firth evaluate runs/glue-cola runs/glue-mnli runs/glue-rte --task glue          the score of these runs' development files
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from firth.io.yaml_files import read_yaml
from firth.types import UserError

NUMBERS: dict[str, tuple[str, ...]] = {
    "cola": ("matthews",), "sst2": ("accuracy",), "mrpc": ("accuracy", "f1"), "stsb": ("pearson", "spearman"),
    "qqp": ("accuracy", "f1"), "mnli": ("accuracy", "accuracy_mismatched"), "qnli": ("accuracy",), "rte": ("accuracy",),
    "wnli": ("accuracy",),
}  # fmt: skip
"""Task -> the numbers that `firth evaluate` gives of it and that count."""


def score(found: Mapping[str, Mapping[str, float]]) -> float:
    """0 to 100, over the tasks that there are; state which, if not all nine. UserError for an unknown one."""
    each = []
    for task, numbers in found.items():
        if task not in NUMBERS:
            raise UserError(f"GLUE has no task {task!r}: it has {', '.join(NUMBERS)}")
        known = [numbers[name] for name in NUMBERS[task] if name in numbers]
        if not known:
            raise UserError(f"GLUE's {task} is scored by {' and '.join(NUMBERS[task])}: there is {', '.join(numbers)}")
        each.append(sum(known) / len(known))
    return 100 * sum(each) / len(each)


MISMATCHED = "mismatched"
"""What the name of MNLI's second development file has in it."""


def sets(recipe: Mapping[str, Any], paths: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files that are measured together, and those of MNLI's second development set.

    >>> sets({"name": "glue-mnli"}, ["dev_matched.tsv", "dev_mismatched.tsv"])
    (['dev_matched.tsv'], ['dev_mismatched.tsv'])
    """
    other = [path for path in paths if recipe.get("name") == "glue-mnli" and MISMATCHED in Path(path).name]
    return [path for path in paths if path not in other], other


def renamed(found: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of the second set under names of their own.

    >>> renamed({"accuracy": 0.5, "accuracy_interval": (0.4, 0.6)})
    {'accuracy_mismatched': 0.5, 'accuracy_mismatched_interval': (0.4, 0.6)}
    """
    cut = "_interval"
    return {f"{k.removesuffix(cut)}_{MISMATCHED}{cut if k.endswith(cut) else ''}": v for k, v in found.items()}


def board(runs: Sequence[Path], measure: Callable[[Path, Sequence[str]], Mapping[str, Any]]) -> dict[str, Any]:
    """The score of several runs, each measured on the files that its recipe holds out (`data.validation_path`), and what it is made of.

    Raises UserError for a run of no GLUE recipe, one without such files, and two runs of one task.
    """
    found: dict[str, dict[str, float]] = {}
    for run in runs:
        file = run / "recipe.yaml"
        recipe = read_yaml(file)[0] if file.is_file() else {}
        task = str(recipe.get("name", "")).removeprefix("glue-")
        if task not in NUMBERS:
            raise UserError(f"{run}: this is no run of a GLUE recipe (glue:{', glue:'.join(NUMBERS)})")
        files = recipe["data"]["validation_path"]
        if not files:
            raise UserError(f"{run}: this run held out no development file: train it with data.validation_path=dev.tsv")
        if task in found:
            raise UserError(f"{run}: there is another run of {task}, and the score has one of each task")
        numbers = measure(run, files)
        found[task] = {name: float(numbers[name]) for name in NUMBERS[task] if name in numbers}
    each = {f"{task}_{name}": value for task, numbers in found.items() for name, value in numbers.items()}
    lacking = [task for task in NUMBERS if task not in found]
    return {"score": score(found), "tasks": list(found), **({"lacking": lacking} if lacking else {}), **each}
