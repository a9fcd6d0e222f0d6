"""Causal attention for training on a CPU, in blocks of query rows: what a flash kernel does for memory, for speed.

torch's CPU flash kernel runs at a third of the machine's product rate at 256 tokens. Batched products of a block of
query rows against the keys before them run near that rate, and what lies above the diagonal is never computed.
At 16 x 256 tokens, 6 heads of 64, fp32, two threads: forward 7.3 ms and back 12.3 against 8.4 and 19.3; blocks of
128 rows take 7.8 and 13.4, one of 256 takes 9.9 and 16. The weights are kept for the way back (half of T x T a
head), so this serves rows of at most LONGEST tokens; longer ones take the flash kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROWS = 64
"""Query rows of a block: larger ones waste work above the diagonal, smaller ones starve the products."""

LONGEST = 512
"""Longest row that is worth keeping the attention weights of."""


def _flat(x: Tensor) -> Tensor:
    """(B, H, T, D) of any layout -> (B * H, T, D), contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        batch, heads, length, width = q.shape
        queries = torch.mul(q, scale, out=q.new_empty(q.shape)).flatten(0, 1)
        keys, values = _flat(k), _flat(v)
        kept, out = [], []
        corner = q.new_full((min(ROWS, length),) * 2, float("-inf")).triu_(1)
        for start in range(0, length, ROWS):
            end = min(start + ROWS, length)
            scores = torch.bmm(queries[:, start:end], keys[:, :end].mT)
            scores[:, :, start:].add_(corner[: end - start, : end - start])
            kept.append(torch.softmax(scores, -1, out=scores))
            out.append(torch.bmm(kept[-1], values[:, :end]))
        ctx.save_for_backward(queries, keys, values, *kept)
        ctx.scale, ctx.shape = scale, q.shape
        return torch.cat(out, 1).view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        queries, keys, values, *kept = ctx.saved_tensors
        grad = _flat(grad)
        # Batched products are fast only into contiguous results: whole tensors first, then earlier blocks added in.
        slopes, dk, dv = [], torch.empty(0), torch.empty(0)
        for block in reversed(range(len(kept))):
            weights, start = kept[block], block * ROWS
            end = start + weights.shape[1]
            here = grad[:, start:end]
            slope = torch.bmm(here, values[:, :end].mT)
            slope = torch._softmax_backward_data(slope, weights, -1, slope.dtype)
            slopes.insert(0, torch.bmm(slope, keys[:, :end]))
            if end == keys.shape[1]:
                dv, dk = torch.bmm(weights.mT, here), torch.bmm(slope.mT, queries[:, start:end])
            else:
                dv[:, :end] += torch.bmm(weights.mT, here)
                dk[:, :end] += torch.bmm(slope.mT, queries[:, start:end])
        dq = torch.cat(slopes, 1)
        return dq.mul_(ctx.scale).view(ctx.shape), dk.view(ctx.shape), dv.view(ctx.shape), None


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether this is the quicker way: training on a CPU, in full precision, on rows that are not too long."""
    wide = q.dtype in (torch.float32, torch.float64)
    return q.device.type == "cpu" and wide and torch.is_grad_enabled() and q.requires_grad and k.shape[2] <= LONGEST


def causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention: q, k, v (B, H, T, D) -> (B, H, T, D)."""
    return _Blocked.apply(q, k, v, scale)  # type: ignore[no-any-return]
