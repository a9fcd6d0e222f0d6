"""What a run will take before it starts: parameters, FLOPs, memory, tokens and time (`firth train RECIPE --dry-run`).

Nothing is computed by a second set of formulas. The recipe is resolved as `run` resolves it, in a temporary directory; real
batches are built; FLOPs are those that the trainer counts (`Objective.flops`); memory is that of the real step on tensors
without data (`firth.training.memory`); time is that of real steps, of a smaller model where the model is large.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from firth import kernel_choice
from firth.corpora import readers
from firth.corpora.input_files import GROWTH
from firth.data.collate import Batches
from firth.data.corpus import is_corpus
from firth.data.examples import DataConfig
from firth.io.gguf import find
from firth.io.json_files import row_line
from firth.model.model import LM
from firth.runs.build_model import assemble_model, builds_in_shards
from firth.runs.compatibility import available_memory
from firth.runs.input_hashes import RunInputs
from firth.runs.prepare import RunData
from firth.runs.recipe import Recipe, ResolvedRecipe
from firth.runs.report_texts import texts_of
from firth.runs.resolve import resolve
from firth.runs.run import build_data, check_start_models, prepare_tokenizer
from firth.runs.run_context import RunContext
from firth.runs.start_model import model_directory
from firth.runs.step_estimate import StepEstimate, check_fits, sharded_memory, step_estimate, step_seconds
from firth.training.device import default_device, utilization
from firth.training.distributed import Ranks, join
from firth.training.logging import clock, short
from firth.training.memory import MAX_READ_STEPS, variety
from firth.types import LOGGER, Batch, LogLine

SAMPLED_STEPS = 12
"""Most steps whose batches are built to count tokens and FLOPs and to trace the memory; a shorter run has fewer."""

READ_TOKENS = 1 << 20
"""Tokens of the batches that are read to find how many shapes a run has."""

MAX_COUNTED_BYTES, SAMPLE_BYTES, VALIDATION_BYTES = 64 << 20, 16 << 20, 1 << 20
"""Bytes of text up to which all of it is read, bytes of a sample of more, and most bytes of held-out text."""


@dataclass(frozen=True)
class RunEstimate:
    """What a run takes.

    Args:
        recipe: The resolved recipe.
        step: What a step takes.
        steps: Optimizer steps of the budget.
        tokens: Tokens of the budget.
        epochs: Passes over the training data.
        data_tokens: Tokens of the training data.
        step_seconds: Seconds of a step on this machine; 0 if it was not measured.
        data: How the data was counted, a sentence.
        timing: How the time was found, a sentence.
        whole: What holds the whole model on a process though it is sharded, a sentence; empty if it is not sharded.
    """

    recipe: ResolvedRecipe
    step: StepEstimate
    steps: int
    tokens: float
    epochs: float
    data_tokens: float
    step_seconds: float
    data: str
    timing: str
    whole: str = ""

    @property
    def flops(self) -> float:
        """Counted FLOPs of the budget."""
        return self.steps * self.step.flops

    @property
    def six_n_d(self) -> float:
        """6 N D of the budget."""
        return self.step.six_n * self.tokens

    @property
    def seconds(self) -> float:
        """Training time of the budget."""
        return self.steps * self.step_seconds


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """A resolved recipe and its data, prepared as for a run.

    Args:
        recipe: The resolved recipe.
        data: The data of the run.
        batches: The training batches.
        scale: Size of the whole data, as a multiple of what was read.
        counted: How the data was counted, a sentence.
        log: Receives messages.
        degree: Processes that share a copy of the model.
        texts: Whether the model answers held-out prompts for the report.
    """

    recipe: ResolvedRecipe
    data: RunData
    batches: Batches
    scale: float
    counted: str
    log: LogLine
    degree: int = 1
    texts: bool = False

    def build(self, recipe: ResolvedRecipe | None = None) -> LM:
        """Build the model of the recipe or of a smaller one, with random weights or those of the start model."""
        plain = dataclasses.replace(recipe or self.recipe, compile=False)
        return assemble_model(plain, self.data, _silent).model

    def sample(self) -> tuple[list[list[Batch]], int]:
        """Return the batches of some steps, and the bytes of models that the data source keeps."""
        kept = self.batches.source.rehearse()
        number = min(SAMPLED_STEPS, self.recipe.budget.max_steps or SAMPLED_STEPS)
        last = max(self.recipe.batch.group_by_length, number)
        return [self.batches.batches(i * last // number) for i in range(number)], kept

    def varieties(self) -> list[frozenset[Any]]:
        """Return what the shapes of products depend on in each of the first steps; nothing if the model itself writes the data."""
        if self.batches.source.on_policy:
            return []
        first = self.batches.batches(0)
        tokens = sum(batch["tokens"].numel() for batch in first)
        steps = max(SAMPLED_STEPS, min(MAX_READ_STEPS, READ_TOKENS // max(1, tokens)))
        objective = self.recipe.objective
        return [variety(objective, self.batches.batches(step)) for step in range(steps)]


@contextmanager
def prepared(recipe: Recipe, log: LogLine, world: int = 1) -> Iterator[PreparedRun]:
    """Prepare tokenizer and data as the first of `world` processes does, in a temporary directory that is deleted at the end.

    Raises:
        UserError: As `run`: the recipe is invalid.
    """
    kernel_choice.check_forced()
    check_start_models(recipe)
    with tempfile.TemporaryDirectory(prefix="firth-") as place, ExitStack() as stack:
        smaller, scale, how = _sampled(recipe, Path(place), log)
        if not recipe.examples.reads_documents:
            stack.enter_context(readers.every_nth_record(round(scale)))
        context = RunContext(Path(place), Ranks(world=world), _silent, RunInputs(), resumed=False)
        data = prepare_tokenizer(smaller, context)
        resolved = resolve(smaller, data, context)
        datasets = build_data(resolved, dataclasses.replace(data, ranks=Ranks()), context)  # one process samples
        degree = resolved.distributed.degree(context.ranks)
        texts = texts_of(resolved, datasets.splits) is not None
        yield PreparedRun(resolved, datasets.data, datasets.batches, scale, how, log, degree, texts)


def _sampled(recipe: Recipe, place: Path, log: LogLine) -> tuple[Recipe, float, str]:
    """Return the recipe with a sample of its text where that is large, the size of the whole relative to it, and a sentence.

    Of many records each n-th is sampled by `every_nth_record`, where n is the size of the whole.
    """
    data = dataclasses.replace(recipe.data, cache_dir="")
    recipe = dataclasses.replace(recipe, data=data)
    trained = "" if recipe.given_tokenizer else "the tokenizer was trained, and "
    counted = f"{trained}all of the data was read and counted"
    if not recipe.examples.reads_documents:
        total = sum(_sizes(data.paths(log), records=True).values())
        n = max(1, round(total / SAMPLE_BYTES)) if total > MAX_COUNTED_BYTES else 1
        if n > 1:
            counted = f"tokens were estimated from each {n}th record of {total / 1e6:,.0f} MB, the size of the files"
        return recipe, float(n), counted
    changed: dict[str, Any] = {}
    if data.validation_path and not any(map(is_corpus, data.validation_path)):
        held_out = _sizes(data.validation_path)
        if sum(held_out.values()) > VALIDATION_BYTES:
            _write_sample(held_out, place / "validation.jsonl", VALIDATION_BYTES, data)
            changed = {"validation_path": (str(place / "validation.jsonl"),)}
    paths, scale = data.paths(log), 1.0
    if any(map(is_corpus, paths)):
        return dataclasses.replace(recipe, data=dataclasses.replace(data, **changed)), scale, "the corpus is prepared"
    sizes = _sizes(paths)
    total = sum(sizes.values())
    if total > MAX_COUNTED_BYTES:
        written = _write_sample(sizes, place / "sample.jsonl", SAMPLE_BYTES, data)
        changed |= {"path": (str(place / "sample.jsonl"),), "corpus": "", "weights": ()}
        scale = total / max(written, 1)
        counted = (
            f"tokens were estimated from {written / 1e6:,.0f} MB of text of {total / 1e6:,.0f} MB, the size of the files"
            + (", and so was the tokenizer" if trained else "")
        )
    return dataclasses.replace(recipe, data=dataclasses.replace(data, **changed)), scale, counted


def _sizes(paths: Sequence[str], records: bool = False) -> dict[Path, float]:
    """Return the bytes of text of each file, of tables too if records are read, as far as its name and size tell."""
    return {path: path.stat().st_size * GROWTH.get(path.suffix, 1.0) for path in readers.files(paths, tabled=records)}


def _write_sample(sizes: Mapping[Path, float], target: Path, limit: int, data: DataConfig) -> int:
    """Write the beginning of each file, in proportion to its size, as records of its text, and return the bytes of text.

    Args:
        sizes: Bytes of each file.
        target: The file to write.
        limit: Most bytes of text, about.
        data: Says how the files are read.
    """
    written, due, piece = 0, 0.0, max(1, limit // 64)
    with target.open("w", encoding="utf-8") as file:
        for path, size in sizes.items():
            due += limit * size / sum(sizes.values())
            for document in readers.documents([str(path)], field=data.text_field, split=data.split_by):
                for start in range(0, len(document.text), piece):
                    if written < due:
                        text = document.text[start : start + piece]
                        file.write(row_line({data.text_field: text}))
                        written += len(text.encode())
                if written >= due:
                    break
    return written


def estimate(recipe: Recipe, timed: bool = True, log: LogLine = LOGGER.info, world: int = 1) -> RunEstimate:
    """Return what a run of a recipe takes, without training it.

    Args:
        recipe: The recipe.
        timed: Whether to find the time too, which runs some steps.
        log: Receives messages.
        world: Processes of the run. Memory and time are those of one of them, tokens and FLOPs those of all.

    Raises:
        UserError: As `run`: the recipe is invalid. A run that does not fit into the memory is estimated too, without time.
    """
    with prepared(recipe, log, world) as run:
        return estimate_prepared(run, timed)


def estimate_prepared(run: PreparedRun, timed: bool = True) -> RunEstimate:
    """Return what a prepared run takes; see `estimate`."""
    resolved = run.recipe
    sampled, kept = run.sample()
    step = step_estimate(run.build, resolved, sampled, kept, run.batches.source, run.varieties())
    world = run.batches.world
    if run.degree > 1:
        accumulates = resolved.batch.gradient_accumulation_steps > 1
        step = dataclasses.replace(step, memory=sharded_memory(run.build, step.memory, run.degree, accumulates))
    seconds, how = 0.0, "not measured"
    if timed:
        seconds, how = step_seconds(run.build, resolved, run.batches, step.flops, step.peak_bytes)
        how += f" on one of {world} processes, without communication" if world > 1 else ""
    step = dataclasses.replace(step, tokens=step.tokens * world, flops=step.flops * world)
    budget = resolved.budget
    steps = budget.max_steps
    if budget.max_flops:
        steps = max(1, round(budget.max_flops / step.flops))
    elif budget.max_seconds:
        steps = round(budget.max_seconds / seconds) if seconds else 0
    per_example = step.tokens / resolved.batch.size
    size = len(run.batches.source) * run.scale
    return RunEstimate(
        resolved, step, steps, steps * step.tokens, steps * resolved.batch.size / size, size * per_example, seconds,
        run.counted, how, whole_model_uses(run, step) if run.degree > 1 else "",
    )  # fmt: skip


def whole_model_uses(run: PreparedRun, step: StepEstimate) -> str:
    """Return a sentence on what holds the whole model on a process of a sharded run, with the bytes it takes."""
    recipe, size = run.recipe, _bytes(4 * step.parameters)
    half = _bytes((2 if recipe.precision == "bf16" else 4) * step.parameters)
    start = recipe.init_from or recipe.init_embeddings_from
    read_whole = bool(start) and (not builds_in_shards(recipe) or find(model_directory(start)) is not None)
    gathers = {
        "rollouts": run.batches.source.on_policy,
        "sample_prompts": bool(recipe.sample_prompts),
        "answers for the report": run.texts,
        "evaluation.tasks": bool(recipe.evaluation.tasks),
    }
    named = ", ".join(name for name, used in gathers.items() if used)
    uses = [
        f"{half} on each process during {named}" if named else "",
        f"{size} in main memory of each process while it is built" if read_whole else "",
        f"{_bytes(step.frozen_bytes)} of frozen models on each process" if step.frozen_bytes else "",
        f"{size} in main memory of the first process at the end, for the export",
    ]
    return "; ".join(filter(None, uses))


def dry_run(recipe: Recipe, log: LogLine = LOGGER.info) -> RunEstimate | None:
    """Report what a run takes, and train nothing. Under torchrun the first process reports, and None is returned on the others.

    Raises:
        UserError: The recipe is invalid, or a step does not fit into the free memory; the latter after the report.
    """
    ranks = join(default_device())
    with ranks.together():
        if not ranks.first:
            ranks.wait()
            return None
        found = estimate(recipe, log=log, world=ranks.world)
        for line in describe(found, ranks.world):
            log(line)
        check_fits(found.step, default_device(), found.steps)
        ranks.wait()
    return found


def describe(found: RunEstimate, world: int = 1) -> list[str]:
    """Return the lines of a dry run on some processes."""
    step, recipe, memory = found.step, found.recipe, found.step.memory
    total, device = found.step.peak_of_run(found.steps), default_device()
    name, free = list(available_memory(device).items())[-1]
    trained = "all trained" if step.trained_parameters == step.parameters else f"{step.trained_parameters:,} trained"
    kernels = memory.kernel_bytes(found.steps)
    parts = {
        "weights": memory.weights, "gradients": memory.gradients, "optimizer": memory.optimizer, "activations": memory.activations,
        "free blocks": memory.peak_of_run(found.steps) - memory.peak + memory.free + memory.process - kernels,
        "kernels of bf16 products": kernels, "other models": step.frozen_bytes,
    }  # fmt: skip
    shares = ", ".join(f"{part} {_bytes(size)}" for part, size in parts.items() if size)
    lines = [
        f"{recipe.name}: a dry run, which trains nothing",
        f"  parameters  {step.parameters:,}, {step.parameters_without_embeddings:,} without embeddings; {trained}",
        f"  FLOPs       {short(step.flops_per_token)} a token (6 N: {short(step.six_n)}); {short(found.flops)} in {found.steps:,} "
        f"steps (6 N D: {short(found.six_n_d)})",
        f"  memory      {_bytes(total)} at the peak of a step, {_bytes(free)} of {name} are free: {shares}",
        f"  checkpoint  {_bytes(step.checkpoint_bytes)} on disk",
        f"  tokens      {short(found.tokens)} in {found.steps:,} steps of {short(step.tokens)}: {found.epochs:.3g} epochs of "
        f"{short(found.data_tokens)}; {found.data}",
    ]
    time = f"  time        {found.timing}"
    if found.step_seconds:
        share = utilization(step.flops / found.step_seconds, device.type, recipe.precision, world)
        time = (
            f"  time        {clock(found.seconds)} of training in {recipe.precision} on this machine, {found.step_seconds:.3g} s a step, "
            f"MFU {share:.1%}; from {found.timing}"
        )
    return [*lines, time, *([f"  whole model {found.whole}"] if found.whole else [])]


def _bytes(size: float) -> str:
    """Return bytes in MB or GB."""
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.0f} MB"


def _silent(_: str) -> None:
    """Ignore a message."""
