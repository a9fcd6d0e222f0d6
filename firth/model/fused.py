"""The few elementwise pieces of a block that plain autograd makes slow on a CPU, with their gradients by hand.

A 4096 x 384 fp32 tensor takes 0.25 ms a pass when it is in cache, and a page-faulted or uncached one 1 ms; written as
plain formulas, norms, rotary rope and squared ReLU made some sixty passes a block, forward and back. Each function
here states the passes it makes. All are checked against the plain formula with torch.autograd.gradcheck.

Where this machine has a C compiler, the same is one compiled pass each (`firth.model.native_ops`). Which of them runs is
measured: NORM, LAYER_NORM, HEADS, ACTIVATION.
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

from firth import kernels
from firth.model import native, native_ops

SMALL_ROW_COUNTS = range(8, 49)
"""Numbers of rows for which a CPU's product is quicker with the weights on the left (see `project`)."""


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., in), weight (out, in), bias (out,) -> (..., out).

    For a few rows of fp32, MKL shares out the rows of x among the threads where there is more to share in the weights.
    Asked for weight @ x' it takes, for 16 rows and two threads, 0.19 ms a 2048 x 512 matrix and not 0.37; one thread
    gains a tenth, one row nothing, and from 64 rows on the two are equal. The answer lies transposed in memory. A single row may
    take a compiled product (ONE_ROW), which is as quick as its weights are read.
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
        return native_ops.one_row(x, weight, bias)
    if rows not in SMALL_ROW_COUNTS or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1).t()
    out = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return out.t().view(*x.shape[:-1], -1)


def _row_workload(way: str, dtype: torch.dtype) -> kernels.Workload:
    """A row by 16 maps of 512 x 512, of which no cache next to a core holds all."""
    x, weights = torch.ones(1, 512, dtype=dtype), torch.ones(16, 512, 512, dtype=dtype).unbind()
    product = native_ops.one_row if way == "native" else F.linear

    @torch.no_grad()
    def work() -> None:
        for weight in weights:
            product(x, weight, None)

    return work


ONE_ROW = {
    dtype: kernels.Kernel(f"one-row-{name}", {way: partial(_row_workload, way, dtype) for way in ("torch", "native")})
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
}
"""dtype -> how a CPU multiplies a single row by a map, without gradients: a token that is being written."""


@cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor, made once: making one takes as long as adding a thousand."""
    return torch.tensor(value, dtype=dtype, device=device)


def _at_least_fp32(x: Tensor) -> Tensor:
    """Half precision in fp32, anything else as it is: norms and angles are never computed in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept: one reading pass, no square of x in memory."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _unit_rms_grad(grad: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of y = x * inverse_rms(x) by x: inverse * (grad - y * mean(grad * y)), four passes."""
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
    """x / rms(x) over the last axis: (..., width) -> (..., width), in the dtype given or that of x."""
    dtype = dtype or x.dtype
    if x.device.type == "cpu" and not torch.is_grad_enabled() and dtype == x.dtype == _at_least_fp32(x[:0]).dtype:
        # For a single token a call costs 1 us, whatever it does: four calls. torch's own rms_norm takes 55 us.
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(_constant(eps, x.dtype, x.device), size, size, value=1 / x.shape[-1]).rsqrt_()
    learns = x.device.type == "cpu" and torch.is_grad_enabled()
    if not learns or (x.dtype in NORM and NORM[x.dtype].choice() == "rms_norm"):
        return F.rms_norm(x, x.shape[-1:], eps=eps).to(dtype)  # one kernel; sums in fp32 everywhere
    return _UnitRMS.apply(x, eps, dtype)


def normalized(
    x: Tensor, gain: Tensor | None, offset: Tensor | None, eps: float, center: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """RMS norm, or layer norm where `center`, with gain and offset (width,): (..., width) -> (..., width).

    dtype: of the result; None: that of x.
    """
    learned = [p for p in (gain, offset) if p is not None]
    if runs_native(LAYER_NORM if center else NORM, x, learned):
        return native_ops.norm(x, gain, offset, eps, center, dtype)
    if center:
        y = F.layer_norm(x, x.shape[-1:], gain, offset, eps)
        return y if dtype is None else y.to(dtype)
    y = unit_rms(x, eps, x.dtype if learned else dtype)
    y = y if gain is None else y * gain
    y = y if offset is None else y + offset
    return y.to(dtype or x.dtype)


def runs_native(table: Mapping[torch.dtype, kernels.Kernel], x: Tensor, learned: Sequence[Tensor] = ()) -> bool:
    """Return whether a compiled kernel reads x and this machine is quicker at it; learned: its parameters, in fp32."""
    return (
        native.supports(x) and native.worthwhile(x) and all(p.dtype == torch.float32 and p.is_contiguous() for p in learned)
        and table[x.dtype].choice() == "native"
    )  # fmt: skip


def _train_workload(function: Callable[[Tensor], Tensor], *shape: int, dtype: torch.dtype) -> kernels.Workload:
    """Forward and backward of a function of one tensor of this shape."""
    x = torch.linspace(-1, 1, math.prod(shape)).view(shape).to(dtype).requires_grad_()
    slope = torch.ones_like(function(x))
    return lambda: torch.autograd.backward(function(x), slope)


def per_dtype(
    name: str, ways: Mapping[str, Callable[[Tensor], Tensor]], *shape: int
) -> dict[torch.dtype, kernels.Kernel]:
    """dtype -> the kernel NAME-fp32 or NAME-bf16, whose ways are timed on a tensor of this shape, forward and backward."""
    return {
        dtype: kernels.Kernel(
            f"{name}-{label}",
            {way: partial(_train_workload, function, *shape, dtype=dtype) for way, function in ways.items()},
        )
        for dtype, label in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
    }


NORM = per_dtype(
    "norm",
    {
        "rms_norm": lambda x: F.rms_norm(x, (384,), eps=1e-6),
        "unit": lambda x: _UnitRMS.apply(x, 1e-6, x.dtype),
        "native": lambda x: native_ops.norm(x, None, None, 1e-6, False),
    },
    2048, 384,
)  # fmt: skip
"""dtype -> how an RMS norm is computed on a CPU."""

LAYER_NORM = per_dtype(
    "layer-norm",
    {
        "layer_norm": lambda x: F.layer_norm(x, (384,), eps=1e-5),
        "native": lambda x: native_ops.norm(x, None, None, 1e-5, True),
    },
    2048, 384,
)  # fmt: skip
"""dtype -> how a layer norm is computed on a CPU."""

ACTIVATION = per_dtype(
    "activation",
    {
        "torch": lambda x: F.gelu(x[..., :1024]) * x[..., 1024:],
        "native": lambda x: native_ops.activation("gelu", x, True),
    },
    1024, 2048,
)  # fmt: skip
"""dtype -> how the activation of an MLP is computed on a CPU."""


DROPOUT_LEVELS = 65536
"""A chance of being dropped is rounded to one of so many."""


def dropout_mask(like: Tensor, chance: float) -> Tensor:
    """What dropout multiplies with, of the shape of `like`: 0 by this chance, else what keeps the mean.

    torch's CPU draws a number of 32 bits for each (1.35 ms for 528 x 384); here one of 64 bits serves four (0.45 ms).
    """
    level = round(chance * DROPOUT_LEVELS)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    drawn = words.view(torch.int16)[: like.numel()].view(like.shape)
    return (drawn >= level - DROPOUT_LEVELS // 2).to(like.dtype).mul_(DROPOUT_LEVELS / (DROPOUT_LEVELS - level))


class Dropout(nn.Module):
    """Each number is 0 by a chance, in training (Srivastava 2014): (...) -> (...)."""

    def __init__(self, chance: float):
        super().__init__()
        self.p = chance

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * dropout_mask(x, self.p) if x.device.type == "cpu" else F.dropout(x, self.p)


def uses_dropout(model: nn.Module) -> bool:
    """Whether any module of the model applies dropout in training."""
    chances = (m.p for m in model.modules() if isinstance(m, Dropout | nn.Dropout))
    return any(chance > 0 for chance in chances)


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
    """Squared ReLU (So 2021, Primer): two passes forward, three back."""
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
        slope = _rotate_halves(_at_least_fp32(grad), cos, -sin)
        if x is not None:
            slope = _unit_rms_grad(slope, _at_least_fp32(x) * inverse, inverse)
        return slope.to(grad.dtype), None, None, None


def rotate(x: Tensor, cos: Tensor, sin: Tensor, eps: float = -1.0) -> Tensor:
    """Rotate the pairs (x[i], x[i + half]) of each head by its position; with eps >= 0 also make its RMS one.

    x (B, T, H, D); cos (B or 1, T, 1, D), both halves alike; sin (B or 1, T, 1, D / 2). Turning keeps lengths, so
    "rotary, then unit RMS" (NanoChat) and "unit RMS, then rotary" are one function.
    """
    if torch.is_grad_enabled():
        return _Rotate.apply(x, cos, sin, eps)
    wide = _at_least_fp32(x)
    return _rotate_halves(unit_rms(wide, eps) if eps >= 0 else wide, cos, sin).to(x.dtype)


def _split(
    joined: Tensor, rope: tuple[Tensor, Tensor] | None, eps: float, queries: int, keys: int, width: int
) -> Heads:
    """`heads` on torch's operators. Queries and keys are placed together: of few tokens, the calls are what costs."""
    placed, v = joined.split(((queries + keys) * width, keys * width), -1)
    placed, v = (x.view(*x.shape[:-1], -1, width) for x in (placed, v))
    if rope is not None:
        placed = rotate(placed, *rope, eps)
    elif eps >= 0:
        placed = unit_rms(placed, eps)
    q, k = placed.transpose(1, 2).split((queries, keys), 1)
    return q, k, v.transpose(1, 2)


Heads = tuple[Tensor, Tensor, Tensor]


def heads(joined: Tensor, rope: tuple[Tensor, Tensor] | None, eps: float, queries: int, keys: int, width: int) -> Heads:
    """Queries, keys and values of a row, side by side, in heads: (B, T, (queries + 2 keys) width) -> (B, heads, T, width) each.

    rope, eps: as for `rotate`; None and a negative number leave queries and keys as they are.
    """
    if runs_native(HEADS, joined):
        return native_ops.heads(joined, rope, eps, queries, keys, width)
    return _split(joined, rope, eps, queries, keys, width)


def _heads_of(split: Callable[..., Heads]) -> Callable[[Tensor], Tensor]:
    angles = torch.linspace(-3, 3, 256 * 64).view(1, 256, 1, 64)
    rope = (angles.cos(), angles[..., :32].sin())

    def all_heads(joined: Tensor) -> Tensor:
        return torch.stack([x.sum() for x in split(joined, rope, 1e-6, 6, 6, 64)])

    return all_heads


HEADS = per_dtype("heads", {"torch": _heads_of(_split), "native": _heads_of(native_ops.heads)}, 8, 256, 1152)
"""dtype -> how queries, keys and values are placed on a CPU."""


def rotate_by_matrix(x: Tensor, rotation: Tensor, eps: float = -1.0) -> Tensor:
    """`rotate` by the matrices of `position.rotation`: x (B, 1, H, D), rotation (B or 1, 1, D, D), for reading only.

    One product in place of seven calls: 3 us and not 15 for a single token.
    """
    wide = _at_least_fp32(x)
    y = (unit_rms(wide, eps) if eps >= 0 else wide) @ rotation.to(wide.dtype)
    return y.to(x.dtype)
