"""Muon: momentum, then the nearest orthogonal matrix (Jordan et al. 2024, "Muon: an optimizer for hidden layers").

The few large singular values of a gradient dominate its many small ones; Muon sets all of them to about 1. The polar factor
U V^T of M = U S V^T is computed with matrix products only: an odd polynomial p(x) = x (a + b x^2 + c x^4) acts on every
singular value, and a few of them in a row, each optimal for the interval that the previous one leaves, bring all to about 1.

>>> torch.manual_seed(0) is not None
True
>>> torch.linalg.svdvals(orthogonalize(torch.randn(1, 32, 96))[0]).sub(1).abs().max().item() < 0.23
True

Differences from the original, for the 36 matrices of 6 layers of hidden size 384 (101 GFLOP per step in the original, 61
here, at the speed of any matrix product):
- Coefficients. Five rounds of one polynomial bring singular values to [0.68, 1.13]; four rounds of minimax
  polynomials (Amsel et al. 2025, "The Polar Express", theorem 3.1) bring [0.003, 1] to [0.78, 1.22].
- Normalization. Values are divided by an upper bound of the largest. The Frobenius norm overestimates it by up to sqrt(s);
  the Schatten-4 norm, a by-product of the Gram matrix that is computed anyway, by at most s^(1/4).
  Momenta of a small model start 1.1 to 2.2 times closer to 1 with it: they have few large singular values.
- The smaller side. For an s x n matrix with n > 1.5 s all rounds act on the s x s Gram matrix, and their product is applied to
  the matrix once, at the end: 26 + 4 n/s times s^3 FLOPs instead of 4 (2 + 4 n/s) times s^3. Half precision does not do
  this, because a Gram matrix has the squares of the singular values.
- All matrices of the same shape are one batched product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from firth import kernel_choice
from firth.model import native
from firth.model.native import half

COEFFICIENTS = (
    (8.2218, -23.3469, 16.6338),
    (3.9728, -2.8449, 0.5170),
    (3.4735, -2.5057, 0.4810),
    (2.5044, -1.7907, 0.4071),
)
"""(a, b, c) of each round, by linear programming on a grid: each is optimal for the interval that the previous one leaves,
extended by 2% at its upper end. Without the extension, values that bf16 rounds past the end grow to 7 and stay there."""

MIN_RELATIVE_VALUE = 0.003
"""Singular values above this fraction of the Schatten-4 norm end inside BAND; smaller ones grow up to 284 times."""

BAND = (0.778, 1.222)
"""The interval of the singular values after `orthogonalize`."""


def orthogonalize(stack: Tensor) -> Tensor:
    """Return the approximate polar factor of each matrix, with singular values in BAND.

    Args:
        stack: (K, rows, columns), in the dtype to compute in. Zeros stay zeros.

    Returns:
        (K, rows, columns).
    """
    x = stack * _normalizing_power(stack)
    tall = x.shape[-2] > x.shape[-1]
    small, large = sorted(x.shape[-2:])
    gram = _gram(x, tall)  # eigenvalues: squared singular values
    square = torch.linalg.vector_norm(gram, dim=(-2, -1), keepdim=True).clamp(min=1e-30)  # Schatten-4 norm, squared
    x, gram = x / square.sqrt(), gram / square
    # All rounds on one Gram matrix cost less there; half precision loses the squares of small singular values.
    rounds_per_gram = len(COEFFICIENTS) if x.dtype == torch.float32 and large > 1.5 * small else 1
    for start in range(0, len(COEFFICIENTS), rounds_per_gram):
        if start:
            gram = _gram(x, tall)
        rounds = COEFFICIENTS[start : start + rounds_per_gram]
        if len(rounds) == 1:
            (a, b, c) = rounds[0]
            factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            x = torch.baddbmm(x, x, factor, beta=a) if tall else torch.baddbmm(x, factor, x, beta=a)
        else:
            factor = _product_of_rounds(gram, rounds)
            x = torch.bmm(x, factor) if tall else torch.bmm(factor, x)
    return x


def _gram(x: Tensor, tall: bool) -> Tensor:
    """Return the Gram matrix of the smaller side: (K, rows, columns) -> (K, s, s) with s = min(rows, columns)."""
    return x.mT @ x if tall else x @ x.mT


def _normalizing_power(stack: Tensor) -> Tensor:
    """Return the power of two that brings the largest number of each matrix to [0.5, 1): (K, 1, 1), same dtype.

    Fourth powers of the numbers are summed, and that of 1e-10 underflows in fp32: a norm of 0 would then divide numbers that
    are not 0. Powers of two change no mantissa bit.
    """
    largest = stack.abs().amax((-2, -1), keepdim=True).float()  # a norm of infinite order takes five times as long
    exponent = torch.frexp(largest).exponent.clamp(-126, 126)
    return ((127 - exponent) << 23).view(torch.float32).to(stack.dtype)


def _product_of_rounds(gram: Tensor, rounds: Sequence[tuple[float, float, float]]) -> Tensor:
    """Return several rounds as one factor (K, s, s); all are polynomials of `gram`, so they commute."""
    product: Tensor | None = None
    for i, (a, b, c) in enumerate(rounds):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else product @ factor
        if i + 1 < len(rounds):
            gram = factor @ gram @ factor
    assert product is not None
    return product


def nesterov(grad: Tensor, momentum: Tensor, direction: Tensor, beta: float) -> None:
    """Update the momentum of a matrix, and write the Nesterov direction beta * momentum + (1 - beta) * grad.

    Args:
        grad: (rows, columns) fp32.
        momentum: The same shape and dtype; becomes beta * momentum + (1 - beta) * grad.
        direction: The output, in fp32 or bf16.
        beta: The decay of the momentum, used twice.
    """
    if _use_native(grad, momentum, direction):
        native.library().momentum(
            grad.data_ptr(), momentum.data_ptr(), direction.data_ptr(), half(direction), beta, grad.numel(),
            native.threads(),
        )  # fmt: skip
        return
    momentum.lerp_(grad, 1 - beta)
    direction.copy_(torch.lerp(grad, momentum, beta))


def apply(weight: Tensor, update: Tensor, keep: float, lr: float) -> None:
    """Set a matrix to keep * weight - lr * update, in place."""
    if _use_native(weight, update):
        native.library().apply(
            weight.data_ptr(), update.data_ptr(), half(update), keep, lr, weight.numel(), native.threads()
        )
        return
    weight.mul_(keep).add_(update, alpha=-lr)


def _use_native(first: Tensor, *others: Tensor) -> bool:
    """Whether the compiled pass supports these tensors: contiguous, the first in fp32."""
    supported = native.supports(first, *others) and first.dtype == torch.float32
    return supported and all(x.is_contiguous() for x in (first, *others)) and MOMENTUM.choice() == "native"


def _momentum_workload(way: str) -> kernel_choice.Workload:
    """A matrix of 384 x 1536."""
    grad, momentum, weight = (torch.linspace(-1, 1, 384 * 1536).view(384, 1536) for _ in range(3))
    direction = torch.empty(384, 1536, dtype=torch.bfloat16)
    if way == "native":
        native.library()

    @torch.no_grad()
    def work() -> None:
        with kernel_choice.forced({MOMENTUM.name: way}):
            nesterov(grad, momentum, direction, 0.95)
            apply(weight, direction, 0.999, 1e-6)

    return work


MOMENTUM = kernel_choice.Kernel("momentum", {way: partial(_momentum_workload, way) for way in ("torch", "native")})
"""How a CPU updates the momentum of Muon and the weights."""


def _workload(dtype: torch.dtype) -> kernel_choice.Workload:
    """Square and wide matrices of 256 rows."""
    stacks = [torch.linspace(-1, 1, 4 * 256 * columns).sin().view(4, 256, columns) for columns in (256, 1024)]

    @torch.no_grad()
    def work() -> None:
        for stack in stacks:
            orthogonalize(stack.to(dtype)).float()

    return work


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

KERNEL = kernel_choice.Kernel("muon", {name: partial(_workload, dtype) for name, dtype in DTYPES.items()})
"""The dtype in which a CPU orthogonalizes: the rounds tolerate the error of bf16 (Jordan et al. 2024)."""


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which `orthogonalize` is fastest on this device."""
    return torch.bfloat16 if device.type == "cuda" else DTYPES[KERNEL.choice()]
