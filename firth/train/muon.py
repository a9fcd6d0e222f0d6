"""Muon: momentum, then the nearest orthogonal matrix (Jordan et al. 2024, "Muon: an optimizer for hidden layers").

The polar factor U V^T of M = U S V^T comes from a few matrix products and no decomposition: an odd polynomial
p(x) = x (a + b x^2 + c x^4) is applied to every singular value at once, again and again, until all of them are near 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Odd quintics x (a + b x^2 + c x^4), one per iteration (Amsel et al. 2025, "The Polar Express", table for l = 1e-3).
COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
)


def orthogonalise(x: Tensor) -> Tensor:
    """The polar factor of each matrix of a stack, singular values near 1. x: (K, rows, columns)."""
    tall = x.shape[-2] > x.shape[-1]
    gram = x.mT @ x if tall else x @ x.mT  # (K, s, s), s the smaller side
    size = gram.square().sum((-2, -1), keepdim=True).sqrt().clamp(min=1e-30)  # >= the largest singular value squared
    gram = gram / size
    whole: Tensor | None = None  # the product of the polynomials so far, applied to x once, at the end
    for i, (a, b, c) in enumerate(COEFFICIENTS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        whole = factor if whole is None else whole @ factor
        if i + 1 < len(COEFFICIENTS):
            gram = gram @ factor @ factor
    assert whole is not None
    whole = whole / size.sqrt()
    return x @ whole if tall else whole @ x
