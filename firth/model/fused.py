"""Elementwise operations of a block with hand-written gradients, for CPUs, where plain autograd is slow.

A pass over a 4096 x 384 fp32 tensor takes 0.25 ms if it is in cache, and 1 ms if not; as plain formulas, norms, rotary
positions and squared ReLU made some sixty passes a block, forward and backward. All functions are checked against the plain
formula with torch.autograd.gradcheck.

With a C compiler each is one compiled pass (`firth.model.native`). Which implementation runs is measured: NORM,
LAYER_NORM, HEADS, ACTIVATION.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from firth import kernel_choice
from firth.model import native

SMALL_ROW_COUNTS = range(8, 49)
"""Numbers of rows for which a CPU's product is faster with the weights on the left (see `project`)."""


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return F.linear(x, weight, bias): x (..., in), weight (out, in), bias (out,) -> (..., out).

    For a few rows of fp32, MKL splits the rows of x among the threads, not the larger weights. As weight @ x', 16 rows with a
    2048 x 512 matrix and two threads take 0.19 ms and not 0.37; one thread gains a tenth, one row nothing, and from 64 rows
    on there is no difference. The result is transposed in memory. A single row may use a compiled product (ONE_ROW), which is
    as fast as reading the weights.
    """
    rows = x.numel() // x.shape[-1]
    if torch.is_grad_enabled() or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    if (
        rows == 1
        and x.dtype == weight.dtype
        and native.supports(x, weight, bias)
        and ONE_ROW[x.dtype].choice() == "native"
    ):
        return native.one_row(x, weight, bias)
    if rows not in SMALL_ROW_COUNTS or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1).t()
    out = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return out.t().view(*x.shape[:-1], -1)


def _row_workload(name: str, dtype: torch.dtype) -> kernel_choice.Workload:
    """Return a row times 16 maps of 512 x 512, more than the cache of a core holds."""
    x, weights = torch.ones(1, 512, dtype=dtype), torch.ones(16, 512, 512, dtype=dtype).unbind()
    product = native.one_row if name == "native" else F.linear

    @torch.no_grad()
    def work() -> None:
        for weight in weights:
            product(x, weight, None)

    return work


ONE_ROW = {
    dtype: kernel_choice.Kernel(
        f"one-row-{name}", {choice: partial(_row_workload, choice, dtype) for choice in ("torch", "native")}
    )
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
}
"""dtype -> measured choice for a single row times a map on a CPU, without gradients (decoding)."""


@cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a cached scalar tensor: making one takes as long as adding a thousand numbers."""
    return torch.tensor(value, dtype=dtype, device=device)


def _at_least_fp32(x: Tensor) -> Tensor:
    """Return half precision as fp32, other dtypes as they are: norms and rotations are not computed in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + eps) over the last axis, kept as size 1: one pass, without x^2 in memory."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _unit_rms_grad(grad: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
    """Return the gradient of y = x * inverse_rms(x) by x: inverse * (grad - y * mean(grad * y)), four passes."""
    out = grad * y
    mean = out.sum(-1, keepdim=True).div_(-y.shape[-1])
    return torch.addcmul(grad, y, mean, out=out).mul_(inverse)


class _UnitRMS(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = _at_least_fp32(x)
        inverse = _inverse_rms(wide, eps)
        y = (wide * inverse).to(dtype)
        ctx.save_for_backward(y, inverse)
        ctx.dtype = x.dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        y, inverse = ctx.saved_tensors
        return _unit_rms_grad(_at_least_fp32(grad), _at_least_fp32(y), inverse).to(ctx.dtype), None, None


def unit_rms(x: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """Return x / rms(x) over the last axis, (..., width) -> (..., width), in `dtype` (None: that of x)."""
    dtype = dtype or x.dtype
    if x.device.type == "cpu" and not torch.is_grad_enabled() and dtype == x.dtype == _at_least_fp32(x[:0]).dtype:
        # For a single token each call costs 1 us: four calls here. torch's rms_norm takes 55 us.
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(_constant(eps, x.dtype, x.device), size, size, value=1 / x.shape[-1]).rsqrt_()
    cpu_training = x.device.type == "cpu" and torch.is_grad_enabled()
    if not cpu_training or (x.dtype in NORM and NORM[x.dtype].choice() == "rms_norm"):
        return F.rms_norm(x, x.shape[-1:], eps=eps).to(dtype)  # one kernel; sums in fp32 everywhere
    return _UnitRMS.apply(x, eps, dtype)


def normalized(
    x: Tensor, gain: Tensor | None, offset: Tensor | None, eps: float, center: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the RMS norm of x, or its layer norm with `center`: (..., width) -> (..., width).

    Args:
        x: (..., width).
        gain: (width,) or None.
        offset: (width,) or None.
        eps: Added to the variance.
        center: Whether the mean is subtracted (layer norm).
        dtype: Of the result; None: that of x.
    """
    learned = [p for p in (gain, offset) if p is not None]
    if runs_native(LAYER_NORM if center else NORM, x, learned):
        return native.norm(x, gain, offset, eps, center, dtype)
    if center:
        y = F.layer_norm(x, x.shape[-1:], gain, offset, eps)
        return y if dtype is None else y.to(dtype)
    y = unit_rms(x, eps, x.dtype if learned else dtype)
    y = y if gain is None else y * gain
    y = y if offset is None else y + offset
    return y.to(dtype or x.dtype)


def runs_native(table: Mapping[torch.dtype, kernel_choice.Kernel], x: Tensor, learned: Sequence[Tensor] = ()) -> bool:
    """Return whether the compiled kernel supports x and is the fastest here; `learned`: its parameters, in fp32."""
    return (
        native.supports(x) and native.worthwhile(x) and all(p.dtype == torch.float32 and p.is_contiguous() for p in learned)
        and table[x.dtype].choice() == "native"
    )  # fmt: skip


def _train_workload(function: Callable[[Tensor], Tensor], *shape: int, dtype: torch.dtype) -> kernel_choice.Workload:
    """Return forward and backward of a function of one tensor of this shape."""
    x = torch.linspace(-1, 1, math.prod(shape)).view(shape).to(dtype).requires_grad_()
    grad = torch.ones_like(function(x))
    return lambda: torch.autograd.backward(function(x), grad)


def per_dtype(
    name: str, choices: Mapping[str, Callable[[Tensor], Tensor]], *shape: int
) -> dict[torch.dtype, kernel_choice.Kernel]:
    """Return dtype -> kernel NAME-fp32 or NAME-bf16, whose choices are timed on a tensor of this shape in training."""
    return {
        dtype: kernel_choice.Kernel(
            f"{name}-{label}",
            {choice: partial(_train_workload, function, *shape, dtype=dtype) for choice, function in choices.items()},
        )
        for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
    }


NORM = per_dtype(
    "norm",
    {
        "rms_norm": lambda x: F.rms_norm(x, (384,), eps=1e-6),
        "unit": lambda x: _UnitRMS.apply(x, 1e-6, x.dtype),
        "native": lambda x: native.norm(x, None, None, 1e-6, False),
    },
    2048, 384,
)  # fmt: skip
"""dtype -> measured choice for RMS norms on a CPU."""

LAYER_NORM = per_dtype(
    "layer-norm",
    {
        "layer_norm": lambda x: F.layer_norm(x, (384,), eps=1e-5),
        "native": lambda x: native.norm(x, None, None, 1e-5, True),
    },
    2048, 384,
)  # fmt: skip
"""dtype -> measured choice for layer norms on a CPU."""

ACTIVATION = per_dtype(
    "activation",
    {
        "torch": lambda x: F.gelu(x[..., :1024]) * x[..., 1024:],
        "native": lambda x: native.activation("gelu", x, True),
    },
    1024, 2048,
)  # fmt: skip
"""dtype -> measured choice for the activation of an MLP on a CPU."""


DROPOUT_LEVELS = 65536
"""Dropout probabilities are rounded to multiples of 1 / DROPOUT_LEVELS."""


def dropout_mask(like: Tensor, p: float) -> Tensor:
    """Return the factors of dropout in the shape of `like`: 0 with probability p, else 1 / (1 - p).

    On a CPU, torch draws 32 random bits per number (1.35 ms for 528 x 384); here 64 bits serve four (0.45 ms).
    """
    level = round(p * DROPOUT_LEVELS)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    drawn = words.view(torch.int16)[: like.numel()].view(like.shape)
    return (drawn >= level - DROPOUT_LEVELS // 2).to(like.dtype).mul_(DROPOUT_LEVELS / (DROPOUT_LEVELS - level))


class Dropout(nn.Module):
    """Dropout with probability p in training (Srivastava 2014), faster than torch's on a CPU."""

    def __init__(self, p: float):
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * dropout_mask(x, self.p) if x.device.type == "cpu" else F.dropout(x, self.p)


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0).square_()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return x.clamp_min(0).mul_(grad).mul_(2)


def relu2(x: Tensor) -> Tensor:
    """Return squared ReLU (So 2021, Primer): two passes forward, three backward."""
    if not torch.is_grad_enabled():
        return F.relu(x).square_()
    return _Relu2.apply(x)


def _rotate_halves(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y.narrow(-1, 0, half).addcmul_(x.narrow(-1, half, half), sin, value=-1)
    y.narrow(-1, half, half).addcmul_(x.narrow(-1, 0, half), sin)
    return y


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        wide, inverse = _at_least_fp32(x), None
        if eps >= 0:
            inverse = _inverse_rms(wide, eps)
            wide = wide * inverse
        ctx.save_for_backward(x if eps >= 0 else None, inverse, cos, sin)
        return _rotate_halves(wide, cos, sin).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, inverse, cos, sin = ctx.saved_tensors
        dx = _rotate_halves(_at_least_fp32(grad), cos, -sin)
        if x is not None:
            dx = _unit_rms_grad(dx, _at_least_fp32(x) * inverse, inverse)
        return dx.to(grad.dtype), None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, eps: float = -1.0) -> Tensor:
    """Apply rotary positions to the pairs (x[i], x[i + D / 2]) of each head; with eps >= 0 also scale heads to unit RMS.

    Rotation keeps lengths, so "rotary, then unit RMS" (NanoChat) and "unit RMS, then rotary" are the same.

    Args:
        x: (B, T, H, D).
        cos: (B or 1, T, 1, D), the two halves equal.
        sin: (B or 1, T, 1, D / 2).
        eps: Of the norm; negative: no norm.
    """
    if torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin, eps)
    wide = _at_least_fp32(x)
    return _rotate_halves(unit_rms(wide, eps) if eps >= 0 else wide, cos, sin).to(x.dtype)


def _split(
    joined: Tensor, rope: tuple[Tensor, Tensor] | None, eps: float, queries: int, keys: int, width: int
) -> Heads:
    """Return `heads` with torch's operators. Queries and keys are rotated together: for few tokens, calls are the cost."""
    qk, v = joined.split(((queries + keys) * width, keys * width), -1)
    qk, v = (x.view(*x.shape[:-1], -1, width) for x in (qk, v))
    if rope is not None:
        qk = rotate(qk, *rope, eps)
    elif eps >= 0:
        qk = unit_rms(qk, eps)
    q, k = qk.transpose(1, 2).split((queries, keys), 1)
    return q, k, v.transpose(1, 2)


Heads = tuple[Tensor, Tensor, Tensor]


def heads(joined: Tensor, rope: tuple[Tensor, Tensor] | None, eps: float, queries: int, keys: int, width: int) -> Heads:
    """Split concatenated queries, keys and values into heads, with rotary positions and unit RMS.

    Args:
        joined: (B, T, (queries + 2 keys) width).
        rope: Cosines and sines as for `rotate`; None: no rotation.
        eps: Of the norm of queries and keys; negative: no norm.
        queries: Number of query heads.
        keys: Number of key heads, and of value heads.
        width: Width of a head.

    Returns:
        Queries (B, queries, T, width), keys and values (B, keys, T, width).
    """
    if runs_native(HEADS, joined):
        return native.heads(joined, rope, eps, queries, keys, width)
    return _split(joined, rope, eps, queries, keys, width)


def _heads_of(split: Callable[..., Heads]) -> Callable[[Tensor], Tensor]:
    angles = torch.linspace(-3, 3, 256 * 64).view(1, 256, 1, 64)
    rope = (angles.cos(), angles[..., :32].sin())

    def all_heads(joined: Tensor) -> Tensor:
        return torch.stack([x.sum() for x in split(joined, rope, 1e-6, 6, 6, 64)])

    return all_heads


HEADS = per_dtype("heads", {"torch": _heads_of(_split), "native": _heads_of(native.heads)}, 8, 256, 1152)
"""dtype -> measured choice of the implementation of `heads` on a CPU."""


def rotate_by_matrix(x: Tensor, rotation: Tensor, eps: float = -1.0) -> Tensor:
    """Return `rotate` of x with matrices, without gradients: 3 us and not 15 for a single token.

    Args:
        x: (B, 1, H, D).
        rotation: (B or 1, 1, D, D), from `firth.model.positions.rotation`.
        eps: Of the norm; negative: no norm.
    """
    wide = _at_least_fp32(x)
    y = (unit_rms(wide, eps) if eps >= 0 else wide) @ rotation.to(wide.dtype)
    return y.to(x.dtype)
