"""The training loop, for every objective.

    prepare    the data source may generate new data with the model (on-policy data)
    step       gradients of the sums of the loss terms over the label counts of the whole step (`firth.training.step`)
    update     clip and take the optimizer step; a step without a finite gradient is skipped, on all ranks together
    after      a row in metrics.jsonl, validation, a checkpoint

On a GPU the device decides whether a step is skipped, and the host reads losses, norms and that decision for several steps at
once (`_Run._read`), so that it does not wait for each step. On a CPU a read costs nothing, and every step is read.

Pretraining, finetuning, reward models, DPO and PPO differ only in the arguments.
    train(model, MLM(), batches, Path("runs/bert"), budget=Budget(max_steps=1000))

After a kill, an interrupt or the end of a run, the same call resumes from the last valid checkpoint, bitwise equal to an
uninterrupted run (with the same layout and number of threads, and not with a budget in seconds).
"""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from firth import kernel_choice
from firth.model import flops
from firth.training import checkpoint
from firth.training.checkpoint import TrainingState
from firth.training.device import (  # fmt: skip
    Precision,
    casts,
    choose_precision,
    defers_reads,
    flush_denormals,
    keep_freed_memory,
    machine_peak,
)
from firth.training.distributed import Parallel, Ranks, Replicas
from firth.training.logging import MetricsLog, NullReporter, OnMetrics, ProgressReporter, clock, make_reporter, short
from firth.training.optimizer import Optimizer, OptimizerConfig
from firth.training.run_lock import Interrupted, interrupt_handler, run_lock
from firth.training.schedule import Budget, Schedule
from firth.training.step import Prefetcher, StepNumbers, count_targets, named_metrics, pinned, to
from firth.training.step import step as gradients
from firth.types import PRECOMPUTED_FIELDS, Batch, UserError

if TYPE_CHECKING:
    from firth.data.collate import Batches
    from firth.model.model import LM
    from firth.objectives.objective import Objective
    from firth.training.sharding import Shards

LOWER_IS_BETTER = ("loss", "bits", "squared_error", "perplexity")
"""Prefixes of the names of metrics for which lower is better."""
LOWER_IS_BETTER_TASKS = (*LOWER_IS_BETTER, "copying_loss", "in_context_score", "word_perplexity", "byte_perplexity")
"""The same for the last part of the name of a metric of a task, such as task/copying_loss."""


def lower_is_better(metric: str) -> bool:
    """Return whether a lower value of a validation metric is better."""
    if metric.startswith("task/"):
        return metric.rpartition("/")[2].startswith(LOWER_IS_BETTER_TASKS)
    return metric.startswith(LOWER_IS_BETTER)


READ_STEPS, READ_SECONDS = 10, 10.0
"""Steps and seconds after which the host reads what the steps on a GPU have computed, if nothing needs it before."""


class DivergedError(UserError):
    """The loss, the gradients or the weights of a run are not finite."""


Evaluate = Callable[["LM", int], dict[str, float]]
"""(model, step) -> validation metrics. Called in eval mode, without gradients, on every rank. What uses a sharded model
otherwise than by `Parallel.forward` enters `LM.whole` first."""


@dataclass(frozen=True)
class TrainerConfig:
    """Configuration of logging, validation, checkpoints and precision.

    Args:
        log_every: Steps between rows in the log; 0 logs only at the end.
        eval_every: Steps between validations; 0 validates only at the end.
        save_every: Steps between checkpoints; 0 saves only at the end.
        save_seconds: Seconds of training after which one is saved too, unless save_every is 0; 0 counts steps only.
        keep: Recent checkpoints to keep, in addition to the best.
        best_metric: The validation metric that selects the best checkpoint: the lowest loss or error, the highest of others.
        load_best_at_end: Save a checkpoint at every new best, and load the best one at the end.
        patience: Stop after this many validations in a row without a new best; 0 disables early stopping.
        precision: "fp32", "bf16" or "auto", the faster one on this machine; a resumed run keeps its precision.
        max_bad_steps: Stop after this many steps in a row without a finite gradient.
    """

    log_every: int = 1
    eval_every: int = 0
    save_every: int = 500
    save_seconds: float = 0.0
    keep: int = 2
    best_metric: str = "loss"
    load_best_at_end: bool = False
    patience: int = 0
    precision: Precision = "auto"
    max_bad_steps: int = 10

    def __post_init__(self) -> None:
        for name, least in (("log_every", 0), ("eval_every", 0), ("save_every", 0), ("save_seconds", 0), ("keep", 1), ("max_bad_steps", 1),
                            ("patience", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")


@dataclass(frozen=True)
class TrainingResult:
    """Result of a training run.

    Args:
        step: Optimizer steps.
        exported_step: The step of the final weights, which may be the best and not the last.
        tokens: Tokens read, without padding.
        seconds: Training time.
        flops: Counted work.
        skipped: Steps without a finite gradient.
        metrics: The last metrics at `exported_step`; those of validation are named `valid/NAME`.
        mfu: Model FLOPs utilization: `flops` per second over the machine's peak (`firth.training.device`); 0 on ranks above 0.
    """

    step: int
    exported_step: int
    tokens: int
    seconds: float
    flops: float
    skipped: int
    metrics: dict[str, float]
    mfu: float = 0.0


def train(
    model: LM,
    objective: Objective,
    batches: Batches,
    directory: Path,
    *,
    budget: Budget,
    optimizer: OptimizerConfig | None = None,
    schedule: Schedule | None = None,
    config: TrainerConfig | None = None,
    evaluate: Evaluate | None = None,
    ranks: Ranks | None = None,
    shards: Shards | None = None,
    recipe: str = "",
    name: str = "",
    reporter: ProgressReporter | None = None,
    on_metrics: OnMetrics | None = None,
    description: Mapping[str, Any] | None = None,
) -> TrainingResult:
    """Train a model in place, or resume from the last checkpoint of the directory. Leaves the model in eval mode.

    Args:
        model: The model.
        objective: Its loss and metrics.
        batches: The training batches.
        directory: The run directory, for metrics and checkpoints.
        budget: How long to train.
        optimizer: The optimizer.
        schedule: The learning rate schedule.
        config: When to log, validate and save.
        evaluate: Computes the validation metrics.
        ranks: The process group; a single process by default.
        shards: The sharding of the model over these ranks; None if each has a copy.
        recipe: A hash of everything that the run depends on; checkpoints with another hash are an error.
        name: The start of progress lines; by default the directory's name.
        reporter: Receives the progress; by default it is printed.
        on_metrics: Called with each row of metrics.jsonl, on the first rank.
        description: What the model is, for checkpoints that can be read as models; None if they cannot.

    Raises:
        UserError: No labels, directory locked, disk full, or gradients not finite (`DivergedError`).
        Interrupted: Ctrl-C; a checkpoint has been saved.
    """
    ranks = ranks or Ranks()
    if shards is None:
        keep_freed_memory()
    flush_denormals()
    with ranks.together(), run_lock(directory) if ranks.first else nullcontext():
        reporter = (reporter or make_reporter(name or directory.name)) if ranks.first else NullReporter()
        run = _Run(model, objective, batches, directory, budget, optimizer or OptimizerConfig(), schedule or Schedule(),
                   config or TrainerConfig(), evaluate, ranks, shards, recipe, reporter, on_metrics, description)  # fmt: skip
        try:
            return run.train()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"{directory}: the disk is full; free some space and run the same command again") from error
        finally:
            reporter.close()


class _Run:
    """One call of `train`: its arguments and its progress."""

    def __init__(
        self, model: LM, objective: Objective, batches: Batches, directory: Path, budget: Budget, optimizer: OptimizerConfig,
        schedule: Schedule, config: TrainerConfig, evaluate: Evaluate | None, ranks: Ranks, shards: Shards | None, recipe: str,
        reporter: ProgressReporter, on_metrics: OnMetrics | None, description: Mapping[str, Any] | None,
    ):  # fmt: skip
        self.model, self.objective, self.batches, self.directory = model, objective, batches, directory
        self.budget, self.schedule, self.config, self.evaluate = budget, schedule, config, evaluate
        self.ranks, self.recipe, self.reporter, self.on_metrics = ranks, recipe, reporter, on_metrics
        self.lr, self.description = optimizer.lr, description
        self.device = next(model.parameters()).device
        if ranks.world > 1:  # replicas with different kernels would diverge
            kernel_choice.use(json.loads(ranks.from_first(json.dumps(kernel_choice.table() if ranks.first else {}))))
        self.deferred = defers_reads(self.device)
        sparse = ranks.world == 1 and not self.deferred
        self.optimizer = Optimizer(optimizer, model, sparse, ranks, shards, self.deferred)
        replicas = Replicas(self.optimizer.parameters, ranks) if ranks.world > 1 and shards is None else Parallel()
        self.parallel, self.shards = shards or replicas, 1 if shards is None else shards.group.size()
        self.dropout = not objective.inputs & PRECOMPUTED_FIELDS
        self.state = self._start_or_resume()
        self.casts = casts(self.state.precision, self.device)
        self.last_logged = (self.state.seconds, self.state.tokens, self.state.flops)  # at the last row of the log
        self.unread: list[StepNumbers] = []
        self.read_seconds = self.state.seconds  # at the last read
        self.saved_seconds = self.state.seconds  # at the last checkpoint
        self.step_seconds = self.unshared_seconds = 0.0
        self.score: float | None = None
        self.peak = machine_peak(self.device.type, self.state.precision) * ranks.world if ranks.first else math.inf

    def _start_or_resume(self) -> TrainingState:
        """Return the initial state, or restore the last valid checkpoint."""
        self.ranks.wait()  # rank 0 may have generated samples before, which can take longer than a collective's timeout
        if self.shards == 1:
            self.ranks.copy_from_first([p.data for p in self.model.parameters()])
        if self.ranks.first:
            checkpoint.remove_partial(self.directory)
        self.ranks.wait()
        saved = checkpoint.newest(self.directory, self.reporter.log, self.ranks)
        if saved is None:
            if self.ranks.rank:  # independent dropout on every rank gives a better estimate
                torch.manual_seed(torch.initial_seed() + self.ranks.rank)
            chosen = choose_precision(self.config.precision, self.device)
            return TrainingState("bf16" if self.ranks.from_first(chosen) == "bf16" else "fp32")
        if saved.recipe != self.recipe:
            raise UserError(
                f"{self.directory} holds a run of another recipe ({saved.recipe or 'unnamed'}, this one is "
                f"{self.recipe or 'unnamed'}); choose another directory, or delete that one to start a new run"
            )
        state = checkpoint.restore(saved, self.model, self.optimizer, self.batches.source, self.ranks, self.frozen)
        self.reporter.log(f"resuming from {saved.path.name}")
        layout = checkpoint.layout(self.ranks, self.device, self.shards)
        both = [(k, saved.layout.get(k), layout.get(k)) for k in layout | saved.layout]
        changed = [f"{k} {before} -> {now}" for k, before, now in both if before != now]
        if changed:
            self.reporter.log(
                f"the run is not bitwise reproducible, because the layout has changed: {', '.join(changed)}"
            )
        return state

    @cached_property
    def frozen(self) -> Mapping[str, Tensor]:
        """The hash of the frozen weights, which a run computes once."""
        return checkpoint.frozen(self.model, self.ranks)

    @property
    def _passed(self) -> float:
        """The fraction of the run that is done."""
        return self.budget.passed(self.state.step, self.state.seconds, self.state.flops)

    @property
    def _finished(self) -> bool:
        """Whether the budget is used up, or early stopping applies."""
        return self._passed >= 1 or 0 < self.config.patience <= self.state.stale

    def train(self) -> TrainingResult:
        """Run the remaining steps and return the result."""
        state = self.state
        if not self._finished:
            log = MetricsLog(self.directory, state.step, self.on_metrics) if self.ranks.first else None
            self.model.train(self.dropout)
            try:
                self._run_steps(log)
            finally:
                if log is not None:
                    log.close()
        self.model.eval()
        exported = self._load_best() if self.config.load_best_at_end else state.step
        mfu = state.flops / max(state.seconds, 1e-9) / self.peak
        return TrainingResult(
            state.step, exported, state.tokens, state.seconds, state.flops, state.skipped, state.metrics, mfu
        )

    def _load_best(self) -> int:
        """Load weights and metrics of the best checkpoint, on every rank, and return its step."""
        path = checkpoint.best(self.directory)
        if path is None:
            return self.state.step
        saved = checkpoint.load(path, self.ranks)
        checkpoint.load_weights(saved, self.model, self.frozen)
        self.state.metrics = saved.state["metrics"]
        step = int(saved.state["step"])
        self.reporter.log(f"loaded the model of step {step}, the best by validation {self.config.best_metric}")
        return step

    def _run_steps(self, log: MetricsLog | None) -> None:
        state, checked = self.state, False
        prefetch = not self.batches.source.on_policy
        with (
            interrupt_handler(self.reporter.log) as stop,
            Prefetcher(self._batches_of, enabled=prefetch) as prefetcher,
        ):
            while not self._finished:
                start = time.perf_counter()
                rollout_metrics = self._prepare_source(log)
                if rollout_metrics:
                    self._read(log)
                    self._log_rollouts(log, rollout_metrics)
                batches = prefetcher.take(state.step)
                if not checked:
                    self._check_labels(batches)
                    checked = True
                if state.step + 1 != self.budget.max_steps:
                    prefetcher.begin(state.step + 1)
                stopping = self._step(batches, start, stop.requested)
                self._after(log, stopping)

    def _batches_of(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step, in page-locked memory for a GPU."""
        batches = self.batches.batches(step)
        return pinned(batches) if self.device.type == "cuda" else batches

    def _prepare_source(self, log: MetricsLog | None) -> Mapping[str, float]:
        """Let the source prepare this step and return its metrics.

        If it fails on all ranks (a user's reward), a checkpoint is saved first. If it fails on some, their sources differ, so
        nothing is saved, and the others end with the error of the first of them.
        """
        source, failure = self.batches.source, None
        metrics: Mapping[str, float] = {}
        try:
            with self.casts():
                metrics = source.prepare(self.model, self.state.step)
        except UserError as error:
            failure = error
        errors = self.ranks.errors(failure) if source.on_policy else []
        if errors and all(errors) and self.state.step:
            self._read(log)
            self._save()
            self.reporter.log(f"saved step {self.state.step} in {self.directory}")
        for rank, message in enumerate(errors):
            if message and failure is None:
                raise UserError(f"rank {rank} failed: {message}")
        if failure is not None:
            raise failure
        return metrics

    def _check_labels(self, batches: list[Batch]) -> None:
        """Raise a UserError if a loss term has no labels: its loss would be 0, without any other sign."""
        counts = count_targets(self.objective, [to(b, self.device) for b in batches], self.ranks.sum)
        for term, field in self.objective.labels.items():
            if not counts[term]:
                raise UserError(
                    f"the first step has no labels in the field {field!r} (loss term {term!r}): check that the data has labels, "
                    "and that examples are not truncated before them"
                )

    def _step(self, batches: list[Batch], start: float, stop: bool) -> bool:
        """Take an optimizer step; return whether a stop was requested on any rank."""
        state, ranks = self.state, self.ranks
        tokens, work = 0, 0.0
        for batch in batches:
            tokens += flops.real_tokens(batch)
            work += self.objective.flops(self.model, batch)
        on_device = [to(batch, self.device) | {"step": torch.tensor(state.step)} for batch in batches]
        means = gradients(self.model, self.objective, on_device, ranks.sum, self.casts, self.parallel)
        norm = self.optimizer.clip_grad_norm()
        skip = (~torch.stack([*(means[t] for t in self.objective.labels), norm]).isfinite().all()).float()
        bad = 0.0
        if self.deferred:
            skip = ranks.sum(skip).clamp(max=1)
        else:
            bad = float(skip)
        # All ranks use the same time and take the same decisions.
        took = (time.perf_counter() - start + self.unshared_seconds) / ranks.world
        took, bad, stops, tokens_, work = ranks.sum_numbers(took, bad, stop, tokens, work)
        middle = self.budget.passed(state.step + 0.5, state.seconds + 0.5 * self.step_seconds, state.flops + 0.5 * work)
        factor = self.schedule.factor(middle, state.step)
        before = time.perf_counter()
        if self.deferred:
            self.optimizer.step(factor, skip)
        elif bad:
            self._check_finite_weights()
            self.optimizer.zero_grad()
            skip = torch.ones_like(skip)
        else:
            self.optimizer.step(factor)
        self.unshared_seconds = time.perf_counter() - before  # counted with the next step
        self.step_seconds = took
        state.step += 1
        state.tokens += round(tokens_)
        state.seconds += took
        state.flops += work
        numbers = torch.stack([*means.values(), norm, skip])
        self.unread.append(StepNumbers(state.step, state.tokens, state.flops, self.lr * factor, tuple(means), numbers))
        return stops > 0

    def _read(self, log: MetricsLog | None, stopping: bool = False) -> None:
        """Read the numbers of the steps since the last read: count skipped steps, and log those that are due.

        Raises:
            DivergedError: Too many steps in a row were skipped.
        """
        state, unread = self.state, self.unread
        if not unread:
            return
        self.unread = []
        before = time.perf_counter() if self.deferred else 0.0
        numbers = torch.cat(
            [one.numbers for one in unread]
        ).tolist()  # the only read of the loss and the norm by the host
        if self.deferred:
            state.seconds += sum(self.ranks.sum_numbers((time.perf_counter() - before) / self.ranks.world))
        rows = [[numbers.pop(0) for _ in (*one.names, "norm", "skip")] for one in unread]
        if self.deferred and any(row[-1] for row in rows):
            self._check_finite_weights()
        each = (state.seconds - self.read_seconds) / len(unread)
        self.read_seconds = state.seconds
        for left, one, (*means, norm, skip) in zip(range(len(unread))[::-1], unread, rows, strict=True):
            state.skipped += bool(skip)
            state.in_a_row = state.in_a_row + 1 if skip else 0
            named = named_metrics(self.objective, dict(zip(one.names, means, strict=True)))
            state.metrics = {k: v for k, v in state.metrics.items() if k.startswith("valid/")} | named
            state.metrics |= {"norm": norm, "rate": one.rate}
            if state.in_a_row >= self.config.max_bad_steps:
                raise DivergedError(
                    f"{state.in_a_row} steps in a row, the last of them step {one.step}, gave a loss or a gradient that is not "
                    f"finite; {self._advice}"
                )
            if _due(one.step, self.config.log_every) or (not left and (stopping or self._passed >= 1)):
                self._log_step(log, one, state.seconds - left * each)

    def _after(self, log: MetricsLog | None, stopping: bool) -> None:
        """Log, validate and save after a step."""
        state, config = self.state, self.config
        waited = state.seconds - self.saved_seconds
        saving = _due(state.step, config.save_every) or (config.save_every > 0 < config.save_seconds <= waited)
        due = stopping or saving or _due(state.step, config.eval_every)
        late = len(self.unread) >= READ_STEPS or state.seconds - self.read_seconds >= READ_SECONDS
        if due or late or not self.deferred or self._passed >= 1:
            self._read(log, stopping)
        last = self._passed >= 1
        if due or last:
            self._check_finite_weights()
        if last and state.in_a_row:
            raise DivergedError(
                f"the run ends at step {state.step} on a loss or a gradient that is not finite ({state.in_a_row} in a row), so this "
                f"model is not saved; {self._advice}"
            )
        self.score, better = None, False
        if self.evaluate is not None and (last or _due(state.step, config.eval_every)):
            metrics = self._validate(self.evaluate)
            self._check_finite_metrics(metrics)
            better = self._update_best(metrics)
            state.metrics = {k: v for k, v in state.metrics.items() if not k.startswith("valid/")}
            state.metrics |= {f"valid/{name}": value for name, value in metrics.items()}
            if log is not None:
                log.row("valid", state.step, state.seconds, state.tokens, metrics)
            self.reporter.log(
                f"step {state.step}  validation: " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items())
            )
        last = self._finished
        if last or stopping or saving or (better and config.load_best_at_end):
            self._save()
        if stopping and not last:
            raise Interrupted(
                f"stopped at step {state.step} and saved in {self.directory}; run the same command again to resume"
            )

    @property
    def _advice(self) -> str:
        return f"lower optimizer.lr (now {self.lr:g}) or increase schedule.warmup_ratio, and start a new run"

    def _check_finite_weights(self) -> None:
        """Raise a DivergedError if the weights are not finite, before they are saved.

        The weights are the same on all ranks, and so is the result. The check reads 16 GB/s, at saves, validations and bad steps.
        """
        name = checkpoint.not_finite(self.model)
        if name:
            raise DivergedError(
                f"step {self.state.step}: the optimizer has made the weight {name!r} infinite or NaN, so the model is not saved; "
                f"{self._advice}"
            )

    def _check_finite_metrics(self, metrics: Mapping[str, float]) -> None:
        """Raise a UserError if a validation metric is NaN or a validation loss infinite, though the weights are finite.

        Other metrics may be infinite: the exponential of a large finite loss is.
        """
        losses = ("loss", "bits_per_byte")
        names = [k for k, v in metrics.items() if math.isnan(v) or (k.startswith(losses) and math.isinf(v))]
        if names:
            raise UserError(
                f"step {self.state.step}: the validation {names[0]} is {metrics[names[0]]}, while all weights are finite, so "
                "the model is not saved: check the validation records for numbers too large for the model, set "
                f"precision=fp32 if it is bf16, or lower optimizer.lr (now {self.lr:g}) and start a new run"
            )

    def _update_best(self, metrics: Mapping[str, float]) -> bool:
        """Update the best score, and return whether these metrics are a new best."""
        if self.config.best_metric not in metrics:
            if self.config.load_best_at_end:
                raise UserError(
                    f"evaluation.best_metric={self.config.best_metric} is not among the validation metrics: {', '.join(metrics)}"
                )
            return False
        value = metrics[self.config.best_metric]
        self.score = value if lower_is_better(self.config.best_metric) else -value
        better = self.state.best is None or self.score < self.state.best
        self.state.best = self.score if better else self.state.best
        self.state.stale = 0 if better else self.state.stale + 1
        return better

    def _log_rollouts(self, log: MetricsLog | None, metrics: Mapping[str, float]) -> None:
        """Log the metrics of rollouts under the step that first trains on them, so that a resumed run logs them once.

        A source lists the most important metrics first; the first five are reported.
        """
        state = self.state
        if log is not None:
            log.row("rollouts", state.step + 1, state.seconds, state.tokens, metrics)
        finite = [f"{name} {value:.4g}" for name, value in metrics.items() if math.isfinite(value)]
        self.reporter.log(f"step {state.step}  rollouts: " + "  ".join(finite[:5]))

    def _log_step(self, log: MetricsLog | None, one: StepNumbers, seconds: float) -> None:
        """Log the metrics of a step, which ended after `seconds` of training, and report progress."""
        state = self.state
        seconds_before, tokens, flops_ = self.last_logged
        elapsed = max(seconds - seconds_before, 1e-9)
        speed, work = (one.tokens - tokens) / elapsed, (one.flops - flops_) / elapsed
        self.last_logged = (seconds, one.tokens, one.flops)
        row = {k: v for k, v in state.metrics.items() if not k.startswith("valid/")}
        row |= {
            "tokens_per_second": round(speed, 1),
            "flops_per_second": round(work),
            "mfu": round(work / self.peak, 4),
        }
        row |= {"flops": one.flops, "skipped": state.skipped}
        if log is not None:
            log.row("train", one.step, seconds, one.tokens, row)
        passed = self.budget.passed(one.step, seconds, one.flops)
        steps = f"/{self.budget.max_steps}" if self.budget.max_steps else ""
        left = clock(seconds * (1 - passed) / passed)
        self.reporter.progress(
            passed,
            f"step {one.step}{steps}  loss {row['loss']:.4f}  {short(speed)} tokens/s  {short(work)}FLOP/s  "
            f"MFU {work / self.peak:.0%}  {left} left" + (f"  {state.skipped} skipped" if state.skipped else ""),
        )

    def _validate(self, evaluate: Evaluate) -> dict[str, float]:
        """Return the validation metrics, in the same precision; mode and random state are restored."""
        self.model.eval()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), self.casts():
            metrics = evaluate(self.model, self.state.step)
        self.model.train(self.dropout)
        return metrics

    def _save(self) -> None:
        self.saved_seconds = self.state.seconds
        checkpoint.save_state(
            self.directory, self.state, self.model, self.optimizer, self.batches.source, self.ranks,
            recipe=self.recipe, keep=self.config.keep, score=self.score, frozen=self.frozen, shards=self.shards,
            description=self.description,
        )  # fmt: skip


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
