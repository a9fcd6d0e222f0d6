"""Methods side by side: the pipeline `side_by_side` with the chosen methods, `firth compare --methods prompt,sft,best-of-n,ppo`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from firth.pipelines.pipeline import Pipeline, load_pipeline
from firth.types import UserError

TRAINED = ("dpo", "ppo", "grpo")
"""Methods that are stages of the pipeline, each trained from the finetuned model."""

METHODS = ("prompt", "sft", "best-of-n", *TRAINED)


def load_methods(methods: Sequence[str], assignments: Sequence[str], out: Path) -> Pipeline:
    """Return the pipeline `side_by_side` without the stages of other methods.

    The finetuned model and the reward model are always trained: the first is what the divergence is measured from, the second is the
    reward of the table.

    Args:
        methods: Names in `METHODS`.
        assignments: `INPUT=value` and `STAGE.field=value`.
        out: The directory of the stages.

    Raises:
        UserError: There is no such method, or a setting is wrong.
    """
    for name in methods:
        if name not in METHODS:
            raise UserError(f"there is no method {name!r}: choose from {', '.join(METHODS)}")
    if not methods:
        raise UserError(f"there is no method to compare: choose from {', '.join(METHODS)}")
    table = [f"table.frontier=[{', '.join(f'${name}' for name in TRAINED if name in methods)}]"]
    if "prompt" not in methods:
        table.append("table.prompt=''")
    if "best-of-n" not in methods:
        table.append("table.best_of=[]")
    return load_pipeline("side_by_side", [*table, *assignments], out, leave_out=set(TRAINED) - set(methods))
