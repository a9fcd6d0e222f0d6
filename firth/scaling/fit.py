"""Fit scaling laws to a table of runs: Chinchilla's three approaches, intervals by the bootstrap, and repeated text.

1. Envelope: where the curves of loss over compute of two sizes cross, on the envelope of all curves.
2. IsoFLOP: a parabola of the loss over log N at each budget; its lowest point is the best size.
3. Parametric: L = E + A / N ** alpha + B / D ** beta, by the Huber loss of log L (delta 1e-3), with L-BFGS from a grid of starts
   (Hoffmann et al. 2022, section 3). The losses are summed, not averaged, and the optimizer runs to full precision: with the mean
   it stopped early, and the published constants were wrong (Besiroglu et al. 2024).

Intervals hold 95% of the fits to resampled tables. The third approach resamples rows. The first two need every budget, so
they resample the residuals of the third.

The formulas are the loss as a function of parameters and tokens, and the best of both for a compute budget:

    loss(N, D)     = E + A / N ** alpha + B / D ** beta                      (Hoffmann et al. 2022, equation 2)
    compute(N, D)  = factor * N ** power * D                                 (6 N D by default)
    with repeats   : N and D are replaced by what they are worth             (after Muennighoff et al. 2023, equations 5 to 7)

>>> law = LossLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
>>> N, D = law.optimum(5.76e23)
>>> f"{N:.3g} parameters, {D:.3g} tokens, loss {law.loss(N, D):.3f}"
'3.22e+10 parameters, 2.98e+12 tokens, loss 1.931'
>>> f"{RepeatLaw(law, R_D=15.4, R_N=5.3).worth_of_tokens(4e9, 1e9) / 1e9:.4f}"
'3.7259'
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from firth.fields import PositiveFloat, Validated
from firth.scaling.table import MIN_POINTS, Points
from firth.types import UserError

FloatArray = np.ndarray


@dataclass(frozen=True)
class ComputeRule(Validated):
    """FLOPs of a training run: factor * N ** power * D.

    A model of words has a large head and, at small widths, costly attention, so counted FLOPs are not 6 N D exactly.

    Args:
        factor: FLOPs per parameter and token.
        power: Exponent of the parameters.
    """

    factor: PositiveFloat = 6.0
    power: PositiveFloat = 1.0

    def flops(self, N: ArrayLike, D: ArrayLike) -> FloatArray:
        """Return the FLOPs of training N parameters on D tokens."""
        return self.factor * np.asarray(N, float) ** self.power * np.asarray(D, float)

    def tokens(self, N: ArrayLike, C: ArrayLike) -> FloatArray:
        """Return the tokens that N parameters read for C FLOPs."""
        return np.asarray(C, float) / (self.factor * np.asarray(N, float) ** self.power)


SIX_N_D = ComputeRule()


@dataclass(frozen=True)
class LossLaw(Validated):
    """Loss by parameters N and tokens D: E + A / N ** alpha + B / D ** beta.

    Args:
        E: Loss of an infinite model on infinite text.
        A: Factor of the parameters' term.
        B: Factor of the tokens' term.
        alpha: Exponent of the parameters.
        beta: Exponent of the tokens.
    """

    E: PositiveFloat
    A: PositiveFloat
    B: PositiveFloat
    alpha: PositiveFloat
    beta: PositiveFloat

    def loss(self, N: ArrayLike, D: ArrayLike) -> FloatArray:
        """Return the loss of N parameters after D tokens."""
        return self.E + self.A / np.asarray(N, float) ** self.alpha + self.B / np.asarray(D, float) ** self.beta

    def exponent(self, rule: ComputeRule = SIX_N_D) -> float:
        """Return a, where the best N grows with C ** a: beta / (alpha + beta) for 6 N D."""
        return self.beta / (self.alpha + rule.power * self.beta)

    def optimum(self, C: float, rule: ComputeRule = SIX_N_D) -> tuple[float, float]:
        """Return the parameters and the tokens of the least loss for C FLOPs.

        It is where the derivative of the loss along constant C is 0: alpha A / N ** alpha = power beta B / D ** beta.
        """
        ratio = self.alpha * self.A / (rule.power * self.beta * self.B)
        total = self.alpha + rule.power * self.beta
        N = ratio ** (1 / total) * (C / rule.factor) ** (self.beta / total)
        return N, float(rule.tokens(N, C))

    def parameters_for(self, D: ArrayLike, rule: ComputeRule = SIX_N_D) -> FloatArray:
        """Return the parameters for which D tokens are the optimum of their budget."""
        ratio = self.alpha * self.A / (rule.power * self.beta * self.B)
        return (ratio * np.asarray(D, float) ** self.beta) ** (1 / self.alpha)


@dataclass(frozen=True)
class RepeatLaw(Validated):
    """Loss where the text is read several times: repeated tokens and excess parameters are worth less than new ones.

    R repeats of U unique tokens are worth U * R_D * (1 - exp(-R / R_D)) new ones. Parameters beyond the N_U for which U tokens are
    the optimum are worth less in the same way: x * N_U of them are worth N_U * (R_N / s) * (1 - exp(-s * x / R_N)), where
    s = 1 - exp(-R / R_D) is what a repeated token has lost of its worth. In the paper s is 1, also for text that is read once, so
    that its loss jumps away from the law of new tokens after the first epoch. With s nothing is lost at R = 0, and the two agree
    for many epochs.

    Args:
        law: The law of new tokens.
        R_D: Repeats after which another one is worth 1 / e of new text.
        R_N: The same for parameters.
    """

    law: LossLaw
    R_D: PositiveFloat
    R_N: PositiveFloat

    def worth_of_tokens(self, D: ArrayLike, unique: ArrayLike) -> FloatArray:
        """Return the new tokens that D tokens from `unique` ones are worth."""
        D, unique = np.asarray(D, float), np.asarray(unique, float)
        return _worth(D, np.minimum(D, unique), self.R_D)

    def worth_of_parameters(
        self, N: ArrayLike, D: ArrayLike, unique: ArrayLike, rule: ComputeRule = SIX_N_D
    ) -> FloatArray:
        """Return the parameters that N are worth after D tokens from `unique` ones."""
        N, D, unique = np.asarray(N, float), np.asarray(D, float), np.asarray(unique, float)
        lost = -np.expm1(-np.maximum(0.0, D / unique - 1) / self.R_D)
        best = np.minimum(N, self.law.parameters_for(np.minimum(D, unique), rule))
        return _worth(N, best, self.R_N / np.maximum(lost, 1e-12))

    def loss(self, N: ArrayLike, D: ArrayLike, unique: ArrayLike, rule: ComputeRule = SIX_N_D) -> FloatArray:
        """Return the loss of N parameters after D tokens from `unique` ones."""
        return self.law.loss(self.worth_of_parameters(N, D, unique, rule), self.worth_of_tokens(D, unique))

    def epochs_at_worth(self, share: float) -> float:
        """Return the epochs after which a repeated token is worth `share` of a new one: 1 + R_D ln(1 / share)."""
        return 1 + self.R_D * float(np.log(1 / share))


def _worth(total: FloatArray, unique: FloatArray, decay: ArrayLike) -> FloatArray:
    """Return unique + unique * decay * (1 - exp(-repeats / decay))."""
    decay = np.asarray(decay, float)
    return unique - unique * decay * np.expm1(-(total / unique - 1) / decay)


HUBER_DELTA = 1e-3
NUM_STARTS = 24
"""Starts of the best values on the grid from which L-BFGS runs."""
BUDGET_TOLERANCE = 0.08
"""Runs whose FLOPs differ by less than this share have one budget."""
MAX_OUTLIER, OUTLIER_SIGMAS = 0.1, 12.0
"""A residual of log L above both (absolute, and in robust standard deviations) is that of a run that diverged."""
MAX_RATIO = 30.0
"""An interval of the best size from x to more than this times x is too wide to use."""
REPEATED = 1.05
"""Points with more epochs than this read text again."""

BOUNDS = [(-12.0, 3.0), (-30.0, 30.0), (-30.0, 30.0), (0.01, 2.5), (0.01, 2.5)]
"""Of e = log E, a = log A - alpha mean(log N), b = log B - beta mean(log D), alpha and beta."""


def scipy_module(name: str) -> Any:
    """Return a module of scipy.

    Raises:
        UserError: It is not installed.
    """
    # L-BFGS multiplies vectors of five numbers: more threads of scipy's BLAS only wait, seven times longer on a busy machine.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        return importlib.import_module(f"scipy.{name}")
    except ModuleNotFoundError:
        raise UserError("fitting a scaling law needs scipy: pip install 'firth[scale]'") from None


@dataclass(frozen=True)
class Estimate:
    """A number with the interval that holds 95% of its resampled values.

    >>> str(Estimate.of(0.45, [0.4, 0.5])), str(Estimate(2e6, 1e6, 1.5e7).text(".3g"))
    ('0.450 (0.403 to 0.497)', '2e+06 (1e+06 to 1.5e+07)')
    """

    value: float
    low: float
    high: float

    @staticmethod
    def of(value: float, samples: Sequence[float] | np.ndarray) -> Estimate:
        """Return a value with the interval of its samples."""
        known = np.asarray(samples, float)
        known = known[np.isfinite(known)]
        if not len(known):
            return Estimate(value, float("nan"), float("nan"))
        low, high = np.percentile(known, [2.5, 97.5])
        return Estimate(float(value), float(low), float(high))

    def times(self, factor: float) -> Estimate:
        """Return the value and its interval times a positive factor."""
        return Estimate(self.value * factor, self.low * factor, self.high * factor)

    def text(self, form: str = ".3f") -> str:
        """Return the value and its interval, formatted."""
        return f"{self.value:{form}} ({self.low:{form}} to {self.high:{form}})"

    def __str__(self) -> str:
        return self.text()


@dataclass(frozen=True)
class Exponents:
    """One approach's optimum: N = n0 * C ** a and D = d0 * C ** b.

    Args:
        name: The approach.
        a: Exponent of the parameters.
        b: Exponent of the tokens.
        best: The best sizes found, as (C, N, D, loss).
        missing: Why the approach gives no number; empty if it does.
        law: (log n0, a).
    """

    name: str
    a: Estimate
    b: Estimate
    best: tuple[tuple[float, float, float, float], ...] = ()
    missing: str = ""
    law: tuple[float, float] = (0.0, 0.0)

    def parameters(self, C: float) -> float:
        """Return the best number of parameters for C FLOPs."""
        return float(np.exp(self.law[0] + self.law[1] * np.log(C)))


def compute_rule(points: Points) -> ComputeRule:
    """Return the rule for FLOPs: fitted to those of the table, else 6 N D."""
    if not points.has_flops:
        return SIX_N_D
    log_n = np.log(points.N)
    power, factor = np.polyfit(log_n, np.log(points.C / points.D), 1)
    return ComputeRule(float(np.exp(factor)), float(power))


def fit_loss(points: Points, starts: Sequence[np.ndarray] | None = None, weights: np.ndarray | None = None) -> LossLaw:
    """Fit the parametric law.

    Args:
        points: The runs.
        starts: Centered constants to start from; None takes the best ones of a grid.
        weights: How often each run counts; 1 each by default.
    """
    problem = _Problem(points, np.ones(len(points)) if weights is None else weights)
    return problem.law(problem.minimize(problem.grid() if starts is None else starts))


class _Problem:
    """The sum of Huber losses of log L as a function of centered constants, with its gradient."""

    def __init__(self, points: Points, weights: np.ndarray) -> None:
        self.center = np.array([np.log(points.N).mean(), np.log(points.D).mean()])
        self.x, self.y = np.log(points.N) - self.center[0], np.log(points.D) - self.center[1]
        self.log_loss, self.weights = np.log(points.loss), weights

    def value(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the sum of losses and its gradient."""
        e, a, b, alpha, beta = theta
        terms = np.stack([np.full_like(self.x, e), a - alpha * self.x, b - beta * self.y])
        top = terms.max(0)
        shares = np.exp(terms - top)
        total = shares.sum(0)
        shares /= total
        residual = top + np.log(total) - self.log_loss
        size = np.abs(residual)
        inside = size <= HUBER_DELTA
        losses = np.where(inside, 0.5 * residual**2, HUBER_DELTA * (size - 0.5 * HUBER_DELTA))
        slope = self.weights * np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
        gradient = np.array(
            [(slope * shares[0]).sum(), (slope * shares[1]).sum(), (slope * shares[2]).sum(),
             -(slope * shares[1] * self.x).sum(), -(slope * shares[2] * self.y).sum()]
        )  # fmt: skip
        return float((self.weights * losses).sum()), gradient

    def grid(self) -> list[np.ndarray]:
        """Return the best starts of a grid: shares of the three terms in a typical loss, and the exponents."""
        typical = float(np.median(self.log_loss))
        found = []
        for e_share in (0.1, 0.3, 0.5, 0.7, 0.9):
            for a_share in (0.1, 0.3, 0.5, 0.7, 0.9):
                a_part = (1 - e_share) * a_share
                for alpha in (0.1, 0.2, 0.35, 0.5, 0.8, 1.2):
                    for beta in (0.1, 0.2, 0.35, 0.5, 0.8, 1.2):
                        parts = np.log([e_share, a_part, 1 - e_share - a_part]) + typical
                        theta = np.array([*parts, alpha, beta])
                        found.append((self.value(theta)[0], theta))
        found.sort(key=lambda pair: pair[0])
        return [theta for _, theta in found[:NUM_STARTS]]

    def minimize(self, starts: Sequence[np.ndarray], iterations: int = 5000, restarts: int = 2) -> np.ndarray:
        """Return the best constants that L-BFGS finds from any start.

        Args:
            starts: Where it starts.
            iterations: Most iterations from a start.
            restarts: How often it starts anew where it ended: a line search can stall near the end of its precision.
        """
        optimize = scipy_module("optimize")
        best: tuple[float, np.ndarray] | None = None
        scale = 1 / HUBER_DELTA**2  # the optimizer's tolerances are absolute
        for start in starts:
            for _ in range(1 + restarts):
                found = optimize.minimize(
                    lambda theta: tuple(scale * part for part in self.value(theta)), start, jac=True, method="L-BFGS-B", bounds=BOUNDS,
                    options={"maxiter": iterations, "maxfun": 4 * iterations, "ftol": 1e-14, "gtol": 1e-9, "maxcor": 20},
                )  # fmt: skip
                moved = np.abs(found.x - start).max()
                start = found.x
                if moved < 1e-9:
                    break
            if best is None or found.fun < best[0]:
                best = (float(found.fun), found.x)
        assert best is not None
        return best[1]

    def law(self, theta: np.ndarray) -> LossLaw:
        """Return the law of centered constants."""
        e, a, b, alpha, beta = (float(v) for v in theta)
        A, B = a + alpha * self.center[0], b + beta * self.center[1]
        return LossLaw(float(np.exp(e)), float(np.exp(A)), float(np.exp(B)), alpha, beta)

    def theta(self, law: LossLaw) -> np.ndarray:
        """Return the centered constants of a law."""
        a, b = np.log(law.A) - law.alpha * self.center[0], np.log(law.B) - law.beta * self.center[1]
        return np.array([np.log(law.E), a, b, law.alpha, law.beta])


def bootstrap(points: Points, law: LossLaw, draws: int, seed: int) -> list[LossLaw]:
    """Return the laws of tables whose rows are drawn with replacement."""
    rng = np.random.default_rng(seed)
    laws = []
    for _ in range(draws):
        weights = np.bincount(rng.integers(0, len(points), len(points)), minlength=len(points)).astype(float)
        problem = _Problem(points, weights)
        first = problem.theta(law)
        second = first + rng.normal(0, [0.3, 0.3, 0.3, 0.05, 0.05])
        laws.append(problem.law(problem.minimize([first, second], 300, 0)))  # a table without a law has no end
    return laws


def residuals(points: Points, law: LossLaw) -> np.ndarray:
    """Return log of the loss minus log of the law's loss."""
    return np.log(points.loss) - np.log(law.loss(points.N, points.D))


def check_outliers(points: Points, law: LossLaw) -> np.ndarray:
    """Return whether each point is an outlier, whose run diverged without a NaN."""
    left = residuals(points, law)
    sigma = 1.4826 * float(np.median(np.abs(left - np.median(left))))
    return np.asarray(np.abs(left) > max(MAX_OUTLIER, OUTLIER_SIGMAS * sigma))


def parametric(law: LossLaw, laws: Sequence[LossLaw], rule: ComputeRule) -> Exponents:
    """Return the exponents of the third approach."""
    a = Estimate.of(law.exponent(rule), [one.exponent(rule) for one in laws])
    b = Estimate.of(1 - rule.power * a.value, [1 - rule.power * one.exponent(rule) for one in laws])
    N, _ = law.optimum(1.0, rule)
    return Exponents("parametric", a, b, law=(float(np.log(N)), a.value))


Finder = Callable[[Points, ComputeRule], list[tuple[float, float, float, float]]]


def envelope(points: Points, rule: ComputeRule) -> list[tuple[float, float, float, float]]:
    """Return best sizes, (C, N, D, loss), from the lower envelope of the curves loss(C) of each size.

    A curve is a polynomial of log loss over log C through the runs of a size, of degree 1 to 3. Where the envelope goes from one
    size to the next, both are equally far from the best one, which is taken to be their geometric mean.
    """
    sizes, losses = [], []
    grid = np.linspace(np.log(points.C.min()), np.log(points.C.max()), 1500)
    for n in np.unique(points.N):
        own = np.flatnonzero(n == points.N)
        own = own[np.argsort(points.C[own])]
        if len(own) < 2:
            continue
        x, y = np.log(points.C[own]), np.log(points.loss[own])
        smooth = np.polyval(np.polyfit(x - x[0], y, min(3, max(1, len(own) - 2))), grid - x[0])
        sizes.append(float(n))
        losses.append(np.where((grid >= x[0] - 1e-9) & (grid <= x[-1] + 1e-9), smooth, np.inf))
    if len(sizes) < 3:
        return []
    table = np.stack(losses)
    which = table.argmin(0)
    best = []
    for i in np.flatnonzero(np.diff(which)):
        pair = which[[i, i + 1]]
        if np.isfinite(table[pair[:, None], [[i, i + 1]]]).all():  # where a curve ends is no crossing
            C, N = float(np.exp(grid[i : i + 2].mean())), float(np.sqrt(sizes[pair[0]] * sizes[pair[1]]))
            best.append((C, N, float(rule.tokens(N, C)), float(np.exp(table[which[i], i]))))
    return best


def budget_groups(points: Points) -> list[np.ndarray]:
    """Return the indices of the points of each budget, for budgets with at least three sizes."""
    order = np.argsort(points.C)
    cuts = np.flatnonzero(np.diff(np.log(points.C[order])) > BUDGET_TOLERANCE) + 1
    return [group for group in np.split(order, cuts) if len(np.unique(points.N[group])) >= 3]


def isoflop(points: Points, rule: ComputeRule) -> list[tuple[float, float, float, float]]:
    """Return the best size of each budget, (C, N, D, loss), by a parabola of the loss over log N through the lowest points.

    A parabola fits near its lowest point only, so it takes the five sizes around the best one. Budgets whose best size is at
    an end are left out.
    """
    best = []
    for group in budget_groups(points):
        own = group[np.argsort(points.N[group])]
        lowest = int(points.loss[own].argmin())
        near = own[max(0, lowest - 2) : lowest + 3]
        if len(np.unique(points.N[near])) < 3:
            continue
        x, C = np.log(points.N[near]), float(np.exp(np.log(points.C[own]).mean()))
        # Runs end with a whole step, so their FLOPs differ a little; the loss changes by the slope of the best ones.
        curve = np.polyfit(x, points.loss[near], 2)
        lowest_x = -curve[1] / (2 * curve[0]) if curve[0] > 0 else np.nan
        ends = np.log(points.N[own])
        if curve[0] > 0 and ends.min() < lowest_x < ends.max():
            N = float(np.exp(lowest_x))
            best.append((C, N, float(rule.tokens(N, C)), float(np.polyval(curve, lowest_x))))
    return best


def by_search(
    name: str, find: Finder, points: Points, rule: ComputeRule, law: LossLaw, draws: int, seed: int
) -> Exponents:
    """Return the exponents of an approach that finds best sizes and fits a line through them.

    Args:
        name: Name of the approach.
        find: Finds the best sizes.
        points: The runs.
        rule: FLOPs of a run.
        law: The parametric law, whose residuals are resampled for the interval.
        draws: Number of resampled tables.
        seed: Seed of the draws.
    """
    best = find(points, rule)
    none = Estimate(float("nan"), float("nan"), float("nan"))
    if len({round(b[0]) for b in best}) < 2:
        what = "budgets whose best size is between others" if find is isoflop else "crossings on the envelope"
        return Exponents(
            name, none, none, tuple(best), f"there are fewer than two {what}: add sizes on both sides, and budgets"
        )
    rng, samples = np.random.default_rng(seed), []
    intercept, slope = _slope(best)
    # The search is biased (few sizes, a parabola), so the spread of the resampled tables is put around the slope that was found.
    exact = find(replace(points, loss=law.loss(points.N, points.D)), rule)
    center = _slope(exact)[1] if len({round(b[0]) for b in exact}) >= 2 else slope
    left = residuals(points, law) * np.sqrt(len(points) / max(1, len(points) - 5))
    for _ in range(draws):
        noisy = law.loss(points.N, points.D) * np.exp(rng.choice(left, len(points)))
        found = find(replace(points, loss=noisy), rule)
        if len({round(b[0]) for b in found}) >= 2:
            samples.append(slope + _slope(found)[1] - center)
    a = Estimate.of(slope, samples)
    b = Estimate.of(1 - rule.power * slope, [1 - rule.power * s for s in samples])
    return Exponents(name, a, b, tuple(best), law=(intercept, slope))


def _slope(best: Sequence[tuple[float, float, float, float]]) -> tuple[float, float]:
    """Return intercept and slope of log N over log C."""
    with warnings.catch_warnings(action="ignore"):
        slope, intercept = np.polyfit(np.log([b[0] for b in best]), np.log([b[1] for b in best]), 1)
    return float(intercept), float(slope)


def drift(points: Points) -> float:
    """Return the error of log L that a law makes for each factor e of compute beyond its runs.

    A law of the smaller budgets predicts the runs of the largest budget with several sizes, and of those above. 0 if there are too
    few runs to leave them out.
    """
    groups = budget_groups(points)
    if len(groups) < 3:
        return 0.0
    least = float(points.C[groups[-1]].min())
    below = np.less(points.C, least)
    if below.sum() < MIN_POINTS:
        return 0.0
    smaller, larger = points.take(np.flatnonzero(below)), points.take(np.flatnonzero(~below))
    error = residuals(larger, fit_loss(smaller)) / np.log(larger.C / smaller.C.max())
    return float(np.sqrt((error**2).mean()))


def fit_repeats(points: Points, law: LossLaw, rule: ComputeRule) -> RepeatLaw:
    """Fit R_D and R_N on runs that read text again, with the law of new tokens held fixed.

    Only runs with several epochs determine the two, so these are the points.
    """
    optimize = scipy_module("optimize")

    def value(theta: np.ndarray) -> float:
        predicted = RepeatLaw(law, float(np.exp(theta[0])), float(np.exp(theta[1]))).loss(
            points.N, points.D, points.unique, rule
        )
        size = np.abs(np.log(predicted) - np.log(points.loss))
        huber = np.where(size <= HUBER_DELTA, 0.5 * size**2, HUBER_DELTA * (size - 0.5 * HUBER_DELTA))
        return float(huber.sum() / HUBER_DELTA**2)

    found = [
        optimize.minimize(value, np.log([r_d, r_n]), method="L-BFGS-B", bounds=[(-3.0, 7.0), (-3.0, 7.0)], options={"ftol": 1e-13})
        for r_d in (1.0, 5.0, 25.0) for r_n in (1.0, 5.0, 25.0)
    ]  # fmt: skip
    best = min(found, key=lambda one: float(one.fun))
    return RepeatLaw(law, float(np.exp(best.x[0])), float(np.exp(best.x[1])))
