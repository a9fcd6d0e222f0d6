"""Build the model of a run: architecture, weights of the start model, adapters, label frequencies in the LM head."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from firth.data.collate import Batches
from firth.generate import embeddings
from firth.model.init import init_head_from_frequencies, record_init
from firth.model.model import LM, compile_blocks
from firth.objectives.objective import Objective, supervised
from firth.pretrained.load_save import add_prefix_heads, init_from, init_from_model
from firth.runs.peft_options import FullFinetuning
from firth.runs.prepare import RunData
from firth.runs.recipe import Recipe, ResolvedRecipe
from firth.runs.start_model import model_directory
from firth.training.device import default_device
from firth.training.distributed import Parallel
from firth.training.step import SINGLE, to
from firth.types import IGNORE, LogLine

if TYPE_CHECKING:
    from firth.model.init import Recorded
    from firth.training.distributed import Ranks
    from firth.training.sharding import Shards


@dataclass(frozen=True, eq=False)
class BuiltModel:
    """The model of a run.

    Args:
        model: The model, on the training device.
        added_heads: Names of the heads that the start model does not have.
        shards: The sharding of the model; None if each rank has a copy.
    """

    model: LM
    added_heads: list[str]
    shards: Shards | None = None


def builds_in_shards(recipe: Recipe) -> bool:
    """Return whether a sharded model is built in shards: not with adapters, added tokens, or embeddings of another model."""
    whole = recipe.init_embeddings_from or recipe.tokenizer.extend
    return not whole and isinstance(recipe.peft, FullFinetuning)


def assemble_model(resolved: ResolvedRecipe, data: RunData, log: LogLine, ranks: Ranks | None = None) -> BuiltModel:
    """Build the model on the training device, with the weights of the start model and the adapters of `peft`.

    Args:
        resolved: The recipe.
        data: The data of the run.
        log: Receives messages.
        ranks: The ranks that a model is sharded over, if the recipe shards it; None for one.
    """
    tokenizer, device = data.tokenizer, default_device()
    degree = 1 if ranks is None else resolved.distributed.degree(ranks)
    in_shards = degree > 1 and builds_in_shards(resolved)
    base = data.start.shape if in_shards else data.start.model
    with record_init() if in_shards else nullcontext() as record:
        model = LM(resolved.model, resolved.objective.heads(resolved.model))
        if base is not None:
            add_prefix_heads(model, base)
    shards = None
    if record is not None and ranks is not None:
        shards = _shard(model, data, ranks, degree, record)
    added: list[str] = []
    if base is not None:
        place = model_directory(resolved.init_from)
        dropped, added = init_from(model, place) if in_shards else init_from_model(model, base, place)
        changed = [f"{what} {', '.join(names)}" for what, names in (("drops", dropped), ("adds", added)) if names]
        log(f"{resolved.name} starts from {resolved.init_from}" + (f": {'; '.join(changed)}" if changed else ""))
        if "lm" in added:
            tied = ", tied to its token embeddings" if resolved.model.tie_embeddings else ""
            log(f"{resolved.init_from} has no LM head, so {resolved.name} begins with a new one{tied}")
    else:
        model.set_token_characters([tokenizer.token(i) for i in range(tokenizer.vocab.size)])
    if resolved.init_embeddings_from:
        loaded = embeddings.load_embeddings(model, model_directory(resolved.init_embeddings_from))
        log(f"{resolved.name} takes {loaded}; everything else is initialized at random")
    model.restrict_vocab(tokenizer.vocab)
    resolved.peft.apply(model, added, tokenizer, resolved.seed)
    for stack in model.stacks():
        stack.gradient_checkpointing = resolved.gradient_checkpointing
    if degree > 1 and ranks is not None and shards is None:
        shards = _shard(model, data, ranks, degree)
    if next(model.parameters()).device.type != device.type:
        model.to(device)
    if resolved.compile:
        compile_blocks(model)
    if shards is not None:
        log(f"{resolved.name}: each weight is sharded over {degree} processes")
    return BuiltModel(model, added, shards)


def _shard(model: LM, data: RunData, ranks: Ranks, degree: int, record: Recorded | None = None) -> Shards:
    """Shard a model over the ranks, and initialize it if it has only been recorded."""
    from firth.training.sharding import Shards  # which takes half a second

    return Shards(model, ranks, degree, default_device(), data.precision, record)


MAX_LABELS, MAX_STEPS = 500_000, 256
"""Labels to count, and the most steps to read for them."""

EXAMPLES = 64
"""Most examples of the first step whose hidden states are computed: as many as one CPU pass holds."""

LABELS = "labels"
"""The batch field of token labels."""


def init_head(model: LM, objective: Objective, batches: Batches, parallel: Parallel = SINGLE) -> int:
    """Initialize the LM head so that an untrained model predicts the label frequencies of the first steps.

    Labels of whole steps are counted, not only those of this rank or its first micro-batch, so the result is the same for any
    number of ranks and of gradient accumulation steps. Every rank builds the same examples, which takes as long as on one rank.

    Args:
        model: The model, with random weights.
        objective: The training objective.
        batches: The batches of the run.
        parallel: Runs the forward pass on the ranks.

    Returns:
        The number of labels counted; 0 if nothing was initialized, because the objective has no token labels or the head has
        no place for an offset (`firth.model.init`).
    """
    writer = model.language_model
    if LABELS not in objective.labels.values() or "lm" not in writer.heads:
        return 0
    counts = torch.zeros(model.config.vocab_size)
    for step in range(MAX_STEPS):
        labels = batches.batch(step, 0, batches.batch_size)[LABELS]
        counts += torch.bincount(labels[labels != IGNORE], minlength=len(counts))
        if counts.sum() >= MAX_LABELS:
            break
    example = to(batches.batch(0, 0, min(batches.batch_size, EXAMPLES)), next(model.parameters()).device)

    def read() -> torch.Tensor:
        hidden = objective.forward(model, example)["hidden"] if writer is model else writer(example)
        return supervised(hidden, example[LABELS])[0]

    return int(counts.sum()) if init_head_from_frequencies(writer, counts, lambda: parallel.forward(read)) else 0
