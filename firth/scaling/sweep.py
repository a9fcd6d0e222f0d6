"""Train one recipe at several sizes and compute budgets, with one text, one tokenizer and one held-out text.

    OUT/sweep.json, text.json   the recipe, and what was measured of the text
    OUT/tokenizer/  OUT/data/   the common tokenizer and token stores
    OUT/width-128/3e+12/        a run directory for each point
    OUT/table.jsonl             a row for each point, which `firth scale fit` reads

Runs of one size share their constant learning rate. The schedule is warmup-stable-decay with a warmup in steps, so a larger
budget starts from the checkpoint of the next smaller one at the start of its decay, and equals the run from step 0 to the bit
(`firth.runs.run_context`). Budgets and sizes may be added later.

Several processes may work on one sweep: each takes a size that no other one holds (`firth.runs.workers`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from firth.data.collate import Batches
from firth.data.examples import DataConfig, DatasetSplits
from firth.fields import PositiveFloat, PositiveInt, Validated
from firth.io.atomic import make_directory, write_text
from firth.io.integrity import read_done, read_record, write_record
from firth.model.flops import real_tokens
from firth.model.model import LM
from firth.report.charts import number
from firth.runs import config_io, examples
from firth.runs.compatibility import check_pattern
from firth.runs.prepare import RunData
from firth.runs.recipe import CheckpointConfig, EvalConfig, Recipe, TokenizerConfig
from firth.runs.run import run
from firth.runs.tokenizer import tokenizer_of
from firth.runs.workers import Claim, Claims, WorkUnit, preparing, start_workers, work
from firth.scaling.sizes import DECAY_RATIO, LR_EXPONENT, WARMUP_STEPS, count_parameters, scaled
from firth.scaling.text import compressed_bits
from firth.tokenizer.tokenizer import Tokenizer
from firth.training.device import choose_precision, default_device
from firth.training.schedule import Budget, Schedule
from firth.training.trainer import DivergedError
from firth.types import LOGGER, LogLine, UserError

SWEEP, TEXT, POINT, DIVERGED = "sweep.json", "text.json", "point.json", "diverged.json"
"""Files of a sweep: its recipe, what was measured of its text; of a point: its facts, and why it diverged."""
CLAIMS = "claims"
"""Directory of the claims of processes on the points."""
MIN_STEPS = 3 * WARMUP_STEPS
"""Points with fewer steps are left out: most of them would be warmup and decay."""
SAVE_STEPS = 500
"""About how many steps are between checkpoints of the constant part."""
COUNTED_STEPS = 8
"""Steps whose FLOPs are counted; masked models have a varying number of labels."""


@dataclass(frozen=True)
class SweepConfig(Validated):
    """Configuration of a sweep.

    Args:
        budgets: FLOPs of each run.
        sizes: Widths of the models.
        max_epochs: Points that would read the text more often are left out.
    """

    budgets: tuple[PositiveFloat, ...]
    sizes: tuple[PositiveInt, ...]
    max_epochs: PositiveFloat = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, given in (("--budgets", self.budgets), ("--sizes", self.sizes)):
            if not given:
                raise UserError(f"{name} is empty: give at least one number")
        object.__setattr__(self, "budgets", tuple(sorted(set(self.budgets))))
        object.__setattr__(self, "sizes", tuple(sorted(set(self.sizes))))


@dataclass(frozen=True)
class Size:
    """A model of a sweep.

    Args:
        recipe: The recipe with the model of this width and its learning rates.
        parameters: Parameters that a token is multiplied by.
        total_parameters: All parameters.
        flops_per_step: Counted FLOPs of a step.
        tokens_per_step: Tokens of a step.
    """

    recipe: Recipe
    parameters: int
    total_parameters: int
    flops_per_step: float
    tokens_per_step: float

    @property
    def width(self) -> int:
        """The width, which names the size."""
        assert self.recipe.model is not None
        return self.recipe.model.hidden_size


@dataclass(frozen=True)
class Point:
    """A run of a sweep: a size and a budget.

    Args:
        size: The model.
        budget: FLOPs.
        epochs: How often the training text is read.
        excluded: Why it is not trained; empty if it is.
    """

    size: Size
    budget: float
    epochs: float
    excluded: str = ""

    @cached_property
    def steps(self) -> int:
        """Optimizer steps."""
        return max(1, round(self.budget / self.size.flops_per_step))

    @cached_property
    def save_every(self) -> int:
        """Steps between checkpoints, a divisor of `stable_steps`."""
        stable = max(1, round(self.steps * (1 - DECAY_RATIO)))
        return stable // max(1, round(stable / SAVE_STEPS))

    @cached_property
    def stable_steps(self) -> int:
        """Steps before the learning rate decays."""
        return self.save_every * max(1, round(self.steps * (1 - DECAY_RATIO)) // self.save_every)

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        schedule = Schedule("wsd", decay_ratio=(self.steps - self.stable_steps) / self.steps, warmup_steps=WARMUP_STEPS)
        # Every checkpoint is kept until the run has ended: the next budget starts from that of the last constant step.
        saving = CheckpointConfig(every=self.save_every, keep=1_000_000)
        return dataclasses.replace(
            self.size.recipe, schedule=schedule, budget=Budget(max_steps=self.steps), checkpoint=saving
        )

    def directory(self, out: Path) -> Path:
        """Return the run directory."""
        return out / f"width-{self.size.width}" / f"{self.budget:g}"


@dataclass(frozen=True)
class Sweep:
    """A sweep with all recipes and data resolved.

    Args:
        out: The directory.
        points: All points, by budget and then by width.
        unique_tokens: Tokens of the training text.
        bytes_per_token: Bytes of the held-out text per token.
    """

    out: Path
    points: tuple[Point, ...]
    unique_tokens: int
    bytes_per_token: float

    @property
    def included(self) -> list[Point]:
        """The points that are trained."""
        return [point for point in self.points if not point.excluded]

    def finished(self, point: Point) -> bool:
        """Return whether a point was trained, or diverged."""
        return bool(_row(point.directory(self.out)))

    def facts(self, point: Point) -> dict[str, Any]:
        """Return what the table states of a point besides its result."""
        size = point.size
        return {
            "width": size.width, "parameters": size.parameters, "total_parameters": size.total_parameters, "budget": point.budget,
            "tokens": point.steps * size.tokens_per_step, "unique_tokens": self.unique_tokens, "stable_steps": point.stable_steps,
            "bytes_per_token": self.bytes_per_token,
        }  # fmt: skip


def _row(directory: Path) -> dict[str, Any]:
    """Return the row of the table for a point in a directory; {} if it is not finished."""
    row = _read(directory / POINT)
    failed, done = _read(directory / DIVERGED), read_done(directory)
    if not row or not (failed or done):
        return {}
    bytes_per_token = row.pop("bytes_per_token")
    row["run"] = str(directory.relative_to(directory.parents[1]))
    if failed:
        return row | {"loss": None, "error": failed["error"]}
    loss = done["metrics"]["valid/loss"]
    bits = done["metrics"].get("valid/bits_per_byte", loss / math.log(2) / bytes_per_token)
    return (
        row
        | {name: done[name] for name in ("tokens", "flops", "steps", "seconds")}
        | {"loss": loss, "bits_per_byte": bits}
    )


def _read(file: Path) -> dict[str, Any]:
    return read_record(file) if file.exists() else {}


def prepare(recipe: Recipe, config: SweepConfig, out: Path, log: LogLine = LOGGER.info) -> Sweep:
    """Check the recipe, make the tokenizer and the token stores, and count parameters and FLOPs of every size.

    Raises:
        UserError: The directory holds another sweep, or the recipe cannot be scaled.
    """
    if recipe.model is None or recipe.init_from:
        raise UserError(
            f"{recipe.name} starts from another run, but a sweep trains from scratch: use a recipe that pretrains"
        )
    for width in config.sizes:  # errors, before any text is read
        scaled(recipe, width)
    _check_sweep(recipe, out)
    with Claims(out / CLAIMS).exclusive("prepare"):
        tokenizer = tokenizer_of(recipe, out, log)
        data = dataclasses.replace(recipe.data, cache_dir=str(out / "data"))
        splits, tokens, bytes_per_token = _datasets(recipe, data, tokenizer, out, log)
        precision = _precision(recipe, out)
    common = dataclasses.replace(
        recipe, data=data, tokenizer=TokenizerConfig(path=str(out / "tokenizer")), precision=precision, sample_prompts=(), loggers=(),
        model=dataclasses.replace(recipe.model, vocab_size=tokenizer.vocab.size),
        evaluation=EvalConfig(every=0, max_examples=recipe.evaluation.max_examples),
    )  # fmt: skip
    sizes = [_size(common, width, splits, tokenizer, out, log) for width in config.sizes]
    points = [_point(size, budget, tokens, config.max_epochs) for budget in config.budgets for size in sizes]
    return Sweep(out, tuple(points), tokens, bytes_per_token)


def _check_sweep(recipe: Recipe, out: Path) -> None:
    """Write the settings of a sweep, or check them against those of an earlier call.

    Raises:
        UserError: The directory holds something else.
    """
    file = out / SWEEP
    settings = {"recipe": json.loads(json.dumps(config_io.to_dict(config_io.absolute_paths(recipe))))}
    with preparing(out / CLAIMS, SWEEP, "sweep"):
        if not file.exists():
            write_record(file, settings)
        before = read_record(file, {"recipe": dict})["recipe"]
    changed = [name for name, value in settings["recipe"].items() if before.get(name) != value]
    if changed:
        raise UserError(
            f"{out} holds a sweep of another recipe (another {' and '.join(changed)}): choose another --out, or delete that one"
        )


def _precision(recipe: Recipe, out: Path) -> Any:
    """Return the precision of all points: the recorded one, or that of the recipe, which is measured if it is "auto"."""
    file = out / "precision.json"
    if not file.exists():
        write_record(file, {"precision": choose_precision(recipe.precision, default_device())})
    return read_record(file, {"precision": str})["precision"]


def _datasets(
    recipe: Recipe, data: DataConfig, tokenizer: Tokenizer, out: Path, log: LogLine
) -> tuple[DatasetSplits, int, float]:
    """Return the examples, the tokens of the training text, and the bytes per token of the held-out text."""
    run_data = RunData(data, tokenizer, out, batch_size=recipe.batch.size, log=log)
    splits = examples.build_datasets(recipe.examples, run_data, recipe.objective)
    if splits.validation is None or not recipe.examples.reads_documents:
        raise UserError(
            f"{recipe.name} has no held-out text to compare sizes by: use a recipe that pretrains on text, and set "
            "data.validation_path or data.validation_fraction"
        )
    train, held_out = run_data.stores()
    assert held_out is not None
    unique, bytes_per_token = len(train.tokens), held_out.num_bytes / len(held_out.tokens)
    if not (out / TEXT).exists():
        measured = {"unique_tokens": unique, "bytes_per_token": bytes_per_token, "vocab_size": tokenizer.vocab.size}
        write_record(out / TEXT, measured | {"compressed_bits": compressed_bits(train, tokenizer)})
    return splits, unique, bytes_per_token


def _size(recipe: Recipe, width: int, splits: DatasetSplits, tokenizer: Tokenizer, out: Path, log: LogLine) -> Size:
    """Return a size with its counts; the FLOPs are those of the first steps, on a model without weights."""
    one = scaled(recipe, width)
    assert one.model is not None
    check_pattern(one.objective, one.model)
    count = count_parameters(one)
    packs = one.model.packable and one.objective.constraints.packable and not one.model.attention.memory_length
    batch = one.batch.resolve(one.examples.max_tokens, packs)
    batches = Batches(
        splits.train, one.objective, tokenizer.vocab.with_decoder_start(one.model.encoder.decoder_start_token),
        batch_size=batch.size, seed=one.seed, gradient_accumulation_steps=batch.gradient_accumulation_steps,
        pack_to_length=batch.packed_length, group_by_length=batch.group_by_length,
    )  # fmt: skip
    with torch.device("meta"):
        model = LM(one.model, one.objective.heads(one.model))
    work = tokens = 0.0
    for step in range(COUNTED_STEPS):
        for made in batches.batches(step):
            work += one.objective.flops(model, made)
            tokens += real_tokens(made)
    return Size(one, count.multiplied, count.total, work / COUNTED_STEPS, tokens / COUNTED_STEPS)


def _point(size: Size, budget: float, unique_tokens: int, max_epochs: float) -> Point:
    """Return a point; it is excluded with too few steps or too many epochs."""
    point = Point(size, budget, 0.0)
    epochs = point.steps * size.tokens_per_step / unique_tokens
    excluded = ""
    if point.steps < MIN_STEPS:
        excluded = f"only {point.steps} steps"
    elif epochs > max_epochs:
        excluded = f"{epochs:.1f} epochs"
    return Point(size, budget, epochs, excluded)


def plan_table(sweep: Sweep) -> str:
    """Return the sizes with their rules applied, and the steps of each point."""
    budgets = sorted({point.budget for point in sweep.points})
    head = ["width", "layers", "heads", "parameters", "(all)", "FLOPs/token", "lr", *(f"{b:g}" for b in budgets)]
    rows = []
    for width in sorted({point.size.width for point in sweep.points}):
        own = {point.budget: point for point in sweep.points if point.size.width == width}
        size = next(iter(own.values())).size
        model = size.recipe.model
        assert model is not None
        cells = [
            str(width), str(model.num_layers), str(model.num_heads), number(size.parameters, 3), number(size.total_parameters, 3),
            number(size.flops_per_step / size.tokens_per_step, 3), f"{size.recipe.optimizer.lr:.2g}",
        ]  # fmt: skip
        rows.append(cells + [own[b].excluded or f"{own[b].steps:,} steps" for b in budgets])
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in [head, *rows])


def rules(recipe: Recipe, sweep: Sweep) -> str:
    """Return the rules of a sweep, in sentences."""
    assert recipe.model is not None
    tokens = sweep.points[0].size.tokens_per_step
    per_layer = recipe.model.hidden_size / max(1, recipe.model.num_layers)
    return (
        f"Width is the dial: one layer per {per_layer:g} of it; learning rate {recipe.optimizer.lr:g} x "
        f"({recipe.model.hidden_size}/width)^{LR_EXPONENT:g}; {recipe.batch.size} examples ({tokens:,.0f} tokens) a step at every size. "
        f"Schedule: {WARMUP_STEPS} steps of warmup, constant, the last {DECAY_RATIO:.0%} decay to 0; budgets of one size share the "
        "constant part."
    )


def run_sweep(recipe: Recipe, config: SweepConfig, out: Path, log: LogLine = LOGGER.info, workers: int = 1) -> str:
    """Train the points of a sweep, or what is left of them, together with other processes, and write the table.

    Args:
        recipe: The recipe.
        config: Sizes and budgets.
        out: The directory of the sweep.
        log: Prints a line of progress.
        workers: Processes to start; 1 trains in this one.

    Returns:
        What was trained and what comes next.

    Raises:
        UserError: The settings do not fit each other, or the directory holds another sweep.
        Interrupted: Ctrl-C; the same call continues.
    """
    sweep = prepare(recipe, config, out, log)
    log(rules(recipe, sweep))
    log(plan_table(sweep))
    if not sweep.included:
        raise UserError(
            f"no point is left: {sweep.points[0].excluded} at the smallest; raise --budgets, or choose other --sizes"
        )
    if workers > 1:
        start_workers(min(workers, len(config.sizes)), _work, (recipe, config, out))
    else:
        _train_points(sweep, log)
    return _summary(write_table(out), out)


def _work(recipe: Recipe, config: SweepConfig, out: Path) -> None:
    """Train points in a process of its own."""
    _train_points(prepare(recipe, config, out, _silent), LOGGER.info)


def _train_points(sweep: Sweep, log: LogLine) -> None:
    """Train the points that no other process trains, until all are trained; those of a size in order, for the constant part."""
    points = {
        WorkUnit(f"width {point.size.width}, {point.budget:g} FLOPs", f"width-{point.size.width}"): point
        for point in sweep.included
    }

    def train(job: WorkUnit, claim: Claim) -> None:
        _train(sweep, points[job], log, claim)
        write_table(sweep.out)

    work(list(points), Claims(sweep.out / CLAIMS), lambda job: sweep.finished(points[job]), train, log)


def _train(sweep: Sweep, point: Point, log: LogLine, claim: Claim) -> None:
    """Train a point, from the constant part of the largest smaller budget of its size if there is one."""
    directory = point.directory(sweep.out)
    start, reused = _start(directory, point)
    make_directory(directory)
    write_record(directory / POINT, sweep.facts(point) | {"reused_flops": reused})
    try:
        run(point.recipe, directory, log=_silent, on_metrics=lambda _: claim.check(), start_from=start)
    except DivergedError as error:
        write_record(directory / DIVERGED, {"error": str(error)})
        log(f"width {point.size.width}, {point.budget:g} FLOPs: {error}")
    for path in (directory / "checkpoints").glob("step-*"):
        if path != _branch(directory, point.stable_steps):
            shutil.rmtree(path)


def _branch(directory: Path, stable_steps: int) -> Path:
    """Return the checkpoint of the last constant step of a point."""
    return directory / "checkpoints" / f"step-{stable_steps:06d}"


def _start(directory: Path, point: Point) -> tuple[Path | None, float]:
    """Return the checkpoint of the last constant step of the largest smaller budget of this size, and its FLOPs; None without one."""
    found = []
    for file in directory.parent.glob(f"*/{POINT}"):
        facts = read_record(file)
        path = _branch(file.parent, facts["stable_steps"])
        if facts["budget"] < point.budget and facts["stable_steps"] <= point.stable_steps and path.is_dir():
            found.append((facts["budget"], path))
    if not found:
        return None, 0.0
    path = max(found)[1]
    return path, float(json.loads((path / "state.json").read_text())["flops"])


def write_table(out: Path) -> list[dict[str, Any]]:
    """Write the rows of all finished points of a sweep to table.jsonl and return them, also those of earlier calls."""
    with Claims(out / CLAIMS).exclusive("table"):
        rows = [row for file in out.glob(f"width-*/*/{POINT}") if (row := _row(file.parent))]
        rows.sort(key=lambda row: (row["budget"], row["width"]))
        write_text(out / "table.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _summary(rows: Sequence[Mapping[str, Any]], out: Path) -> str:
    """Return what a sweep has trained and saved."""
    done = [row for row in rows if row["loss"] is not None]
    total, reused = sum(row["flops"] for row in done), sum(row["reused_flops"] for row in done)
    lines = [
        f"{len(done)} points, {number(total, 3)} FLOPs, of which {number(reused, 3)} ({reused / max(total, 1):.0%}) were not computed "
        f"again: {out / 'table.jsonl'}"
    ]
    if len(rows) > len(done):
        lines.append(f"{len(rows) - len(done)} points diverged; the table names them")
    lines.append(f"next: firth scale fit {out / 'table.jsonl'}")
    return "\n".join(lines)


def _silent(_: str) -> None:
    """Print nothing."""
