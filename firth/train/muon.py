"""Muon: momentum, then the nearest orthogonal matrix (Jordan et al. 2024, "Muon: an optimizer for hidden layers").

A gradient's few large directions drown its many small ones; Muon gives all of them the same length. The polar factor
U V^T of M = U S V^T comes from matrix products alone: an odd polynomial p(x) = x (a + b x^2 + c x^4) acts on
every singular value at once, and a few of them, each the best for the interval the last one left, bring all to about 1.

>>> torch.manual_seed(0) is not None
True
>>> torch.linalg.svdvals(orthogonalise(torch.randn(1, 32, 96))[0]).sub(1).abs().max().item() < 0.23
True

Where we differ from the original, and what each is worth for the 36 matrices of 6 layers of width 384 (101 GFLOP
a step in the original; 61 here, at the speed of any matrix product):
- Coefficients. Five rounds of one polynomial take singular values to [0.68, 1.13]; four rounds of minimax
  polynomials (Amsel et al. 2025, "The Polar Express", theorem 3.1) take [0.003, 1] to [0.78, 1.22].
- Size. Values are divided by an upper bound of the largest. The Frobenius norm overestimates it up to sqrt(s) times;
  the Schatten-4 norm, which the Gram matrix that is computed anyway gives for nothing, at most s^(1/4) times.
  Momenta of a small model start 1.1 to 2.2 times nearer to 1 by it: they have few large directions.
- The smaller side. For an s x n matrix with n > s all rounds act on the s x s Gram matrix, and their product meets the
  matrix once, at the end: 26 + 4 n/s times s^3 flops where the plain way takes 4 (2 + 4 n/s) times s^3.
- All matrices of one shape are one batched product.
"""

from __future__ import annotations

import torch
from torch import Tensor

COEFFICIENTS = (
    (8.2218, -23.3469, 16.6338),
    (3.9728, -2.8449, 0.5170),
    (3.4735, -2.5057, 0.4810),
    (2.5044, -1.7907, 0.4071),
)
"""(a, b, c) of each round, by linear programming on a grid: each is the best for the interval that the last one
left with 2% more at its upper end. Without that, values which bf16 rounds past the end are thrown out to 7 and stay."""

REACH = 0.003
"""Singular values over this share of the Schatten-4 norm end inside BAND; smaller ones grow up to 284 times."""

BAND = (0.778, 1.222)
"""Where orthogonalise puts singular values."""


def orthogonalise(stack: Tensor) -> Tensor:
    """The polar factor of each matrix, singular values within BAND: (K, rows, columns) -> the same. Zeros stay zeros.

    Works in the dtype it is given. The Gram form squares the singular values, so half precision takes the plain one.
    """
    stack = stack * _near_one(stack)
    tall = stack.shape[-2] > stack.shape[-1]
    wide = stack.mT if tall else stack  # (K, s, n) with s <= n
    gram = wide @ wide.mT  # (K, s, s), eigenvalues: squared singular values
    square = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True).clamp(min=1e-30)  # Schatten-4 norm, squared
    if stack.dtype == torch.float32 and wide.shape[-1] > 1.4 * wide.shape[-2]:  # where the Gram form costs less
        factor = _product_of_rounds(gram / square) / square.sqrt()
        return torch.bmm(stack, factor) if tall else torch.bmm(factor, stack)
    done = _rounds(wide / square.sqrt(), gram / square)
    return done.mT if tall else done


def _near_one(stack: Tensor) -> Tensor:
    """The power of two that brings the largest number of each matrix to [0.5, 1): (K, 1, 1), of the dtype of the stack.

    Fourth powers of the numbers are added up, and those of 1e-10 are no number in fp32: a norm of 0 then divided what
    was not 0. Powers of two change no bit of the rest.
    """
    largest = torch.linalg.vector_norm(stack, ord=float("inf"), dim=(-2, -1), keepdim=True).float()
    exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    return ((127 - exponent) << 23).view(torch.float32).to(stack.dtype)


def _rounds(x: Tensor, gram: Tensor) -> Tensor:
    """Each polynomial applied to the matrices themselves: (K, s, n) and their Gram matrices (K, s, s) -> (K, s, n)."""
    for i, (a, b, c) in enumerate(COEFFICIENTS):
        if i:
            gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _product_of_rounds(gram: Tensor) -> Tensor:
    """All rounds as one matrix to multiply by, (K, s, s): all here are polynomials of `gram`, so they commute."""
    product: Tensor | None = None
    for i, (a, b, c) in enumerate(COEFFICIENTS):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else product @ factor
        if i + 1 < len(COEFFICIENTS):
            gram = factor @ gram @ factor
    assert product is not None
    return product
