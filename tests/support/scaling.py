"""Synthetic tables of runs from a known scaling law."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from firth.scaling.fit import SIX_N_D, ComputeRule, LossLaw
from firth.scaling.table import Points

CHINCHILLA = LossLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
"""Hoffmann et al. 2022, equation 10."""
CORRECTED = LossLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""Besiroglu et al. 2024, table 1."""


def runs(
    law: LossLaw,
    noise: float = 0.0,
    seed: int = 0,
    sizes: int = 12,
    budgets: Sequence[float] = (1e19, 1e20, 1e21, 1e22),
    rule: ComputeRule = SIX_N_D,
) -> Points:
    """Return runs of common sizes at each budget, with multiplicative noise of the loss."""
    C = np.repeat(budgets, sizes)
    N = np.tile(np.geomspace(5e7, 2e10, sizes), len(budgets))
    D = rule.tokens(N, C)
    loss = law.loss(N, D) * np.exp(np.random.default_rng(seed).normal(0, noise, len(N)))
    return Points(N, D, loss, C, D, tuple(f"runs:{i}" for i in range(len(N))), True)
