"""Time of a training step on this machine: from real steps, or for a large model from those of a smaller one.

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
from collections.abc import Callable
from dataclasses import dataclass

import torch

from firth import __version__
from firth.data.collate import Batches
from firth.model.model import LM
from firth.objectives import name_of
from firth.objectives.objective import components
from firth.peft.lora import num_trainable_parameters
from firth.runs import config_io
from firth.runs.compatibility import available_memory
from firth.runs.recipe import ResolvedRecipe
from firth.training import speed
from firth.training.device import casts, default_device, flush_denormals, keep_freed_memory
from firth.training.optimizer import Optimizer
from firth.training.prefetch import Prefetcher
from firth.training.step import step as gradients
from firth.training.step import to
from firth.types import PRECOMPUTED_FIELDS

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
        return self.others > speed.BUSY_SHARE * speed.usable_cores()

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
    peak = speed.machine_peak(device.type, recipe.precision)
    expected = step_flops / (ASSUMED_UTILIZATION * peak)
    fits = peak_bytes < min(available_memory(device).values()) / 2
    if fits and (expected < MAX_STEP_SECONDS or recipe.init_from):
        times, when = _timed(build, recipe, batches, step_flops)
        if times.busy:
            when += f", while other processes used {times.others:.1f} of {speed.usable_cores()} cores"
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
    return step_flops / per_flop + recipe.model.num_parameters() / per_weight, how


def _timed(build: Build, recipe: ResolvedRecipe, batches: Batches, step_flops: float) -> tuple[StepTimes, str]:
    """Return the times of steps of a recipe's model, recorded or measured now, and when they were recorded.

    Recorded ones of a busy machine are measured again, and the faster ones count.
    """
    settings = config_io.to_dict(recipe)
    # The counted FLOPs stand for the data: other lengths of its examples give others.
    key = [__version__, f"{step_flops:.2g}", *(settings[name] for name in STEP_SETTINGS)]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    known = speed.recorded_in(STEPS_FILE, name)
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
    speed.record_in(STEPS_FILE, name, facts | dataclasses.asdict(times))
    return times, ""


def _fastest(name: str, measured: float) -> float:
    """Record a speed if it is the highest so far and return the highest: other work on the machine can only lower one."""
    fastest = max(measured, speed.recorded(name) or 0.0)
    speed.record(name, fastest)
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
        began, load = time.perf_counter(), speed.LoadMeter()
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
                began, load = time.perf_counter(), speed.LoadMeter()
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
