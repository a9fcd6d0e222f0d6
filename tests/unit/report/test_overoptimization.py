"""Gao's form is recovered, and the step where reward and true score part is found, or not named at all."""

import math

import numpy as np
import pytest

from firth.report.sections import gao_fit, parting


def phases(
    alpha: float, beta: float, noise: float = 0.0, count: int = 60, rising: bool = True
) -> list[dict[str, float]]:
    """Return phases whose divergence grows to 25 nats; the true score follows Gao's form, the reward d."""
    rng = np.random.default_rng(0)
    rows = []
    for i, kl in enumerate(np.linspace(0, 25, count)):
        d = math.sqrt(kl)
        gain = d * (alpha - beta * math.log(d)) if d else 0.0
        reward = d if rising else min(d, 1.5)
        rows.append(
            {"step": 4 * i + 1, "kl_per_answer": kl, "reward": reward + noise * rng.normal(), "truth": 0.5 + gain + noise * rng.normal()}
        )  # fmt: skip
    return rows


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.6), (0.4, 0.1), (-0.2, 0.05)])
def test_gao_constants_are_recovered(alpha: float, beta: float) -> None:
    rows = phases(alpha, beta)
    fit = gao_fit([row["kl_per_answer"] for row in rows], [row["truth"] for row in rows])
    assert fit is not None
    assert (fit.alpha, fit.beta, fit.start, fit.r_squared) == pytest.approx((alpha, beta, 0.5, 1.0), abs=1e-6)
    assert fit(9.0) == pytest.approx(0.5 + 3 * (alpha - beta * math.log(3)))
    assert gao_fit([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]) is None


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_the_parting_is_at_the_maximum_of_the_true_score(noise: float) -> None:
    """d (1 - 0.6 log d) is largest at log d = 1 / 0.6 - 1, which is 3.8 nats."""
    found = parting(phases(1.0, 0.6, noise))
    assert found is not None
    expected = math.exp(2 * (1 / 0.6 - 1))
    assert found.kl == pytest.approx(expected, abs=1.5)
    assert found.step == pytest.approx(4 * 59 * expected / 25, abs=16)
    assert found.truth[0] > found.truth[1] + 0.5
    assert found.reward[1] > found.reward[0]


def test_nothing_is_named_without_over_optimization() -> None:
    assert parting(phases(1.0, 0.1)) is None, "the true score still rises"
    assert parting(phases(1.0, 0.6)[:5]) is None, "too few phases"
    assert parting(phases(0.0, 0.0, noise=0.05)) is None, "the true score only varies by chance"
    rows = phases(1.0, 0.6)
    for row in rows:
        row["reward"] = row["truth"]
    assert parting(rows) is None, "the reward falls with it"
    assert parting([row | {"truth": None} for row in rows]) is None
