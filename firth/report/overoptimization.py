"""Over-optimization: where a true score stops rising while the reward that is trained on still does.

Gao 2022 ("Scaling laws for reward model overoptimization", section 3) measures the gain of the true score over the initial
policy as a function of d = sqrt(KL), and finds for reinforcement learning

    R(d) = d (alpha - beta log d)

which rises, has its maximum at log d = alpha / beta - 1, and falls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MIN_PHASES = 8
"""Fewest rollout phases with a true score that are enough for a verdict."""

NOISE = 2.0
"""Standard errors by which the true score must have fallen."""


@dataclass(frozen=True)
class GaoFit:
    """Gao's form, fitted by least squares.

    Args:
        alpha: Gain per unit of d at first.
        beta: How fast it is lost.
        start: The true score of the initial policy.
        r_squared: The share of the variance that it explains.
    """

    alpha: float
    beta: float
    start: float
    r_squared: float

    def __call__(self, kl: float) -> float:
        """Return the fitted true score at a divergence in nats.

        >>> round(GaoFit(alpha=1.0, beta=0.5, start=2.0, r_squared=1.0)(4.0), 4)
        3.3069
        """
        d = float(np.sqrt(kl))
        return self.start + d * (self.alpha - self.beta * float(np.log(d))) if d else self.start


def gao_fit(kl: Sequence[float], truth: Sequence[float]) -> GaoFit | None:
    """Fit Gao's form to true scores over divergences, the initial policy's score included; None for too few points."""
    x, y = np.array(kl, float), np.array(truth, float)
    far = x > 1e-4
    if far.sum() < MIN_PHASES:
        return None
    d = np.sqrt(np.where(far, x, 1.0))
    design = np.stack((np.where(far, d, 0), np.where(far, -d * np.log(d), 0), np.ones_like(d)), 1)
    [alpha, beta, start], *_ = np.linalg.lstsq(design, y, rcond=None)
    rest = y - design @ np.array([alpha, beta, start])
    variance = float(y.var())
    return GaoFit(float(alpha), float(beta), float(start), 1 - float(rest.var()) / variance if variance else 0.0)


@dataclass(frozen=True)
class Parting:
    """Where reward and true score part. The scores are means over a tenth of the phases.

    Args:
        step: The step at which the true score was best.
        kl: The divergence there, in nats per answer.
        truth: The true score there, and at the end.
        reward: The reward there, and at the end.
    """

    step: int
    kl: float
    truth: tuple[float, float]
    reward: tuple[float, float]


def parting(phases: Sequence[Mapping[str, Any]]) -> Parting | None:
    """Return where the true score was best, if it has fallen since by more than noise while the reward rose; else None.

    Args:
        phases: Rows of rollout phases with "step", "kl_per_answer", "reward" and "truth".
    """
    rows = [row for row in phases if None not in (row.get("kl_per_answer"), row.get("reward"), row.get("truth"))]
    if len(rows) < MIN_PHASES:
        return None
    width = max(2, len(rows) // 10)
    kernel = np.ones(width) / width
    truth, reward, kl = (
        np.convolve([float(row[name]) for row in rows], kernel, "valid")
        for name in ("truth", "reward", "kl_per_answer")
    )
    # Differences of neighbors have twice the variance of the noise, whatever the trend.
    noise = np.diff([float(row["truth"]) for row in rows]).std() / np.sqrt(2)
    best = int(truth.argmax())
    fallen = truth[best] - truth[-1]
    if fallen <= NOISE * noise * np.sqrt(2 / width) or reward[-1] <= reward[best]:
        return None
    step = int(rows[best + width // 2]["step"])
    return Parting(
        step, float(kl[best]), (float(truth[best]), float(truth[-1])), (float(reward[best]), float(reward[-1]))
    )
