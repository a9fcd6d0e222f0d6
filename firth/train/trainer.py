"""The loop: the one step, again and again, until the run is long enough.

    prepare    the source may refresh itself from the model (on-policy data)
    step       gradients of the terms' sums over counts known for the whole step and all ranks (`firth.train.step`)
    clip, move a step without a finite gradient is left out, on all ranks together
    then       a row in metrics.jsonl, a measurement on held-out text, a checkpoint

It knows no objective: pretraining, finetuning, reward models, DPO and PPO differ in what they pass in.

    train(model, MLM(), batches, Path("runs/bert"), length=Length(steps=1000))

Killed, interrupted or finished, the same call goes on from the last whole checkpoint, with the bits that an
uninterrupted run would have (same layout and thread count; a length in seconds cannot promise that).
"""

from __future__ import annotations

import errno
import json
import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from firth import kernels
from firth.model import flops
from firth.model.fused import uses_dropout
from firth.train import checkpoint, precision, training_state
from firth.train.cpu_setup import flush_denormals, keep_freed_memory
from firth.train.distributed import Ranks
from firth.train.logging import MetricsLog, NullReporter, ProgressReporter, clock, make_reporter, short
from firth.train.optimizer import Optimizer, OptimizerConfig
from firth.train.prefetch import Prefetcher
from firth.train.run_lock import Interrupted, interrupt_handler, run_lock
from firth.train.schedule import Budget, Schedule
from firth.train.step import count_targets
from firth.train.step import step as gradients
from firth.train.training_state import TrainingState
from firth.train.validate import named, to
from firth.types import Batch, UserError

if TYPE_CHECKING:
    from firth.data.collate import Batches
    from firth.model.model import LM
    from firth.objectives.objective import Objective

LESS_IS_BETTER = ("loss", "bits", "squared_error", "perplexity")
"""How the names of measurements begin of which less is better."""

Evaluate = Callable[["LM", int], dict[str, float]]
"""Measures the model after a step: name -> number. Called in eval mode, without gradients; every rank calls it."""


@dataclass(frozen=True)
class TrainerConfig:
    """When to look, when to save, what to run in.

    log_every, evaluate_every, save_every: in steps; 0 means only at the end. keep: checkpoints kept besides the best.
    best: the held-out metric whose best value makes a checkpoint the best: the lowest of a loss or an error, the highest of
    others. best_last: a checkpoint is saved at every new best, and its weights are what the run ends with.
    patience: the run ends when so many measurements in a row are no new best; 0: never.
    precision: "auto" takes what this machine is fast at; a resumed run keeps what it had.
    bad_steps: how many steps in a row may lack a finite gradient before the run gives up.
    """

    log_every: int = 1
    eval_every: int = 0
    save_every: int = 500
    keep: int = 2
    best_metric: str = "loss"
    load_best_at_end: bool = False
    patience: int = 0
    precision: precision.Precision = "auto"
    max_bad_steps: int = 10

    def __post_init__(self) -> None:
        for name, least in (("log_every", 0), ("eval_every", 0), ("save_every", 0), ("keep", 1), ("max_bad_steps", 1),
                            ("patience", 0)):  # fmt: skip
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: it must be at least {least}")


@dataclass(frozen=True)
class TrainingResult:
    """What a run came to. metrics: the last row of each split, held-out ones as `valid/NAME`; of the step whose weights it
    ends with (`taken`), which may be the best one and not the last."""

    step: int
    exported_step: int
    tokens: int
    seconds: float
    flops: float
    skipped: int
    metrics: dict[str, float]


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
    recipe: str = "",
    name: str = "",
    reporter: ProgressReporter | None = None,
) -> TrainingResult:
    """Train `model` in place, or go on where the directory's last checkpoint is. Leaves the model in eval mode.

    recipe: a hash of everything the run depends on; a directory with another's checkpoints is refused.
    name: how progress lines begin; the directory's name if empty. told: where progress goes instead of the terminal.
    Raises UserError (nothing to learn from, directory taken, disk full, gradients not finite) and Stopped (Ctrl-C).
    """
    ranks = ranks or Ranks()
    keep_freed_memory()
    flush_denormals()
    with ranks.together(), run_lock(directory) if ranks.first else nullcontext():
        reporter = (reporter or make_reporter(name or directory.name)) if ranks.first else NullReporter()
        run = _Run(model, objective, batches, directory, budget, optimizer or OptimizerConfig(), schedule or Schedule(),
                   config or TrainerConfig(), evaluate, ranks, recipe, reporter)  # fmt: skip
        try:
            return run.whole()
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise UserError(f"{directory}: the disk is full; free some room and run the same command again") from error
        finally:
            reporter.close()


class _Run:
    """One call of `train`: what it was given, and how far it is."""

    def __init__(
        self, model: LM, objective: Objective, batches: Batches, directory: Path, length: Budget, optimizer: OptimizerConfig,
        schedule: Schedule, plan: TrainerConfig, evaluate: Evaluate | None, ranks: Ranks, recipe: str, told: ProgressReporter,
    ):  # fmt: skip
        self.model, self.objective, self.batches, self.directory = model, objective, batches, directory
        self.length, self.schedule, self.plan, self.evaluate = length, schedule, plan, evaluate
        self.ranks, self.recipe, self.told = ranks, recipe, told
        self.rate = optimizer.lr
        self.device = next(model.parameters()).device
        if ranks.world > 1:  # replicas that took different kernels would drift
            kernels.use(json.loads(ranks.from_first(json.dumps(kernels.table() if ranks.first else {}))))
        self.mover = Optimizer(optimizer, model, sparse=ranks.world == 1)
        self.learning = flops.trained_share(model)
        self.at = self._begin()
        self.casts = precision.casts(self.at.precision, self.device)
        self.marked = (self.at.seconds, self.at.tokens, self.at.flops)  # at the last row
        self.took = 0.0
        self.score: float | None = None

    def _begin(self) -> TrainingState:
        """Go on from the last whole checkpoint, or begin."""
        self.ranks.wait()  # rank 0 may have written samples before, which takes longer than a collective waits
        self.ranks.copy_from_first([p.data for p in self.model.parameters()])
        if self.ranks.first:
            checkpoint.remove_partial(self.directory)
        self.ranks.wait()
        saved = checkpoint.newest(self.directory, self.told.say)
        if saved is None:
            if self.ranks.rank:  # the same dropout on every rank would be a poorer estimate
                torch.manual_seed(torch.initial_seed() + self.ranks.rank)
            chosen = precision.choose(self.plan.precision, self.device)
            return TrainingState("bf16" if self.ranks.from_first(chosen) == "bf16" else "fp32")
        if saved.recipe != self.recipe:
            raise UserError(
                f"{self.directory} holds a run of another recipe ({saved.recipe or 'unnamed'}, this one is "
                f"{self.recipe or 'unnamed'}); choose another directory, or delete that one to begin anew"
            )
        at = training_state.restore(saved, self.model, self.mover, self.batches.source, self.ranks)
        self.told.say(f"going on from {saved.path.name}")
        here = training_state.layout(self.ranks, self.device)
        changed = [f"{k} {saved.layout.get(k)} -> {v}" for k, v in here.items() if saved.layout.get(k) != v]
        if changed:
            self.told.say(f"not bit for bit, for the layout has changed: {', '.join(changed)}")
        return at

    @property
    def _passed(self) -> float:
        """The fraction of the run that is behind."""
        return self.length.passed(self.at.step, self.at.seconds, self.at.flops)

    @property
    def _over(self) -> bool:
        """Whether the run is long enough, or has been no better for too long."""
        return self._passed >= 1 or 0 < self.plan.patience <= self.at.stale

    def whole(self) -> TrainingResult:
        """Every step that is left."""
        at = self.at
        if not self._over:
            log = MetricsLog(self.directory, at.step) if self.ranks.first else None
            self.model.train(self.objective.dropout)
            if self.objective.precomputed_fields and self.objective.dropout and uses_dropout(self.model):
                fields = ", ".join(sorted(self.objective.precomputed_fields))
                self.told.say(
                    f"dropout is on here and off where {fields} were computed: the first ratios are not 1 "
                    "(objective.dropout=false turns it off)"
                )
            try:
                self._go_on(log)
            finally:
                if log is not None:
                    log.close()
        self.model.eval()
        taken = self._take_best() if self.plan.load_best_at_end else at.step
        return TrainingResult(at.step, taken, at.tokens, at.seconds, at.flops, at.skipped, at.metrics)

    def _take_best(self) -> int:
        """The weights of the best checkpoint, and what was measured of it; every rank reads them. Returns its step."""
        path = checkpoint.best(self.directory)
        if path is None:
            return self.at.step
        saved = checkpoint.load(path)
        training_state.take(saved, self.model)
        self.at.metrics = saved.state["metrics"]
        step = int(saved.state["step"])
        self.told.say(f"ends with the model of step {step}, the best by held-out {self.plan.best_metric}")
        return step

    def _go_on(self, log: MetricsLog | None) -> None:
        at, checked = self.at, False
        ahead = not self.batches.source.on_policy
        with interrupt_handler(self.told.say) as stop, Prefetcher(self.batches.batches, enabled=ahead) as prefetcher:
            while not self._over:
                start = time.perf_counter()
                drawn = self._prepared()
                if drawn:
                    self._tell_drawn(log, drawn)
                here = prefetcher.take(at.step)
                if not checked:
                    self._refuse_silence(here)
                    checked = True
                if at.step + 1 != self.length.max_steps:
                    prefetcher.begin(at.step + 1)
                stopping = self._step(here, start, stop.requested)
                self._after(log, stopping)

    def _prepared(self) -> Mapping[str, float]:
        """What the source drew for this step. A source that fails (a user's reward) costs no step: it is saved first."""
        try:
            with self.casts():
                return self.batches.source.prepare(self.model, self.at.step)
        except UserError:
            if self.at.step:
                self._save()
                self.told.say(f"step {self.at.step} is saved in {self.directory}")
            raise

    def _refuse_silence(self, here: list[Batch]) -> None:
        """Training on nothing looks like training: the loss is 0 and no weight moves."""
        counts = count_targets(self.objective, [to(b, self.device) for b in here], self.ranks.sum)
        for term, target in self.objective.labels.items():
            if not counts[term]:
                raise UserError(
                    f"the first step asks nothing: no row of it holds a target in the field {target!r} (loss term "
                    f"{term!r}); check that the data has answers there, and that rows are not cut off before them"
                )

    def _step(self, here: list[Batch], start: float, asked: bool) -> bool:
        """One optimizer step; returns whether any rank was asked to stop."""
        at, ranks = self.at, self.ranks
        tokens, work = 0, 0.0
        for batch in here:
            tokens += flops.real_tokens(batch)
            work += self.learning * self.objective.forward_flops(self.model, batch)
            work += self.objective.loss_flops(self.model, batch)
        on_device = [to(batch, self.device) for batch in here]
        means = gradients(self.model, self.objective.at_step(at.step), on_device, ranks.sum, self.casts)
        ranks.sum_gradients(self.mover.parameters)
        norm = self.mover.clip_grad_norm()
        values = torch.stack([*(means[t] for t in self.objective.labels), norm])
        fine = bool(torch.isfinite(values).all())
        took = time.perf_counter() - start
        if ranks.world > 1:  # one clock, one verdict, one will
            agreed = torch.tensor([took / ranks.world, not fine, asked, tokens, work], device=self.device)
            took, bad, stops, tokens_, work = ranks.sum(agreed.double()).tolist()
            fine, asked, tokens = not bad, stops > 0, round(tokens_)
        middle = self.length.passed(at.step + 0.5, at.seconds + 0.5 * self.took, at.flops + 0.5 * work)
        factor = self.schedule.factor(middle)
        before = time.perf_counter()
        if fine:
            self.mover.step(factor)
            at.in_a_row = 0
        else:
            self._refuse_not_finite()
            self.mover.zero_grad()
            at.skipped += 1
            at.in_a_row += 1
        self.took = took + time.perf_counter() - before
        at.step += 1
        at.tokens += tokens
        at.seconds += self.took
        at.flops += work
        at.metrics = {k: v for k, v in at.metrics.items() if k.startswith("valid/")} | named(
            self.objective, dict(zip(means, torch.stack(list(means.values())).tolist(), strict=True))
        )
        at.metrics |= {"norm": float(norm), "rate": self.rate * factor}
        if at.in_a_row >= self.plan.max_bad_steps:
            raise UserError(
                f"{at.in_a_row} steps in a row, the last of them step {at.step}, gave a loss or a gradient that is not "
                f"finite; lower optimizer.lr (now {self.rate:g}) or lengthen schedule.warmup_ratio, and begin anew"
            )
        return asked

    def _after(self, log: MetricsLog | None, stopping: bool) -> None:
        """Rows, measurements, checkpoints."""
        at, plan = self.at, self.plan
        last = self._passed >= 1
        self._tell(log, last or stopping)
        if last or stopping or _due(at.step, plan.eval_every) or _due(at.step, plan.save_every):
            self._refuse_not_finite()
        self.score, better = None, False
        if self.evaluate is not None and (last or _due(at.step, plan.eval_every)):
            found = self._measure(self.evaluate)
            self._refuse_not_finite_measure(found)
            better = self._judge(found)
            at.metrics = {k: v for k, v in at.metrics.items() if not k.startswith("valid/")}
            at.metrics |= {f"valid/{name}": value for name, value in found.items()}
            if log is not None:
                log.row("valid", at.step, at.seconds, at.tokens, found)
            self.told.say(f"step {at.step}  held out: " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()))
        last = self._over
        if last or stopping or _due(at.step, plan.save_every) or (better and plan.load_best_at_end):
            self._save()
        if stopping and not last:
            raise Interrupted(
                f"stopped at step {at.step} and saved in {self.directory}; run the same command again to go on"
            )

    def _refuse_not_finite(self) -> None:
        """Raise a UserError where the weights are not finite, or the run ends on a loss that is not: neither is saved.

        The weights are the same on all ranks, and so is the verdict. It reads 16 GB/s, at saves, measurements and bad steps.
        """
        at = self.at
        name = training_state.not_finite(self.model)
        advice = f"lower optimizer.lr (now {self.rate:g}) or lengthen schedule.warmup_ratio, and begin anew"
        if name:
            raise UserError(
                f"step {at.step}: the optimizer has made the weight {name!r} infinite or NaN, so this model is not saved; "
                f"{advice}"
            )
        if at.in_a_row and self._passed >= 1:
            raise UserError(
                f"the run ends at step {at.step} on a loss or a gradient that is not finite ({at.in_a_row} in a row), so this "
                f"model is not saved; {advice}"
            )

    def _refuse_not_finite_measure(self, found: Mapping[str, float]) -> None:
        """Raise a UserError where a held-out measurement is NaN or a loss infinite, though the weights are finite.

        Another measure may be infinite: the exponential of a large finite loss is.
        """
        losses = ("loss", "bits_per_byte")
        names = [k for k, v in found.items() if math.isnan(v) or (k.startswith(losses) and math.isinf(v))]
        if names:
            raise UserError(
                f"step {self.at.step}: the held-out {names[0]} is {found[names[0]]}, while all weights are finite, so "
                "this model is not saved: check the held-out records for numbers too large for the model, set "
                f"precision=fp32 if it is bf16, or lower optimizer.lr (now {self.rate:g}) and begin anew"
            )

    def _judge(self, found: Mapping[str, float]) -> bool:
        """Whether a measurement is a new best; its score, of which less is better."""
        if self.plan.best_metric not in found:
            if self.plan.load_best_at_end:
                raise UserError(
                    f"evaluation.best_metric={self.plan.best_metric} is not among the held-out measurements: there is {', '.join(found)}"
                )
            return False
        value = found[self.plan.best_metric]
        self.score = value if self.plan.best_metric.startswith(LESS_IS_BETTER) else -value
        better = self.at.best is None or self.score < self.at.best
        self.at.best = self.score if better else self.at.best
        self.at.stale = 0 if better else self.at.stale + 1
        return better

    def _tell_drawn(self, log: MetricsLog | None, drawn: Mapping[str, float]) -> None:
        """A row of what the model wrote, under the step that first learns from it: a resumed run writes it once.

        A source names first what matters most, and that much is said aloud.
        """
        at = self.at
        if log is not None:
            log.row("rollouts", at.step + 1, at.seconds, at.tokens, drawn)
        known = [f"{name} {value:.4g}" for name, value in drawn.items() if math.isfinite(value)]
        self.told.say(f"step {at.step}  drawn: " + "  ".join(known[:5]))

    def _tell(self, log: MetricsLog | None, now: bool) -> None:
        at = self.at
        if not now and not _due(at.step, self.plan.log_every):
            return
        seconds, tokens, flops_ = self.marked
        spent = max(at.seconds - seconds, 1e-9)
        speed, work = (at.tokens - tokens) / spent, (at.flops - flops_) / spent
        self.marked = (at.seconds, at.tokens, at.flops)
        own = {k: v for k, v in at.metrics.items() if not k.startswith("valid/")}
        own |= {"tokens_per_second": round(speed, 1), "flops_per_second": round(work)}
        own |= {"flops": at.flops, "skipped": at.skipped}
        if log is not None:
            log.row("train", at.step, at.seconds, at.tokens, own)
        passed = self._passed
        steps = f"/{self.length.max_steps}" if self.length.max_steps else ""
        left = clock(at.seconds * (1 - passed) / passed)
        self.told.progress(
            passed,
            f"step {at.step}{steps}  loss {own['loss']:.4f}  {short(speed)} tokens/s  {short(work)}FLOP/s  {left} left"
            + (f"  {at.skipped} skipped" if at.skipped else ""),
        )

    def _measure(self, evaluate: Evaluate) -> dict[str, float]:
        """Looking must not change what is looked at: mode and random state are put back. Same precision."""
        self.model.eval()
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(devices), self.casts():
            found = evaluate(self.model, self.at.step)
        self.model.train(self.objective.dropout)
        return found

    def _save(self) -> None:
        training_state.save(
            self.directory, self.at, self.model, self.mover, self.batches.source, self.ranks,
            recipe=self.recipe, keep=self.plan.keep, score=self.score,
        )  # fmt: skip


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
