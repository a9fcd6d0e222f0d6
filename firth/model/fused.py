"""The few elementwise pieces of a block that plain autograd makes slow on a CPU, with their gradients by hand.

A 4096 x 384 fp32 tensor takes 0.25 ms a pass when it is in cache, and a page-faulted or uncached one 1 ms; written as
plain formulas, norms, rotary turns and squared ReLU made some sixty passes a block, forward and back. Each function
here states the passes it makes. All are checked against the plain formula with torch.autograd.gradcheck.
"""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from firth import kernels

FEW = range(8, 49)
"""Numbers of rows for which a CPU's product is quicker with the weights on the left (see `project`)."""


def project(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: x (..., in), weight (out, in), bias (out,) -> (..., out).

    For a few rows of fp32, MKL shares out the rows of x among the threads where there is more to share in the weights.
    Asked for weight @ x' it takes, for 16 rows and two threads, 0.19 ms a 2048 x 512 matrix and not 0.37; one thread
    gains a tenth, one row nothing, and from 64 rows on the two are equal. The answer lies transposed in memory.
    """
    rows = x.numel() // x.shape[-1]
    if torch.is_grad_enabled() or rows not in FEW or x.device.type != "cpu" or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1).t()
    out = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return out.t().view(*x.shape[:-1], -1)


@cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A number as a tensor, made once: making one takes as long as adding a thousand."""
    return torch.tensor(value, dtype=dtype, device=device)


CACHED = 1 << 18
"""Numbers worked on at a time: 1 MB in fp32, so that what one call writes is still in the cache for the next."""


def _parts(x: Tensor) -> list[slice]:
    """The rows of x in parts of CACHED numbers; all at once on an accelerator, where calls are what costs."""
    rows = len(x)
    step = max(1, CACHED * rows // max(1, x.numel())) if x.device.type == "cpu" else max(1, rows)
    return [slice(start, start + step) for start in range(0, rows, step)]


def _wide(x: Tensor) -> Tensor:
    """Half precision in fp32, anything else as it is: norms and angles are never computed in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps) over the last axis, kept: one reading pass, no square of x in memory."""
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return size.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _through_unit(grad: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of y = x * inverse_rms(x) by x: inverse * (grad - y * mean(grad * y)), four passes."""
    out = grad * y
    mean = out.sum(-1, keepdim=True).div_(-y.shape[-1])
    return torch.addcmul(grad, y, mean, out=out).mul_(inverse)


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty(rows.shape, dtype=dtype, device=x.device)
        inverse = rows.new_empty(len(rows), 1, dtype=_wide(x[:0]).dtype)
        for part in _parts(rows):
            wide = _wide(rows[part])
            inverse[part] = of_part = _inverse_rms(wide, eps)
            y[part] = wide * of_part
        ctx.save_for_backward(y, inverse)
        ctx.dtype = x.dtype
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        y, inverse = ctx.saved_tensors
        rows = grad.reshape(y.shape)
        out = torch.empty(y.shape, dtype=ctx.dtype, device=y.device)
        for part in _parts(y):
            out[part] = _through_unit(_wide(rows[part]), _wide(y[part]), inverse[part])
        return out.view(grad.shape), None, None


def unit(x: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) over the last axis: (..., width) -> (..., width), in the dtype given or that of x.

    One reading pass and one writing one, forward and back: what lies between stays in the cache.
    """
    dtype = dtype or x.dtype
    if x.device.type == "cpu" and not torch.is_grad_enabled() and dtype == x.dtype == _wide(x[:0]).dtype:
        # For a single token a call costs 1 us, whatever it does: four calls. torch's own rms_norm takes 55 us.
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(_constant(eps, x.dtype, x.device), size, size, value=1 / x.shape[-1]).rsqrt_()
    learns = x.device.type == "cpu" and torch.is_grad_enabled()
    if not learns or (x.dtype in NORM and NORM[x.dtype].choice() == "rms_norm"):
        return F.rms_norm(x, x.shape[-1:], eps=eps).to(dtype)  # one kernel; sums in fp32 everywhere
    return _Unit.apply(x, eps, dtype)


def _norm_workload(way: str, dtype: torch.dtype) -> kernels.Workload:
    """2048 rows of 384 numbers, forward and backward."""
    x = torch.linspace(-1, 1, 2048 * 384).view(2048, 384).to(dtype).requires_grad_()

    def work() -> None:
        y = _Unit.apply(x, 1e-6, dtype) if way == "unit" else F.rms_norm(x, (384,), eps=1e-6)
        torch.autograd.backward(y, x.detach())

    return work


NORM = {
    dtype: kernels.Kernel(f"norm-{name}", {way: partial(_norm_workload, way, dtype) for way in ("rms_norm", "unit")})
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
}
"""dtype -> how an RMS norm is computed on a CPU."""


LEVELS = 65536
"""A chance of being dropped is rounded to one of so many."""


def survivors(like: Tensor, chance: float) -> Tensor:
    """What dropout multiplies with, of the shape of `like`: 0 by this chance, else what keeps the mean.

    torch's CPU draws a number of 32 bits for each (1.35 ms for 528 x 384); here one of 64 bits serves four (0.45 ms).
    """
    level = round(chance * LEVELS)
    words = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    drawn = words.view(torch.int16)[: like.numel()].view(like.shape)
    return (drawn >= level - LEVELS // 2).to(like.dtype).mul_(LEVELS / (LEVELS - level))


class Dropout(nn.Module):
    """Each number is 0 by a chance, in training (Srivastava 2014): (...) -> (...)."""

    def __init__(self, chance: float):
        super().__init__()
        self.chance = chance

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * survivors(x, self.chance) if x.device.type == "cpu" else F.dropout(x, self.chance)


def drops(model: nn.Module) -> bool:
    """Whether any module of the model applies dropout in training."""
    chances = (
        m.chance if isinstance(m, Dropout) else m.p for m in model.modules() if isinstance(m, Dropout | nn.Dropout)
    )
    return any(chance > 0 for chance in chances)


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        y = torch.empty_like(rows)
        for part in _parts(rows):
            torch.clamp_min(rows[part], 0, out=y[part])
            y[part].square_()
        ctx.save_for_backward(rows)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        slopes, out = grad.reshape(rows.shape), torch.empty_like(rows)
        for part in _parts(rows):
            torch.clamp_min(rows[part], 0, out=out[part])
            out[part].mul_(slopes[part]).mul_(2)
        return out.view(grad.shape)


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (So 2021, Primer): one reading pass and one writing one, forward and back (`CACHED`)."""
    if not torch.is_grad_enabled():
        return F.relu(x).square_()
    return _Relu2.apply(x)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y.narrow(-1, 0, half).addcmul_(x.narrow(-1, half, half), sin, value=-1)
    y.narrow(-1, half, half).addcmul_(x.narrow(-1, 0, half), sin)
    return y


def _of_rows(angles: Tensor, part: slice) -> Tensor:
    """The angles (B or 1, T, 1, n) of some rows."""
    return angles if len(angles) == 1 else angles[part]


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse = None if eps < 0 else x.new_empty(*x.shape[:-1], 1, dtype=_wide(x[:0]).dtype)
        for part in _parts(x):
            wide = _wide(x[part])
            if inverse is not None:
                inverse[part] = of_part = _inverse_rms(wide, eps)
                wide = wide * of_part
            y[part] = _turned(wide, _of_rows(cos, part), _of_rows(sin, part))
        ctx.save_for_backward(x if eps >= 0 else None, inverse, cos, sin)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, inverse, cos, sin = ctx.saved_tensors
        out, back = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device), -sin
        for part in _parts(grad):
            slope = _turned(_wide(grad[part]), _of_rows(cos, part), _of_rows(back, part))
            out[part] = slope if x is None else _through_unit(slope, _wide(x[part]) * inverse[part], inverse[part])
        return out, None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, eps: float = -1.0) -> Tensor:
    """Rotate the pairs (x[i], x[i + half]) of each head by its position; with eps >= 0 also make its RMS one.

    x (B, T, H, D); cos (B or 1, T, 1, D), both halves alike; sin (B or 1, T, 1, D / 2). Turning keeps lengths, so
    "rotary, then unit RMS" (NanoChat) and "unit RMS, then rotary" are one function. One reading pass and one writing one,
    forward and back: what lies between, in fp32 for half precision, stays in the cache.
    """
    if torch.is_grad_enabled():
        return _Turn.apply(x, cos, sin, eps)
    wide = _wide(x)
    return _turned(unit(wide, eps) if eps >= 0 else wide, cos, sin).to(x.dtype)


def rotated(x: Tensor, rotation: Tensor, eps: float = -1.0) -> Tensor:
    """`turn` by the matrices of `position.rotation`: x (B, 1, H, D), rotation (B or 1, 1, D, D), for reading only.

    One product in place of seven calls: 3 us and not 15 for a single token.
    """
    wide = _wide(x)
    y = (unit(wide, eps) if eps >= 0 else wide) @ rotation.to(wide.dtype)
    return y.to(x.dtype)
