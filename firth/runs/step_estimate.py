"""What an optimizer step of a recipe takes, before anything of the size of the model is allocated."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from firth.data.source import Source
from firth.model import flops
from firth.model.model import LM
from firth.model.transformer import TransformerStack
from firth.objectives.objective import Objective
from firth.peft.lora import num_trainable_parameters
from firth.runs.compatibility import available_memory
from firth.runs.recipe import ResolvedRecipe
from firth.training.checkpoint import weights
from firth.training.device import default_device
from firth.training.memory import StepMemory, memory_trace, trace_step, variety
from firth.training.optimizer import param_groups
from firth.types import PRECOMPUTED_FIELDS, Batch, UserError

MIN_TRACED = 6
"""Fewest steps that are run without data: the first has no optimizer state, and the heap grows over several."""


@dataclass(frozen=True)
class StepEstimate:
    """What an optimizer step takes.

    Args:
        parameters: All weights of the model and its heads, a shared one once.
        parameters_without_embeddings: The same without the tables of tokens, positions and token types (a tied LM head is
            the table of tokens).
        trained_parameters: Weights that are trained.
        tokens: Tokens of a step, without padding.
        flops: Counted FLOPs of a step.
        memory: Bytes at the peak of a step.
        checkpoint_bytes: Bytes of a checkpoint on disk.
        frozen_bytes: Bytes of further models that the run keeps (a reference model, a reward model).
    """

    parameters: int
    parameters_without_embeddings: int
    trained_parameters: int
    tokens: float
    flops: float
    memory: StepMemory
    checkpoint_bytes: int
    frozen_bytes: int = 0

    @property
    def flops_per_token(self) -> float:
        """Counted FLOPs per token."""
        return self.flops / self.tokens

    @property
    def six_n(self) -> float:
        """The common approximation of FLOPs per token: 6 N, N without embeddings (Kaplan 2020)."""
        return 6.0 * self.parameters_without_embeddings

    @property
    def peak_bytes(self) -> int:
        """Bytes at the peak of a single step, with further models."""
        return self.peak_of_run(1)

    def peak_of_run(self, steps: int) -> int:
        """Return the bytes at the peak of a run of some steps, with the kernels that the library compiles meanwhile."""
        return self.memory.peak_of_run(steps) + self.frozen_bytes


def count_parameters(model: LM) -> tuple[int, int]:
    """Return the number of weights of a model, with and without its embedding tables."""
    tables = [t.weight for t in (*model.embedding_tables().values(), model.source_places) if t is not None]
    total = sum(p.numel() for p in model.parameters())
    return total, total - sum(t.numel() for t in tables)


def step_estimate(
    build: Callable[[], LM],
    recipe: ResolvedRecipe,
    steps: Sequence[list[Batch]],
    frozen_bytes: int = 0,
    source: Source | None = None,
    run: Sequence[frozenset[Any]] = (),
) -> StepEstimate:
    """Return what a step of a recipe takes; nothing of the model's size is allocated.

    Args:
        build: Builds the model.
        recipe: The recipe.
        steps: The micro-batches of some steps: tokens and FLOPs are means over them. The memory is that of those with different
            shapes in this order: blocks of varied sizes leave holes.
        frozen_bytes: Bytes of further models that the run keeps.
        source: The source of the batches; an on-policy one runs its rollouts without data too.
        run: The `variety` of the first steps of a run.
    """
    objective = recipe.objective
    device = default_device()
    different = list({variety(objective, batches): batches for batches in steps}.values())
    traced = different * -(-MIN_TRACED // len(different))
    with memory_trace(device) as trace:
        with device:
            model = build()
        dropout = not objective.inputs & PRECOMPUTED_FIELDS
        memory = trace_step(trace, model, objective, recipe.optimizer, traced, recipe.precision, dropout, source, run)
    total, body = count_parameters(model)
    return StepEstimate(
        total,
        body,
        num_trainable_parameters(model),
        statistics.fmean(sum(flops.real_tokens(b) for b in batches) for batches in steps),
        step_flops(model, objective, steps),
        memory,
        checkpoint_bytes(model, recipe),
        frozen_bytes,
    )


def sharded_memory(build: Callable[[], LM], memory: StepMemory, degree: int) -> StepMemory:
    """Return the memory of a step on one of `degree` processes that share a model (`firth.training.sharding`).

    Each has its part of weights, gradients and optimizer state. The weights outside the blocks and those of two blocks are
    gathered at the peak, with a gradient of as many.

    Args:
        build: Builds the model.
        memory: That of a process with a whole model.
        degree: The processes that share a copy.
    """
    with memory_trace(default_device()), default_device():
        model = build()
    blocks = [
        sum(p.numel() for p in block.parameters())
        for stack in model.modules() if isinstance(stack, TransformerStack) for block in stack.blocks
    ]  # fmt: skip
    rest = sum(p.numel() for p in model.parameters()) - sum(blocks)
    gathered = 2 * 4 * (rest + 2 * max(blocks, default=0))
    whole = memory.weights + memory.gradients + memory.optimizer
    own = [size // degree for size in (memory.weights, memory.gradients, memory.optimizer)]
    activations = memory.activations + min(gathered, whole - sum(own))
    free = memory.free * sum(own) // max(1, whole)  # blocks of 1 MB or more are returned when they are freed
    return dataclasses.replace(
        memory, weights=own[0], gradients=own[1], optimizer=own[2], activations=activations, free=free
    )


def step_flops(model: LM, objective: Objective, steps: Sequence[list[Batch]]) -> float:
    """Return the counted FLOPs of a step, the mean over some steps."""
    return statistics.fmean(sum(objective.flops(model, b) for b in batches) for batches in steps)


def checkpoint_bytes(model: LM, recipe: ResolvedRecipe) -> int:
    """Return the bytes of a checkpoint: the trained weights, and one (Muon) or two (AdamW) numbers for each."""
    state = sum(4 * p.parameter.numel() * (1 if p.muon else 2) for p in param_groups(recipe.optimizer, model))
    return state + sum(x.numel() * x.element_size() for x in weights(model).values())


def _positions(batch: Batch) -> int:
    """Return the positions of a batch, with padding, in all its rows."""
    return sum(batch[name].numel() for name in ("tokens", "source_tokens", "memory_tokens") if name in batch)


def check_fits(estimate: StepEstimate, device: torch.device, steps: int = 1) -> None:
    """Raise a UserError if a step needs more memory than is free."""
    needed = estimate.peak_of_run(steps)
    name, free = list(available_memory(device).items())[-1]
    if needed > free:
        parts = estimate.memory
        raise UserError(
            f"the run needs about {needed / 1e9:,.1f} GB of {name} at its peak (weights "
            f"{parts.weights / 1e9:,.1f}, gradients {parts.gradients / 1e9:,.1f}, optimizer {parts.optimizer / 1e9:,.1f}, "
            f"activations {parts.activations / 1e9:,.1f}), and {free / 1e9:,.1f} GB are free: lower batch.size, raise "
            "batch.gradient_accumulation_steps, set gradient_checkpointing=true or take a smaller model"
        )


def certainly_fits(recipe: ResolvedRecipe, batches: Sequence[Batch], device: torch.device) -> bool:
    """Return whether a generous bound of a step's memory is free, so that it need not be found out.

    The bound has 16 bytes a weight, and of each position 4 bytes of 40 vectors and 8 MLP vectors in each layer, of its
    attention weights, and of five rows of logits.
    """
    config = recipe.model
    positions = max(_positions(batch) for batch in batches)
    length = max(batch["tokens"].shape[-1] for batch in batches)
    layers = config.num_layers + config.encoder.num_layers
    numbers = layers * (40 * config.hidden_size + 8 * config.intermediate_size + 4 * config.num_heads * length)
    bound = 32 * config.num_parameters() + 4 * positions * (numbers + 5 * config.vocab_size)
    return bound < min(available_memory(device).values())
