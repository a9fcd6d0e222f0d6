"""Start a run from a checkpoint of another run whose steps up to there are the same.

A run with warmup-stable-decay has a constant learning rate for most of its length. Two such runs of different length, with a
warmup in steps, take the same steps until the shorter one decays. So the longer one may begin with a checkpoint of the
shorter one, and equals, bit for bit, the run that trains from step 0 (Haegele et al. 2024, section 4: a decay per budget).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from firth.runs.input_hashes import recorded
from firth.runs.recipe import ResolvedRecipe, load_resolved
from firth.runs.run_context import RunContext, RunIdentity
from firth.training import checkpoint
from firth.types import UserError

FREE = ("name", "budget", "schedule", "evaluation", "checkpoint", "loggers", "sample_prompts")
"""Fields that the two recipes may differ in."""


def start_from_checkpoint(path: Path, resolved: ResolvedRecipe, context: RunContext, identity: RunIdentity) -> None:
    """Copy a checkpoint of another run into a run directory that has none.

    Args:
        path: The checkpoint, RUN/checkpoints/step-N.
        resolved: The recipe of the new run.
        context: The new run.
        identity: Its hashes.

    Raises:
        UserError: The other run differs in its model, data, batches or optimizer, or its learning rate was another in a step.
    """
    other, saved = load_resolved(path.parents[1]), checkpoint.load(path)
    same = dataclasses.replace(other, **{name: getattr(resolved, name) for name in FREE})
    changed = [f.name for f in dataclasses.fields(same) if getattr(same, f.name) != getattr(resolved, f.name)]
    if recorded(path.parents[1]).get("inputs") != context.inputs.digests | context.inputs.functions:
        changed.append("content of its inputs")
    if changed:
        raise UserError(
            f"{path} cannot be the beginning of this run, which has another {' and '.join(changed)}: start from step 0"
        )
    for step in range(int(saved.state["step"])):
        if _factor(other, step) != _factor(resolved, step):
            raise UserError(
                f"{path} cannot be the beginning of this run, whose learning rate is another in step {step + 1}: give both runs "
                "schedule.kind=wsd and the same schedule.warmup_steps, and branch before the decay"
            )
    checkpoint.copy_to(saved, context.directory, identity.run)


def _factor(recipe: ResolvedRecipe, step: int) -> float:
    """Return the factor on the learning rates in a step, as the trainer computes it for a budget in steps."""
    return recipe.schedule.factor(recipe.budget.passed(step + 0.5, 0.0), step)
