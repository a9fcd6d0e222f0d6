"""What the phases of a run share: its directory, its ranks, its log and the hashes of its inputs.

A run may start from a checkpoint of another run whose steps up to there are the same (`start_from_checkpoint`). A run with
warmup-stable-decay has a constant learning rate for most of its length. Two such runs of different length, with a warmup in steps,
take the same steps until the shorter one decays. So the longer one may begin with a checkpoint of the shorter one, and equals, bit
for bit, the run that trains from step 0 (Haegele et al. 2024, section 4: a decay per budget).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from firth.io.integrity import COPY_AGAIN, known_hashes, learn_hashes, verify
from firth.io.safetensors import read_json
from firth.runs.input_hashes import RunInputs, content_hash, has_begun, recorded, recorded_hash
from firth.runs.recipe import Recipe, ResolvedRecipe, load_resolved
from firth.runs.start_model import model_directory
from firth.training import checkpoint
from firth.training.distributed import Ranks
from firth.types import LogLine, UserError


@dataclass(frozen=True)
class RunIdentity:
    """Hashes that tell whether a directory holds the same run.

    Args:
        recipe: Hash of the resolved recipe without its paths.
        run: Hash of the recipe and the content of its inputs, stored in checkpoints and in the exported model.
    """

    recipe: str
    run: str


@dataclass(frozen=True, eq=False)
class RunContext:
    """Directory, ranks, log and input hashes of a run.

    Args:
        directory: The run directory.
        ranks: The ranks of the run.
        log: Receives messages; it ignores them on all ranks but the first.
        inputs: Hashes of the inputs.
        resumed: Whether the directory held a checkpoint or a finished run at the start.
    """

    directory: Path
    ranks: Ranks
    log: LogLine
    inputs: RunInputs
    resumed: bool

    @staticmethod
    def open(recipe: Recipe, directory: Path, log: LogLine, ranks: Ranks) -> RunContext:
        """Hash the inputs of a run and compare them with those of the run in the directory.

        Raises:
            UserError: The directory holds a run with other inputs.
        """
        log = log if ranks.first else _silent
        inputs = RunInputs.read(recipe, directory, log) if ranks.first else RunInputs()
        if ranks.world > 1:
            found = json.loads(ranks.from_first(json.dumps(inputs.files)))
            inputs = inputs if ranks.first else RunInputs.read(recipe, directory, log, found)
        context = RunContext(directory, ranks, log, inputs, has_begun(directory))
        context.check_inputs()
        return context

    def check_inputs(self) -> None:
        """Raise a UserError if a run is resumed and an input that has been hashed is not that of its start."""
        if self.resumed:
            self.inputs.check(self.directory)

    def verify_models(self, paths: Iterable[str]) -> None:
        """Let the first rank verify the models in these run and model directories, whose files the others then need not read.

        Raises:
            UserError: A file is damaged.
        """
        for place in map(model_directory, filter(None, paths)):
            if self.ranks.first:
                verify(read_json(place / "firth.json"), place, place / "firth.json", COPY_AGAIN)
            learn_hashes(json.loads(self.ranks.from_first(json.dumps(known_hashes(place)))))

    def identify(self, resolved: ResolvedRecipe) -> RunIdentity:
        """Return the hashes of a run.

        Raises:
            UserError: The directory holds a run of another recipe.
        """
        recipe = recorded_hash(self.directory, resolved) if self.resumed else content_hash(resolved)
        return RunIdentity(recipe, self.inputs.identity(recipe))


def _silent(_: str) -> None:
    """Ignore a message: only the first rank prints."""


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
