"""Differentiable norms, heads and activations with the kernels of `native.c`.

Each is one pass over memory forward and one backward. `firth.model.fused` decides when they run, and has the same formulas
with torch's operators. All take fp32 or bf16 on a CPU, and compute in fp32.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from firth.model import native
from firth.model.native import address, half

ACTIVATIONS = {"relu": 0, "relu2": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
"""Name in `firth.model.block` -> number in native.c."""


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor | None, offset: Tensor | None, eps: float, center: bool, dtype: torch.dtype
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.empty(rows.shape, dtype=dtype)
        count, width = rows.shape
        inverse = torch.empty(count)
        mean = torch.empty(count) if center else None
        native.library().norm_forward(
            rows.data_ptr(), half(rows), y.data_ptr(), half(y), address(gain), address(offset), address(mean),
            inverse.data_ptr(), count, width, eps, center, native.threads(),
        )  # fmt: skip
        ctx.normal_form = gain is None and offset is None
        # Without a gain the gradient needs only the output, which the next linear map keeps anyway.
        ctx.save_for_backward(y if ctx.normal_form else rows, gain, mean, inverse)
        ctx.center, ctx.dtype, ctx.has_offset = center, x.dtype, offset is not None
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, gain, mean, inverse = ctx.saved_tensors
        rows = grad.reshape(saved.shape).contiguous()
        count, width = saved.shape
        dx = torch.empty(saved.shape, dtype=ctx.dtype)
        dgain = torch.zeros(width) if gain is not None and ctx.needs_input_grad[1] else None
        doffset = torch.zeros(width) if ctx.has_offset and ctx.needs_input_grad[2] else None
        native.library().norm_backward(
            rows.data_ptr(), half(rows), saved.data_ptr(), half(saved), ctx.normal_form, address(gain), address(mean),
            inverse.data_ptr(), dx.data_ptr(), half(dx), address(dgain), address(doffset), count, width, ctx.center,
            native.threads(),
        )  # fmt: skip
        return dx.view(grad.shape), dgain, doffset, None, None, None


def norm(
    x: Tensor, gain: Tensor | None, offset: Tensor | None, eps: float, center: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the RMS norm of x, or its layer norm with `center`: (..., width) -> (..., width).

    Args:
        x: fp32 or bf16.
        gain: (width,) fp32 or None.
        offset: (width,) fp32 or None.
        eps: Added to the mean square.
        center: Whether the mean is subtracted (layer norm).
        dtype: Of the result; None: that of x.
    """
    y: Tensor = _Norm.apply(x, gain, offset, eps, center, dtype or x.dtype)
    return y


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        joined: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        queries: int,
        keys: int,
        width: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        joined = joined.contiguous()
        batch, length = joined.shape[:2]
        q, k, v = (joined.new_empty(batch, n, length, width) for n in (queries, keys, keys))
        inverse = torch.empty(batch, length, queries + keys) if eps >= 0 else None
        each = cos is not None and len(cos) > 1
        ctx.sizes = (batch, length, queries, keys, width)
        native.library().heads_forward(
            joined.data_ptr(), half(joined), q.data_ptr(), k.data_ptr(), v.data_ptr(), address(cos), address(sin), each,
            eps, address(inverse), *ctx.sizes, native.threads(),
        )  # fmt: skip
        ctx.save_for_backward(joined if eps >= 0 else None, cos, sin, inverse)
        ctx.eps, ctx.each, ctx.dtype = eps, each, joined.dtype
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        joined, cos, sin, inverse = ctx.saved_tensors
        batch, length, queries, keys, width = ctx.sizes
        inputs = [g if g.stride(-1) == 1 else g.contiguous() for g in (x.to(ctx.dtype) for x in grads)]
        out = torch.empty(batch, length, (queries + 2 * keys) * width, dtype=ctx.dtype)
        strides = native.longs([n for g in inputs for n in g.stride()[:3]])
        native.library().heads_backward(
            *(g.data_ptr() for g in inputs), ctypes.addressof(strides), address(joined), half(out), out.data_ptr(),
            address(cos), address(sin), ctx.each, ctx.eps, address(inverse), *ctx.sizes, native.threads(),
        )  # fmt: skip
        return out, None, None, None, None, None, None


def heads(
    joined: Tensor, rope: tuple[Tensor, Tensor] | None, eps: float, queries: int, keys: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split concatenated queries, keys and values into heads, with unit RMS and rotary positions.

    Args:
        joined: (B, T, (queries + 2 keys) width), fp32 or bf16.
        rope: Cosines (B or 1, T, 1, width) and sines (B or 1, T, 1, width / 2), fp32; None: no rotation.
        eps: Of the norm of queries and keys; negative: no norm.
        queries: Number of query heads.
        keys: Number of key heads, and of value heads.
        width: Width of a head.

    Returns:
        (B, queries, T, width) and two of (B, keys, T, width), contiguous.
    """
    cos, sin = (None, None) if rope is None else (x.contiguous() for x in rope)
    q, k, v = _Heads.apply(joined, cos, sin, eps, queries, keys, width)
    return q, k, v


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int, gated: bool) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1] // (2 if gated else 1)
        y = x.new_empty(*x.shape[:-1], width)
        ctx.settings = (kind, gated, y.numel() // max(1, width), width)
        native.library().activation_forward(
            kind, x.data_ptr(), y.data_ptr(), half(x), gated, *ctx.settings[2:], native.threads()
        )
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        kind, gated, *sizes = ctx.settings
        grad, dx = grad.to(x.dtype).contiguous(), torch.empty_like(x)
        native.library().activation_backward(
            kind, grad.data_ptr(), x.data_ptr(), dx.data_ptr(), half(x), gated, *sizes, native.threads()
        )
        return dx, None, None


def activation(name: str, x: Tensor, gated: bool = False) -> Tensor:
    """Return act(x), or act(gate) * up of x = [gate, up]: (..., width or 2 width) -> (..., width).

    Args:
        name: One of ACTIVATIONS.
        x: fp32 or bf16.
        gated: Whether x is the concatenation of gate and up.
    """
    y: Tensor = _Activation.apply(x, ACTIVATIONS[name], gated)
    return y


def one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ weight' + bias of a single row, without gradients: (..., in) -> (..., out).

    Args:
        x: fp32 or bf16, one row.
        weight: (out, in), of the same dtype.
        bias: (out,) of the same dtype, or None.
    """
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight))
    native.library().linear(
        x.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr(), half(x), 1, x.shape[-1], len(weight),
        native.threads(),
    )  # fmt: skip
    return y


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        x, index = x.contiguous(), index.contiguous()
        batch, heads, rows, columns = x.shape
        keys = index.shape[-1]
        y = x.new_empty(batch, heads, rows, keys)
        ctx.step = index.stride(0) if len(index) > 1 else 0
        ctx.sizes = (batch, heads, rows, columns, keys)
        native.library().columns_forward(
            x.data_ptr(), half(x), index.data_ptr(), ctx.step, y.data_ptr(), *ctx.sizes, native.threads()
        )
        ctx.save_for_backward(index)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        grad = grad.contiguous()
        dx = grad.new_empty(ctx.sizes[:4])
        native.library().columns_backward(
            grad.data_ptr(), half(grad), index.data_ptr(), ctx.step, dx.data_ptr(), *ctx.sizes, native.threads()
        )
        return dx, None


def columns(x: Tensor, index: Tensor) -> Tensor:
    """Return x.gather(-1, index), with the same index for all heads.

    Args:
        x: (B, H, T, columns), fp32 or bf16.
        index: (B or 1, T, S) int64, each at least 0 and less than `columns`.

    Returns:
        (B, H, T, S).
    """
    y: Tensor = _Columns.apply(x, index)
    return y


class _Neighbors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        x, left, right = x.contiguous(), left.contiguous(), right.contiguous()
        y = torch.empty_like(x)
        native.library().neighbors_forward(
            x.data_ptr(), left.data_ptr(), right.data_ptr(), y.data_ptr(), *x.shape, native.threads()
        )
        ctx.save_for_backward(left, right)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        left, right = ctx.saved_tensors
        grad = grad.contiguous()
        dx = torch.empty_like(grad)
        native.library().neighbors_backward(
            grad.data_ptr(), left.data_ptr(), right.data_ptr(), dx.data_ptr(), *grad.shape, native.threads()
        )
        return dx, None, None


def neighbors(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the mean of each word's neighbors without the word itself; zeros if it has none.

    Args:
        x: (B, T, width) fp32.
        left: Number of neighbors before each word, (B, T) int64, within its row.
        right: Number of neighbors after it, (B, T) int64.

    Returns:
        (B, T, width).
    """
    y: Tensor = _Neighbors.apply(x, left, right)
    return y
