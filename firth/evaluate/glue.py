"""The GLUE score (Wang 2018, section 4): the mean over tasks of each task's own numbers, themselves a mean where it has two.

>>> rounded = score({"cola": {"matthews": 0.5}, "mrpc": {"accuracy": 0.8, "f1": 0.9}, "stsb": {"pearson": 0.8, "spearman": 0.7}})
>>> round(rounded, 2)
70.0

AX is no task of the score. MNLI's two development sets are two numbers of one task. WNLI's is among them, as on the board.
"""

from __future__ import annotations

from collections.abc import Mapping

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
