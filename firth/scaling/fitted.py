"""A fitted scaling law: what it predicts with intervals, as a file that `firth plan` reads, and as text.

fitted = fit_table(Path("runs/scale/table.jsonl"))
fitted.optimum(1e13).parameters            # Estimate(value, low, high)
fitted.loss(1e6, 2e7)
fitted.save(Path("runs/scale/fit.json"))
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from firth.io.integrity import read_record, write_record
from firth.report.charts import number
from firth.scaling import fit
from firth.scaling.fit import ComputeRule, Estimate, Exponents, LossLaw, RepeatLaw
from firth.scaling.table import MIN_POINTS, Points
from firth.types import UserError

CONSTANTS = ("E", "A", "B", "alpha", "beta")
MIN_REPEATED = 4
"""Fewest runs of several epochs that R_D and R_N are fitted to."""
FAR = 3.0
"""A prediction for more than this times the largest fitted compute is marked as an extrapolation."""


@dataclass(frozen=True)
class LawPoint:
    """Where a law is read.

    Args:
        parameters: Parameters.
        tokens: Tokens.
        unique: Unique tokens among them; 0 if all are new.
    """

    parameters: float
    tokens: float
    unique: float = 0.0


@dataclass(frozen=True)
class Optimum:
    """The best run for a budget.

    Args:
        flops: The budget.
        parameters: Parameters.
        tokens: Tokens.
        loss: The loss of a run at the optimum, with the scatter of single runs.
        too_wide: Why the size cannot be used; empty if it can.
    """

    flops: float
    parameters: Estimate
    tokens: Estimate
    loss: Estimate
    too_wide: str = ""


@dataclass(frozen=True)
class FittedLaw:
    """A scaling law with what its intervals need.

    Args:
        law: The law of new tokens.
        draws: The laws of resampled tables.
        rule: FLOPs of a run.
        residuals: Log loss minus that of the law, of each point.
        sizes: Fewest and most parameters of a point.
        tokens: Fewest and most tokens.
        flops: Least and most FLOPs.
        repeats: The law of repeated text; None if no run read text again.
        repeat_draws: Its resampled (R_D, R_N).
        bits_per_nat: Bits per byte for each unit of loss; 0 if unknown.
        flops_per_second: Median speed of the runs; 0 if unknown.
        drift: Error of log loss for each factor e of compute beyond the points (`firth.scaling.fit.drift`).
        source: Where the points are from.
    """

    law: LossLaw
    draws: tuple[LossLaw, ...]
    rule: ComputeRule
    residuals: tuple[float, ...]
    sizes: tuple[float, float]
    tokens: tuple[float, float]
    flops: tuple[float, float]
    repeats: RepeatLaw | None = None
    repeat_draws: tuple[tuple[float, float], ...] = ()
    bits_per_nat: float = 0.0
    flops_per_second: float = 0.0
    drift: float = 0.0
    source: Mapping[str, Any] = field(default_factory=dict)

    def optimum(self, C: float) -> Optimum:
        """Return the best parameters and tokens for C FLOPs, and the loss to expect."""
        best = [one.optimum(C, self.rule) for one in (self.law, *self.draws)]
        N, D = (Estimate.of(best[0][k], [b[k] for b in best[1:]]) for k in (0, 1))
        why = ""
        if not N.high <= fit.MAX_RATIO * N.low:
            why = (
                f"the best size for {C:.3g} FLOPs is not determined: its interval is {number(N.low, 3)} to {number(N.high, 3)} parameters; "
                "train more points, of sizes further from each other"
            )
        return Optimum(C, N, D, self.loss(*best[0]), why)

    def loss(self, N: float, D: float, unique: float = 0.0) -> Estimate:
        """Return the loss of a run; see `loss_at`."""
        return self.loss_at(LawPoint(N, D, unique))

    def loss_at(self, point: LawPoint) -> Estimate:
        """Return the loss of a run.

        Its interval has the uncertainty of the law, the scatter of single runs, and beyond the compute of the points the drift.
        """
        samples = self._samples(point) * np.exp(self._noise(0) + self._drift(point))
        return Estimate.of(self.expected_at(point), samples)

    def ratio(self, point: LawPoint, known: LawPoint) -> Estimate:
        """Return the loss of a run over that of another one on the same text, with the scatter of both."""
        samples = self._samples(point) / self._samples(known)
        noise = self._noise(0) - self._noise(1) + self._drift(point) - self._drift(known)
        return Estimate.of(self.expected_at(point) / self.expected_at(known), samples * np.exp(noise))

    def expected_at(self, point: LawPoint) -> float:
        """Return the loss of a run, without its interval."""
        return self._loss(self.law, self.repeats, point)

    def compute(self, point: LawPoint) -> float:
        """Return the FLOPs of a run."""
        return float(self.rule.flops(point.parameters, point.tokens))

    def _samples(self, point: LawPoint) -> np.ndarray:
        """Return the losses of a run by the resampled laws."""
        pairs = self.repeat_draws
        return np.array(
            [
                self._loss(one, self.repeats and RepeatLaw(one, *pairs[k % len(pairs)]), point)
                for k, one in enumerate(self.draws)
            ]
        )

    def _noise(self, seed: int) -> np.ndarray:
        """Return the scatter of single runs, of log loss."""
        count = len(self.draws)
        return np.random.default_rng(seed).choice(self.residuals, count) if self.residuals else np.zeros(count)

    def _drift(self, point: LawPoint) -> np.ndarray:
        """Return errors of log loss beyond the compute of the points; the same draws for every point."""
        beyond = max(0.0, float(np.log(self.compute(point) / self.flops[1])))
        return np.random.default_rng(2).normal(0.0, 1.0, len(self.draws)) * self.drift * beyond

    def _loss(self, law: LossLaw, repeats: RepeatLaw | None, point: LawPoint) -> float:
        if repeats is None or not point.unique:
            return float(law.loss(point.parameters, point.tokens))
        return float(repeats.loss(point.parameters, point.tokens, point.unique, self.rule))

    def extrapolation(self, C: float) -> str:
        """Return a warning for a budget far above those of the points; empty otherwise."""
        factor = C / self.flops[1]
        return f"{factor:.0f} times the largest compute of the points" if factor > FAR else ""

    def save(self, path: Path) -> None:
        """Write the law as JSON."""
        fields = asdict(self)
        fields["draws"] = [[float(f"{v:.6g}") for v in astuple(one)] for one in self.draws]
        fields["repeats"] = [self.repeats.R_D, self.repeats.R_N] if self.repeats else None
        fields["repeat_draws"] = [[float(f"{v:.6g}") for v in pair] for pair in self.repeat_draws]
        fields["residuals"] = [round(v, 6) for v in self.residuals]
        write_record(path, fields)

    @staticmethod
    def load(path: Path) -> FittedLaw:
        """Read a law.

        Raises:
            UserError: The file is no law, or damaged.
        """
        needs = {
            "law": dict,
            "rule": dict,
            "draws": list,
            "residuals": list,
            "sizes": list,
            "tokens": list,
            "flops": list,
        }
        found = read_record(path, needs, "write it again with `firth scale fit`")
        law = LossLaw(**found["law"])
        repeats = found.get("repeats")
        return FittedLaw(
            law, tuple(LossLaw(*one) for one in found["draws"]), ComputeRule(**found["rule"]), tuple(found["residuals"]),
            tuple(found["sizes"]), tuple(found["tokens"]), tuple(found["flops"]), repeats and RepeatLaw(law, *repeats),
            tuple((r[0], r[1]) for r in found.get("repeat_draws", ())), found.get("bits_per_nat", 0.0),
            found.get("flops_per_second", 0.0), found.get("drift", 0.0), found.get("source", {}),
        )  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """A fit and what it was made of.

    Args:
        fitted: The law.
        approaches: The three approaches.
        points: The points that the law of new tokens was fitted to.
        repeated: The points that read text again.
        excluded: Points that were left out, a sentence each.
    """

    fitted: FittedLaw
    approaches: tuple[Exponents, ...]
    points: Points
    repeated: Points
    excluded: tuple[str, ...] = ()


def fit_points(
    points: Points,
    draws: int = 400,
    seed: int = 0,
    skip_diverged: bool = False,
    source: Mapping[str, Any] | None = None,
) -> Fit:
    """Fit all approaches, and the law of repeated text if some runs read text again.

    Raises:
        UserError: There are too few points, a run diverged, or the points determine no law.
    """
    again = points.epochs > fit.REPEATED
    once, repeated = points.take(~again), points.take(again)
    if len(once) < MIN_POINTS:
        raise UserError(
            f"only {len(once)} of {len(points)} points read their text once, and a law of new text needs {MIN_POINTS}: add runs on "
            "more text, or shorter ones"
        )
    law = fit.fit_loss(once)
    excluded = list(points.skipped)
    odd = fit.check_outliers(once, law)
    if odd.any():
        i = int(np.flatnonzero(odd)[0])
        why = f"{once.where[i]}: the loss {once.loss[i]:.3g} is far from the {float(law.loss(once.N[i], once.D[i])):.3g} of the other runs"
        high = once.loss[i] > float(law.loss(once.N[i], once.D[i]))
        cause = (
            "this run diverged"
            if high
            else "this model learned what the others have not, and the runs follow no common law"
        )
        if not skip_diverged:
            raise UserError(
                f"{why}: {cause}, or its unit or text is another; delete the row, or leave it out with --skip-diverged"
            )
        excluded += [f"{once.where[k]}: its loss {once.loss[k]:.3g} is an outlier" for k in np.flatnonzero(odd)]
        once = once.take(~odd)
        law = fit.fit_loss(once)
    rule = fit.compute_rule(once)
    laws = fit.bootstrap(once, law, draws, seed)
    approaches = (
        fit.by_search("envelope", fit.envelope, once, rule, law, min(draws, 200), seed),
        fit.by_search("isoflop", fit.isoflop, once, rule, law, min(draws, 200), seed),
        fit.parametric(law, laws, rule),
    )
    repeats, repeat_draws = None, []
    if len(repeated) >= MIN_REPEATED:
        repeats = fit.fit_repeats(repeated, law, rule)
        rng = np.random.default_rng(seed)
        for one in laws[: min(draws, 200)]:
            some = fit.fit_repeats(repeated.take(rng.integers(0, len(repeated), len(repeated))), one, rule)
            repeat_draws.append((some.R_D, some.R_N))
    fitted = FittedLaw(
        law, tuple(laws), rule, tuple(fit.residuals(once, law).tolist()), (float(once.N.min()), float(once.N.max())),
        (float(once.D.min()), float(once.D.max())), (float(once.C.min()), float(once.C.max())), repeats, tuple(repeat_draws),
        points.bits_per_nat, points.flops_per_second, fit.drift(once), dict(source or {}),
    )  # fmt: skip
    return Fit(fitted, approaches, once, repeated, tuple(excluded))


def describe(result: Fit, budgets: Sequence[float]) -> str:
    """Return the fit as text; what the points do not determine is a sentence and no number."""
    fitted, points = result.fitted, result.points
    rule = fitted.rule
    lines = [
        f"{len(points)} runs of {len(np.unique(points.N))} sizes, {number(fitted.flops[0], 3)} to {number(fitted.flops[1], 3)} FLOPs; "
        + (f"FLOPs = {rule.factor:.3g} N^{rule.power:.3g} D" if points.has_flops else "FLOPs = 6 N D"),
        *(f"left out: {one}" for one in result.excluded),
        "",
        "loss = E + A / N^alpha + B / D^beta, with 95% intervals",
    ]
    for name in CONSTANTS:
        one = Estimate.of(getattr(fitted.law, name), [getattr(law, name) for law in fitted.draws])
        lines.append(f"  {name:<6} {one.text('.4g')}")
    size = np.abs(fitted.residuals)
    lines += [f"  residuals of log loss: median {np.median(size):.2%}, largest {size.max():.2%}", ""]
    lines.append("best size N ~ C^a, best tokens D ~ C^b")
    for approach in result.approaches:
        lines.append(f"  {approach.name:<11}" + (approach.missing or f"a {approach.a}   b {approach.b}"))
    for C in budgets:
        lines += ["", optimum_text(fitted, C)]
    lines += repeat_lines(result)
    return "\n".join(lines)


def optimum_text(fitted: FittedLaw, C: float) -> str:
    """Return the optimum of a budget in a line, or why there is none."""
    best = fitted.optimum(C)
    if best.too_wide:
        return best.too_wide
    far = fitted.extrapolation(C)
    bits = f", {best.loss.value * fitted.bits_per_nat:.3f} bits per byte" if fitted.bits_per_nat else ""
    return (
        f"best for {C:.3g} FLOPs: {_interval(best.parameters)} parameters, {_interval(best.tokens)} tokens, loss {best.loss}{bits}"
        + (f" (extrapolated: {far})" if far else "")
    )


def repeat_lines(result: Fit) -> list[str]:
    """Return what is known about repeated text."""
    fitted, count = result.fitted, len(result.repeated)
    if not count:
        return []
    if fitted.repeats is None:
        return [
            "",
            f"{count} runs read text again, too few to say what a repeat is worth: train at least {MIN_REPEATED}",
        ]
    R_D, R_N = (
        Estimate.of(value, [pair[k] for pair in fitted.repeat_draws])
        for k, value in enumerate((fitted.repeats.R_D, fitted.repeats.R_N))
    )
    lines = ["", f"repeated text ({count} runs of up to {result.repeated.epochs.max():.0f} epochs)"]
    if not R_D.high <= fit.MAX_RATIO * R_D.low:
        return [
            *lines,
            f"  how many epochs are worth it is not determined: R_D is {R_D.low:.2g} to {R_D.high:.2g}; train more runs of many epochs",
        ]
    half = epochs_worth(fitted, 0.5)
    lines.append(f"  R_D {R_D.text('.3g')}, " + (
        f"R_N {R_N.text('.3g')}" if R_N.high <= fit.MAX_RATIO * R_N.low else "R_N is not determined by these runs"
    ))  # fmt: skip
    lines.append(
        f"  a repeated token is worth half a new one after {half.text('.2g')} epochs; all repeats together are worth at most "
        f"{R_D.text('.2g')} times the text"
    )
    return lines


def epochs_worth(fitted: FittedLaw, share: float) -> Estimate:
    """Return the epochs after which a repeated token is worth `share` of a new one."""
    assert fitted.repeats is not None
    samples = [replace(fitted.repeats, R_D=pair[0]).epochs_at_worth(share) for pair in fitted.repeat_draws]
    return Estimate.of(fitted.repeats.epochs_at_worth(share), samples)


def _interval(one: Estimate) -> str:
    return f"{number(one.value, 3)} ({number(one.low, 3)} to {number(one.high, 3)})"
