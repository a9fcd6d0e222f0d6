"""The few elementwise pieces of a block that plain autograd makes slow on a CPU, with their gradients by hand.

A 4096 x 384 fp32 tensor takes 0.25 ms a pass when it is in cache, and a page-faulted or uncached one 1 ms; written as
plain formulas, norms, rotary turns and squared ReLU made some sixty passes a block, forward and back. Each function
here states the passes it makes. All are checked against the plain formula with torch.autograd.gradcheck.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        inverse = _inverse_rms(x, eps)
        y = x * inverse
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _through_unit(grad, *ctx.saved_tensors), None


def unit(x: Tensor, eps: float) -> Tensor:
    """x / rms(x) over the last axis: (..., width) -> (..., width). Two passes forward, four back."""
    if x.device.type != "cpu" or x.dtype in (torch.bfloat16, torch.float16):
        return F.rms_norm(x, x.shape[-1:], eps=eps)  # one kernel on CUDA; sums in fp32 everywhere
    if not torch.is_grad_enabled():
        return x * _inverse_rms(x, eps)  # torch's own takes 55 us for a single token on a CPU
    return _Unit.apply(x, eps)


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = x.clamp_min(0)
        ctx.save_for_backward(kept)
        return kept * kept

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return torch.addcmul(kept.new_zeros(kept.shape[-1]), grad, kept, value=2)


def relu2(x: Tensor) -> Tensor:
    """Squared ReLU (So 2021, Primer): two passes forward, one back, one tensor kept."""
    if not torch.is_grad_enabled():
        return F.relu(x).square_()
    return _Relu2.apply(x)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    y = x * cos
    y.narrow(-1, 0, half).addcmul_(x.narrow(-1, half, half), sin, value=-1)
    y.narrow(-1, half, half).addcmul_(x.narrow(-1, 0, half), sin)
    return y


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
        inverse = None
        if eps >= 0:
            inverse = _inverse_rms(x, eps)
            x = x * inverse
        ctx.save_for_backward(x if eps >= 0 else None, inverse, cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, inverse, cos, sin = ctx.saved_tensors
        back = _turned(grad, cos, -sin)
        return (back if x is None else _through_unit(back, x, inverse)), None, None, None


def turn(x: Tensor, cos: Tensor, sin: Tensor, eps: float = -1.0) -> Tensor:
    """Rotate the pairs (x[i], x[i + half]) of each head by its position; with eps >= 0 also make its RMS one.

    x (B, T, H, D); cos (B or 1, T, 1, D), both halves alike; sin (B or 1, T, 1, D / 2). Turning keeps lengths, so
    "rotary, then unit RMS" (NanoChat) and "unit RMS, then rotary" are one function. Forward: two passes to the unit
    RMS and two to turn; back: two and four.
    """
    half = x.dtype in (torch.bfloat16, torch.float16)
    wide = x.float() if half else x  # angles and norms are never rounded to half precision
    if torch.is_grad_enabled():
        y = _Turn.apply(wide, cos, sin, eps)
    else:
        y = _turned(unit(wide, eps) if eps >= 0 else wide, cos, sin)
    return y.to(x.dtype) if half else y
