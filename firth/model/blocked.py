"""Attention for training on a CPU, in blocks of query rows: what a flash kernel does for memory, done for speed.

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

from firth.model.fused import survivors

ROWS = 64
"""Query rows of a block: larger ones waste work above the diagonal, smaller ones starve the products."""

LONGEST = 512
"""Longest row that is worth keeping the attention weights of."""


def _flat(x: Tensor) -> Tensor:
    """(B, H, T, D) of any layout -> (B * H, T, D), contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, below: bool, hidden: Tensor | None,
        bias: Tensor | None, dropout: float,
    ) -> Tensor:  # fmt: skip
        batch, heads, length, _ = q.shape
        queries = _flat(q) * scale
        keys, values = _flat(k), _flat(v)
        kept, out, survive = [], [], []
        corner = q.new_full((min(ROWS, length),) * 2, float("-inf")).triu_(1)
        for start in range(0, length, ROWS):
            end = min(start + ROWS, length)
            reach = end if causal or below else keys.shape[1]
            scores = torch.bmm(queries[:, start:end], keys[:, :reach].mT)
            if causal:
                scores[:, :, start:].add_(corner[: end - start, : end - start])
            by_head = scores.view(batch, heads, end - start, reach)
            if hidden is not None:
                by_head += hidden[:, :, start:end, :reach] if hidden.shape[2] > 1 else hidden[..., :reach]
            if bias is not None:
                by_head += bias[:, :, start:end, :reach]
            kept.append(torch.softmax(scores, -1, out=scores))
            if dropout:
                survive.append(survivors(scores, dropout))
                scores = scores * survive[-1]
            out.append(torch.bmm(scores, values[:, :reach]))
        ctx.save_for_backward(queries, keys, values, bias, *kept, *survive)
        ctx.scale, ctx.shapes = scale, (q.shape, k.shape)
        return torch.cat(out, 1).view(q.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, bias, *kept = ctx.saved_tensors
        blocks = -(-queries.shape[1] // ROWS)
        kept, survive = kept[:blocks], kept[blocks:]
        (batch, heads, *_), whole = ctx.shapes[0], keys.shape[1]
        grad = _flat(grad)
        dbias = None if bias is None or not ctx.needs_input_grad[7] else torch.zeros_like(bias)
        # Batched products are fast only into contiguous results: whole tensors first, then earlier blocks added in.
        slopes: list[Tensor] = []
        dk: Tensor | None = None
        dv: Tensor | None = None
        for block in reversed(range(len(kept))):
            weights, start = kept[block], block * ROWS
            end, reach = start + weights.shape[1], weights.shape[2]
            here = grad[:, start:end]
            slope = torch.bmm(here, values[:, :reach].mT)
            used = weights
            if survive:
                slope, used = slope.mul_(survive[block]), weights * survive[block]
            slope = torch._softmax_backward_data(slope, weights, -1, slope.dtype)
            slopes.insert(0, torch.bmm(slope, keys[:, :reach]))
            more_k, more_v = torch.bmm(slope.mT, queries[:, start:end]), torch.bmm(used.mT, here)
            if dk is None or dv is None:
                dk, dv = more_k, more_v
            else:
                dk[:, :reach] += more_k
                dv[:, :reach] += more_v
            if dbias is not None:
                by_head = slope.view(batch, heads, end - start, reach)
                dbias[:, :, start:end, :reach] += by_head if len(dbias) == batch else by_head.sum(0)
        assert dk is not None and dv is not None and dk.shape[1] == whole
        dq = torch.cat(slopes, 1).mul_(ctx.scale).view(ctx.shapes[0])
        return dq, dk.view(ctx.shapes[1]), dv.view(ctx.shapes[1]), None, None, None, None, dbias, None


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether this is the quicker way: training on a CPU, in full precision, on rows that are not too long."""
    wide = q.dtype in (torch.float32, torch.float64)
    wide &= not torch.is_autocast_enabled("cpu")
    return q.device.type == "cpu" and wide and torch.is_grad_enabled() and q.requires_grad and k.shape[2] <= LONGEST


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    below: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale q k' + bias) v: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    causal: position i sees slots 0..i. below: the mask shows nothing after i, which need not be computed.
    mask (B, 1, T or 1, S) bool without an empty row. bias (B or 1, H, T, S), given a gradient.
    dropout: the chance of a weight to be left out.
    """
    hidden = None if mask is None else q.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    return _Blocked.apply(q, k, v, scale, causal, below, hidden, bias, dropout)
