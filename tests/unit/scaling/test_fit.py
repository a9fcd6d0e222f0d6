"""Fits of tables whose law is known, and the formulas of the optimum against scipy's minimization."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from firth.scaling import fit
from firth.scaling.fit import SIX_N_D, ComputeRule, Estimate, LossLaw, RepeatLaw
from firth.scaling.fitted import FittedLaw, LawPoint, describe, epochs_worth, fit_points
from firth.scaling.table import Points
from tests.support.scaling import CHINCHILLA, CORRECTED, runs

LAWS = {"chinchilla": CHINCHILLA, "corrected": CORRECTED}
RULES = (SIX_N_D, ComputeRule(8.5, 0.93))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_optimum_is_the_minimum_along_constant_compute(law: LossLaw, rule: ComputeRule) -> None:
    for C in (1e15, 3e19, 6e23):
        N, D = law.optimum(C, rule)
        assert float(rule.flops(N, D)) == pytest.approx(C, rel=1e-12)
        found = minimize_scalar(
            lambda x, C=C: float(law.loss(np.exp(x), rule.tokens(np.exp(x), C))), bounds=(5, 40), method="bounded", options={"xatol": 1e-10}
        )  # fmt: skip
        assert np.log(N) == pytest.approx(found.x, abs=1e-5)
        assert float(law.parameters_for(D, rule)) == pytest.approx(N, rel=1e-9)
    ratio = np.log(law.optimum(1e22, rule)[0] / law.optimum(1e18, rule)[0]) / np.log(1e4)
    assert ratio == pytest.approx(law.exponent(rule), rel=1e-9)
    assert law.exponent() == pytest.approx(law.beta / (law.alpha + law.beta))


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_a_table_without_noise_gives_the_constants_exactly(law: LossLaw) -> None:
    points = runs(law)
    assert astuple(fit.fit_loss(points)) == pytest.approx(astuple(law), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_noisy_constants_are_within_their_intervals(law: LossLaw) -> None:
    points = runs(law, noise=0.004, seed=3)
    found = fit.fit_loss(points)
    draws = fit.bootstrap(points, found, 120, seed=0)
    for name in ("E", "A", "B", "alpha", "beta"):
        one = Estimate.of(getattr(found, name), [getattr(d, name) for d in draws])
        assert one.low < getattr(law, name) < one.high, name
        assert one.low < one.value < one.high
    a = fit.parametric(found, draws, SIX_N_D).a
    assert a.low < law.beta / (law.alpha + law.beta) < a.high
    assert a.high - a.low < 0.08


@pytest.mark.slow
def test_intervals_cover_the_truth_about_as_often_as_they_say() -> None:
    """Of 10 tables, a 95% interval of the exponent misses the truth in few; an interval of no width would in all."""
    covered = []
    for seed in range(10):
        points = runs(CHINCHILLA, noise=0.004, seed=seed, sizes=6)
        found = fit.fit_loss(points)
        a = fit.parametric(found, fit.bootstrap(points, found, 40, seed), SIX_N_D).a
        covered.append(a.low < CHINCHILLA.exponent() < a.high)
    assert sum(covered) >= 7


@pytest.mark.parametrize("law", LAWS.values(), ids=LAWS)
def test_the_three_approaches_agree_without_noise(law: LossLaw) -> None:
    points = runs(law, budgets=np.geomspace(1e19, 1e22, 8).tolist())
    for find in (fit.envelope, fit.isoflop):
        best = find(points, SIX_N_D)
        assert len(best) >= 6
        for C, N, D, loss in best:
            exact = law.optimum(C)
            assert exact == pytest.approx((N, D), rel=0.03)
            assert loss == pytest.approx(float(law.loss(*exact)), rel=4e-3)
    result = fit_points(points, draws=20)
    assert [one.missing for one in result.approaches] == ["", "", ""]
    for one in result.approaches:
        assert one.a.value == pytest.approx(law.exponent(), abs=0.006)
        assert one.b.value == pytest.approx(1 - law.exponent(), abs=0.006)
        assert one.parameters(1e21) == pytest.approx(law.optimum(1e21)[0], rel=0.03)


def test_the_gradient_is_that_of_the_sum_of_huber_losses() -> None:
    points = runs(CHINCHILLA, noise=0.002)
    problem = fit._Problem(points, np.arange(len(points)) % 3.0)
    theta = problem.theta(CORRECTED)
    _, gradient = problem.value(theta)
    for k in range(5):
        step = 1e-6 * np.eye(5)[k]
        slope = (problem.value(theta + step)[0] - problem.value(theta - step)[0]) / 2e-6
        assert gradient[k] == pytest.approx(slope, rel=1e-4, abs=1e-9)
    some = problem.value(theta)[0]
    twice = fit._Problem(points, 2 * (np.arange(len(points)) % 3.0)).value(theta)[0]
    assert twice == pytest.approx(2 * some)  # a sum, and no mean


def test_the_drift_of_runs_that_leave_the_law() -> None:
    """Without noise a law predicts a larger budget; where the largest runs are 5% below it, the drift says so, and the interval too."""
    points = runs(CORRECTED, sizes=6)
    assert fit.drift(points) < 1e-3
    lower = replace(points, loss=np.where(points.C > 5e21, 0.95 * points.loss, points.loss))
    assert fit.drift(lower) == pytest.approx(-np.log(0.95) / np.log(10), rel=0.1)
    assert fit.drift(runs(CORRECTED, sizes=6, budgets=(1e20, 1e21))) == 0.0
    exact = FittedLaw(CORRECTED, (CORRECTED,) * 400, SIX_N_D, (), (5e7, 2e10), (1e9, 1e12), (1e19, 1e22))
    N, D = CORRECTED.optimum(1e23)
    plain, wide = exact.loss(N, D), replace(exact, drift=0.02).loss(N, D)
    assert plain.low == pytest.approx(plain.value)
    assert np.log(wide.high / wide.value) == pytest.approx(1.96 * 0.02 * np.log(10), rel=0.15)
    inside = replace(exact, drift=0.02).loss(*CORRECTED.optimum(1e21))
    assert inside.low == pytest.approx(inside.value)


def repeated_runs(law: RepeatLaw, noise: float, seed: int = 0) -> Points:
    """Return runs of 1 to 32 epochs on two texts, and new-text runs to fit the law of new tokens."""
    new, rng = runs(law.law, noise, seed), np.random.default_rng(seed + 1)
    rows = [(N, U, epochs) for U in (1e9, 1e10) for epochs in (2, 4, 8, 16, 32) for N in (2e8, 1e9, 5e9)]
    N, U, epochs = np.array(rows).T
    loss = law.loss(N, U * epochs, U) * np.exp(rng.normal(0, noise, len(N)))
    join = np.concatenate
    return Points(
        join([new.N, N]), join([new.D, U * epochs]), join([new.loss, loss]), join([new.C, 6 * N * U * epochs]), join([new.unique, U]),
        tuple(f"runs:{i}" for i in range(len(new) + len(N))), True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_worth_of_repeats_is_recovered() -> None:
    law = RepeatLaw(CORRECTED, R_D=15.39, R_N=5.31)
    exact = fit_points(repeated_runs(law, 0.0), draws=4).fitted.repeats
    assert exact is not None
    assert pytest.approx((law.R_D, law.R_N), rel=0.01) == (exact.R_D, exact.R_N)
    covered = []
    for seed in (0, 10, 20, 30):
        noisy = fit_points(repeated_runs(law, 0.003, seed), draws=40).fitted
        for k, true in enumerate((law.R_D, law.R_N)):
            low, high = np.percentile([pair[k] for pair in noisy.repeat_draws], [2.5, 97.5])
            covered.append(low < true < high)
            assert 0.9 * low < true < 1.1 * high and high < 3 * low
        half = epochs_worth(noisy, 0.5)
        assert half.low < half.value < half.high
        assert half.value == pytest.approx(1 + law.R_D * np.log(2), rel=0.2)
    assert sum(covered) >= 6  # of 8; in table 0 the interval of R_D begins at 15.5


def test_repeats_follow_the_published_formula() -> None:
    """Muennighoff et al. 2023, equation 5: D' = U + U R* (1 - exp(-R / R*)) with R repeats of U tokens."""
    law = RepeatLaw(CHINCHILLA, R_D=15.0, R_N=5.0)
    U, epochs = 1e9, 7.0
    assert float(law.worth_of_tokens(U * epochs, U)) == pytest.approx(U + U * 15 * (1 - np.exp(-(epochs - 1) / 15)))
    assert float(law.worth_of_tokens(0.4 * U, U)) == pytest.approx(0.4 * U)
    slope = float(law.worth_of_tokens(U * epochs + 1e3, U) - law.worth_of_tokens(U * epochs, U)) / 1e3
    assert slope == pytest.approx(np.exp(-(epochs - 1) / 15), rel=1e-3)
    assert law.epochs_at_worth(float(slope)) == pytest.approx(epochs, rel=1e-3)
    few = float(CHINCHILLA.parameters_for(U))
    many = 1e6 * U  # all repeats have lost their worth, as the paper assumes for parameters
    assert float(law.worth_of_parameters(few / 2, many, U)) == pytest.approx(few / 2)
    assert float(law.worth_of_parameters(3 * few, many, U)) == pytest.approx(few + few * 5 * (1 - np.exp(-2 / 5)))
    assert float(law.loss(few / 2, U, U)) == pytest.approx(float(CHINCHILLA.loss(few / 2, U)))


@pytest.mark.parametrize("excess", [0.5, 1.0, 3.0, 30.0])
def test_the_law_of_repeats_is_continuous(excess: float) -> None:
    """At one epoch it is the law of new tokens, whatever the size of the model, and there is no jump after it."""
    law = RepeatLaw(CHINCHILLA, R_D=15.4, R_N=5.3)
    fitted = FittedLaw(CHINCHILLA, (), SIX_N_D, (), (1, 1), (1, 1), (1, 1), law, ((15.4, 5.3),))
    U = 1e8
    N = excess * float(CHINCHILLA.parameters_for(U))
    epochs = [0.5, 0.999, 1 - 1e-9, 1.0, 1 + 1e-9, 1.001, 1.01, 1.1, 2.0]
    losses = [fitted.expected_at(LawPoint(N, U * e, U)) for e in epochs]
    assert losses[:4] == pytest.approx([float(CHINCHILLA.loss(N, U * e)) for e in epochs[:4]], rel=1e-12)
    assert losses[4] == pytest.approx(losses[3], rel=1e-6)
    assert losses == sorted(losses, reverse=True)
    assert abs(losses[5] - losses[3]) < 2 * abs(losses[3] - losses[1])


def test_the_rule_of_compute_is_that_of_the_table() -> None:
    rule = ComputeRule(9.0, 0.95)
    points = runs(CHINCHILLA, rule=rule)
    assert astuple(fit.compute_rule(points)) == pytest.approx((9.0, 0.95))
    assert fit.compute_rule(replace(points, has_flops=False)) == SIX_N_D


@pytest.mark.slow
def test_a_saved_law_predicts_the_same(tmp_path: Path) -> None:
    points = replace(runs(CHINCHILLA, noise=0.003), bits_per_nat=0.36, flops_per_second=1e10)
    fitted = fit_points(points, draws=30, source={"text": "plays"}).fitted
    fitted.save(tmp_path / "fit.json")
    again = FittedLaw.load(tmp_path / "fit.json")
    assert (again.law, again.rule, again.sizes, again.flops, again.source) == (
        fitted.law,
        fitted.rule,
        fitted.sizes,
        fitted.flops,
        {"text": "plays"},
    )
    ours, theirs = fitted.optimum(1e23), again.optimum(1e23)
    assert astuple(ours.parameters) == pytest.approx(astuple(theirs.parameters), rel=1e-3)
    assert astuple(ours.loss) == pytest.approx(astuple(theirs.loss), rel=1e-4)
    assert ours.loss.low < float(CHINCHILLA.loss(*CHINCHILLA.optimum(1e23))) < ours.loss.high
    assert "10 times the largest" in fitted.extrapolation(1e23) and not fitted.extrapolation(1e22)
    text = describe(fit_points(points, draws=30), [1e23])
    assert "best for 1e+23 FLOPs" in text and "extrapolated" in text and "bits per byte" in text
