"""What an optimizer step of a recipe takes, before anything of the size of the model is allocated.

The time of a step is that of real steps on this machine, or for a large model of those of a smaller one.

A small product says little about a step: norms, attention, the optimizer and the data take their share, and it differs by
objective. So steps are timed: those of the real model where they take seconds, else of a model with the same width, fewer
layers and fewer rows, whose highest speed is kept in CACHE/speed.json by machine, precision, objective and size of the matrices.

Timed steps of the real model are kept in CACHE/steps.json, by machine, torch, firth and all settings that a step depends on. If
other processes used the machine meanwhile, the next dry run times them again, and the faster ones are kept.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from firth.data.collate import Batches
from firth.data.source import Source
from firth.model import flops
from firth.model.flops import num_parameters
from firth.model.model import LM
from firth.model.transformer import TransformerStack
from firth.objectives import name_of
from firth.objectives.objective import Objective, components
from firth.peft.lora import num_trainable_parameters
from firth.runs import config_io
from firth.runs.compatibility import available_memory
from firth.runs.recipe import ResolvedRecipe
from firth.training.checkpoint import weights
from firth.training.device import (
    BUSY_SHARE,
    LoadMeter,
    casts,
    default_device,
    flush_denormals,
    keep_freed_memory,
    machine_peak,
    record_in,
    record_speed,
    recorded_in,
    recorded_speed,
    usable_cores,
)
from firth.training.memory import StepMemory, memory_trace, trace_step, variety
from firth.training.optimizer import Optimizer, param_groups
from firth.training.step import Prefetcher, to
from firth.training.step import step as gradients
from firth.types import PRECOMPUTED_FIELDS, VERSION, Batch, UserError

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


def sharded_memory(build: Callable[[], LM], memory: StepMemory, degree: int, accumulates: bool = False) -> StepMemory:
    """Return the memory of a step on one of `degree` processes that share a model (`firth.training.sharding`).

    Each has its part of weights, gradients and optimizer state. The weights outside the blocks and those of two blocks are
    gathered at the peak, with a gradient of as many. Between micro-batches each process keeps the gradient of the whole model.

    Args:
        build: Builds the model.
        memory: That of a process with a whole model.
        degree: The processes that share a copy.
        accumulates: Whether a step has several micro-batches.
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
    activations = memory.activations + min(gathered, whole - sum(own)) + accumulates * memory.gradients
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
    names = ("tokens", "source_tokens", "memory_tokens")  # with padding, in all rows
    positions = max(sum(batch[name].numel() for name in names if name in batch) for batch in batches)
    length = max(batch["tokens"].shape[-1] for batch in batches)
    layers = config.num_layers + config.encoder.num_layers
    numbers = layers * (40 * config.hidden_size + 8 * config.intermediate_size + 4 * config.num_heads * length)
    bound = 32 * num_parameters(config) + 4 * positions * (numbers + 5 * config.vocab_size)
    return bound < min(available_memory(device).values())


MAX_STEP_SECONDS = 6.0
"""Longest step of the real model that is timed, as expected at ASSUMED_UTILIZATION."""
ASSUMED_UTILIZATION = 0.25
TIMED_STEPS, TIMED_SECONDS = 2, 2.0
"""Fewest timed steps, and seconds after which no more are timed."""
MAX_TIMED_STEPS = 20
STEPS_FILE = "steps.json"
"""File of the cache with timed steps."""
STEP_SETTINGS = (
    "objective", "examples", "model", "peft", "batch", "optimizer", "distributed", "precision", "gradient_checkpointing"
)  # fmt: skip
"""Fields of a recipe that the time of a step depends on."""

LAYERS, WIDTH, TOKENS = 2, 2048, 2048
"""Most layers, hidden size and tokens of the smaller model: a wider matrix is no faster per FLOP."""

Build = Callable[[ResolvedRecipe], LM]


@dataclass(frozen=True)
class StepTimes:
    """Seconds of training steps.

    Args:
        per_flop: Seconds of data, forward and backward pass for each counted FLOP.
        optimizer: Seconds of the optimizer, gradient clipping included.
        rollouts: Seconds for sampling the answers of a step.
        steps: Number of timed steps.
        others: Cores that other processes used meanwhile.
    """

    per_flop: float
    optimizer: float
    rollouts: float
    steps: int
    others: float = 0.0

    @property
    def busy(self) -> bool:
        """Whether other processes slowed the steps."""
        return self.others > BUSY_SHARE * usable_cores()

    def seconds(self, step_flops: float) -> float:
        """Return the seconds of a step of some counted FLOPs."""
        return self.per_flop * step_flops + self.optimizer + self.rollouts


def step_seconds(
    build: Build, recipe: ResolvedRecipe, batches: Batches, step_flops: float, peak_bytes: int
) -> tuple[float, str]:
    """Return the seconds of a step, and how they were found, in a few words.

    Args:
        build: Builds the model of a recipe.
        recipe: The recipe.
        batches: Its batches.
        step_flops: Counted FLOPs of a step.
        peak_bytes: Bytes at the peak of a step.
    """
    device = default_device()
    peak = machine_peak(device.type, recipe.precision)
    expected = step_flops / (ASSUMED_UTILIZATION * peak)
    fits = peak_bytes < min(available_memory(device).values()) / 2
    if fits and (expected < MAX_STEP_SECONDS or recipe.init_from):
        times, when = _timed(build, recipe, batches, step_flops)
        if times.busy:
            when += f", while other processes used {times.others:.1f} of {usable_cores()} cores"
        return times.seconds(step_flops), f"{times.steps} timed steps of this model{when}"
    if recipe.init_from:
        return 0.0, "not measured, since the model does not fit into the free memory"
    smaller = _smaller(recipe)
    name = _calibration(smaller)
    model = build(smaller)
    times = time_steps(model, smaller, _fewer(batches, smaller))
    per_flop = _fastest(f"{name}: FLOP/s", 1 / times.per_flop)
    per_weight = _fastest(f"{name}: weights/s", num_trainable_parameters(model) / max(times.optimizer, 1e-9))
    how = "the fastest measured speed of a smaller model of the same width"
    return step_flops / per_flop + num_parameters(recipe.model) / per_weight, how


def _timed(build: Build, recipe: ResolvedRecipe, batches: Batches, step_flops: float) -> tuple[StepTimes, str]:
    """Return the times of steps of a recipe's model, recorded or measured now, and when they were recorded.

    Recorded ones of a busy machine are measured again, and the faster ones count.
    """
    settings = config_io.to_dict(recipe)
    # The counted FLOPs stand for the data: other lengths of its examples give others.
    key = [VERSION, f"{step_flops:.2g}", *(settings[name] for name in STEP_SETTINGS)]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    known = recorded_in(STEPS_FILE, name)
    fields = [field.name for field in dataclasses.fields(StepTimes)]
    before = None
    if isinstance(known, dict) and all(isinstance(known.get(field), int | float) for field in fields):
        before = StepTimes(**{field: known[field] for field in fields})
        if not before.busy:
            return before, f", timed on {known.get('date')}"
    times = time_steps(build(recipe), recipe, batches)
    if before is not None and before.seconds(step_flops) < times.seconds(step_flops):
        return before, f", timed on {known.get('date')}"
    facts = {"recipe": recipe.name, "date": time.strftime("%Y-%m-%d %H:%M")}
    record_in(STEPS_FILE, name, facts | dataclasses.asdict(times))
    return times, ""


def _fastest(name: str, measured: float) -> float:
    """Record a speed if it is the highest so far and return the highest: other work on the machine can only lower one."""
    fastest = max(measured, recorded_speed(name) or 0.0)
    record_speed(name, fastest)
    return fastest


def time_steps(model: LM, recipe: ResolvedRecipe, batches: Batches) -> StepTimes:
    """Time training steps as the trainer takes them, batches built by a thread included; the model is changed.

    Args:
        model: The model.
        recipe: Its recipe.
        batches: The batches.
    """
    keep_freed_memory()
    flush_denormals()
    objective, source = recipe.objective, batches.source
    device = next(model.parameters()).device
    cast = casts(recipe.precision, device)
    optimizer = Optimizer(recipe.optimizer, model, sparse=True)
    base = source.steps_per_rollout if source.on_policy else 0  # a dry run has filled the first rollout batch
    start = time.perf_counter()
    with cast():
        source.prepare(model, base)
    rollouts = (time.perf_counter() - start) / source.steps_per_rollout
    model.train(not objective.inputs & PRECOMPUTED_FIELDS)
    per_flop, updates = [], []
    with torch.random.fork_rng(), Prefetcher(batches.batches, enabled=not source.on_policy) as prefetcher:
        began, load = time.perf_counter(), LoadMeter()
        for number in range(1 + MAX_TIMED_STEPS):
            start = time.perf_counter()
            step = base + number
            found = prefetcher.take(step)
            prefetcher.begin(step + 1)
            work = sum(objective.flops(model, batch) for batch in found)
            placed = [to(batch, device) | {"step": torch.tensor(step)} for batch in found]
            losses = gradients(model, objective, placed, precision=cast)
            float(sum(losses.values()))  # waits for the device
            middle = time.perf_counter()
            float(optimizer.clip_grad_norm())
            optimizer.step(1.0)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:  # the first step sets up kernels and allocates
                per_flop.append((middle - start) / work)
                updates.append(time.perf_counter() - middle)
            else:
                began, load = time.perf_counter(), LoadMeter()
            if len(per_flop) >= TIMED_STEPS and time.perf_counter() - began > TIMED_SECONDS:
                break
        others = load.cores()
    return StepTimes(statistics.median(per_flop), statistics.median(updates), rollouts, len(per_flop), others)


def _smaller(recipe: ResolvedRecipe) -> ResolvedRecipe:
    """Return the recipe with at most LAYERS layers of width WIDTH and about TOKENS tokens a step."""
    config = recipe.model
    fields: dict[str, object] = {"num_layers": min(config.num_layers, LAYERS)}
    if config.encoder.num_layers:
        fields["encoder.num_layers"] = min(config.encoder.num_layers, LAYERS)
    if config.num_layer_groups:
        fields["num_layer_groups"] = 1
    if config.hidden_size > WIDTH:
        heads = max(1, WIDTH // config.head_dim)
        groups = max(1, config.num_heads // config.num_kv_heads)
        fields |= {
            "hidden_size": heads * config.head_dim, "num_heads": heads, "num_kv_heads": max(1, heads // groups),
            "intermediate_size": round(config.intermediate_size * heads * config.head_dim / config.hidden_size),
        }  # fmt: skip
    length = recipe.examples.max_tokens or config.max_positions
    rows = max(1, min(recipe.batch.size // recipe.batch.gradient_accumulation_steps, TOKENS // length))
    batch = dataclasses.replace(recipe.batch, size=rows, gradient_accumulation_steps=1)
    return dataclasses.replace(recipe, model=config.with_fields(fields), batch=batch)


def _fewer(batches: Batches, recipe: ResolvedRecipe) -> Batches:
    """Return the batches of a smaller recipe."""
    return Batches(
        batches.source, batches.objective, batches.vocab, batch_size=recipe.batch.size, seed=batches.seed,
        pack_to_length=recipe.batch.packed_length, group_by_length=recipe.batch.group_by_length,
    )  # fmt: skip


def _calibration(recipe: ResolvedRecipe) -> str:
    """Return the name of a recorded speed: what a step's speed depends on besides the machine."""
    config = recipe.model
    objective = "+".join(name_of(type(one)) for one in components(recipe.objective))
    matrices = f"{config.hidden_size}x{config.intermediate_size}x{config.vocab_size}"
    length = recipe.examples.max_tokens or config.max_positions
    return f"train {objective} {recipe.precision} {recipe.optimizer.name} {matrices} {recipe.batch.size}x{length}"
