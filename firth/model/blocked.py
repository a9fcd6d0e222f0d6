"""Attention for training on a CPU, in blocks of query rows: what a flash kernel does for memory, done for speed.

torch's CPU flash kernel runs far below the machine's product rate at 256 tokens. Batched products of a block of query rows
against the keys before them run near that rate, and what is above the diagonal is hardly computed. How large a block is best,
and whether this is quicker at all, is measured (`firth.model.attention.ATTENTION`): 64 rows in fp32 with AVX-512, 256 in
bf16 with AMX, whose products are so quick that the elementwise passes between them are what costs. The weights are kept for
the backward pass (half of T x T a head). Scores are rounded to the dtype of the queries before the softmax, which computes in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from firth.model.fused import survivors

ROWS = 64
"""Query rows of a block, where `attend` is not given another number: larger ones waste work above the diagonal, smaller ones
starve the products."""

CACHED_BYTES = 1 << 20
"""Bytes of attention weights that are made at a time, of one row of the batch at least: they stay in the cache until the
products that follow."""

MAX_KEPT_BYTES = 128 << 20
"""Bytes of attention weights that one layer may keep: a batch with more takes the flash kernel, which keeps none."""


def _flat(x: Tensor) -> Tensor:
    """(G, H, T, D) of any layout -> (G * H, T, D), contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _batches(q: Tensor, keys: int) -> list[slice]:
    """Rows of the batch in groups of CACHED_BYTES of attention weights."""
    step = max(1, CACHED_BYTES // (q[0, ..., 0].numel() * keys * q.element_size()))
    return [slice(start, min(start + step, len(q))) for start in range(0, len(q), step)]


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, batched: one call, no pass of its own for the scale."""
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, below: bool, hidden: Tensor | None,
        bias: Tensor | None, dropout: float, rows: int,
    ) -> Tensor:  # fmt: skip
        batch, heads, length, width = q.shape
        kept, survive = [], []
        corner = q.new_full((min(rows, length),) * 2, float("-inf")).triu_(1)
        # Memory is laid out as (B, T, H, D), which is what the next product reads.
        out = q.new_empty(batch, length, heads, width)
        for group in _batches(q, k.shape[2]):
            queries, keys, values = _flat(q[group]), _flat(k[group]), _flat(v[group])
            blocks = []
            for start in range(0, length, rows):
                end = min(start + rows, length)
                reach = end if causal or below else keys.shape[1]
                scores = _product(queries[:, start:end], keys[:, :reach].mT, scale)
                if causal:
                    scores[:, :, start:].add_(corner[: end - start, : end - start])
                by_head = scores.view(-1, heads, end - start, reach)
                if hidden is not None:
                    mask = hidden if len(hidden) == 1 else hidden[group]
                    by_head += mask[:, :, start:end, :reach] if mask.shape[2] > 1 else mask[..., :reach]
                if bias is not None:
                    by_head += (bias if len(bias) == 1 else bias[group])[:, :, start:end, :reach]
                kept.append(torch.softmax(scores, -1, out=scores))
                if dropout:
                    survive.append(survivors(scores, dropout))
                    scores = scores * survive[-1]
                blocks.append(torch.bmm(scores, values[:, :reach]))
            done = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
            out[group] = done.view(-1, heads, length, width).transpose(1, 2)
        ctx.save_for_backward(q, k, v, bias, *kept, *survive)
        ctx.scale, ctx.rows, ctx.drops = scale, rows, bool(dropout)
        return out.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bias, *saved = ctx.saved_tensors
        kept, survive = (saved[: len(saved) // 2], saved[len(saved) // 2 :]) if ctx.drops else (saved, [])
        heads, length = q.shape[1], q.shape[2]
        dq, dk, dv = (torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format) for x in (q, k, v))
        dbias = None if bias is None or not ctx.needs_input_grad[7] else torch.zeros_like(bias)
        starts = range(0, length, ctx.rows)
        for number, group in enumerate(_batches(q, k.shape[2])):
            queries, keys, values = _flat(q[group]), _flat(k[group]), _flat(v[group])
            slopes, of_keys, of_values = _group_backward(
                _flat(grad[group]), queries, keys, values, ctx.scale, ctx.rows,
                kept[number * len(starts) :][: len(starts)], survive[number * len(starts) :][: len(starts)],
                None if dbias is None else dbias if len(dbias) == 1 else dbias[group], heads,
            )  # fmt: skip
            for to, found in ((dq, slopes), (dk, of_keys), (dv, of_values)):
                to[group] = found.view(-1, heads, *found.shape[1:]).transpose(1, 2)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2), None, None, None, None, dbias, None, None


def _group_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, scale: float, rows: int,
    kept: Sequence[Tensor], survive: Sequence[Tensor], dbias: Tensor | None, heads: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of queries, keys and values (G * H, T, D) of some rows of a batch; that of the bias is added to dbias."""
    # Batched products are fast only into contiguous results: whole tensors first, then earlier blocks added in.
    slopes: list[Tensor] = []
    dk: Tensor | None = None
    dv: Tensor | None = None
    for block in reversed(range(len(kept))):
        weights, start = kept[block], block * rows
        end, reach = start + weights.shape[1], weights.shape[2]
        here = grad[:, start:end]
        slope = torch.bmm(here, values[:, :reach].mT)
        used = weights
        if survive:
            slope, used = slope.mul_(survive[block]), weights * survive[block]
        slope = torch._softmax_backward_data(slope, weights, -1, slope.dtype)
        slopes.insert(0, _product(slope, keys[:, :reach], scale))
        more_k, more_v = _product(slope.mT, queries[:, start:end], scale), torch.bmm(used.mT, here)
        if dk is None or dv is None:
            dk, dv = more_k, more_v
        else:
            dk[:, :reach] += more_k
            dv[:, :reach] += more_v
        if dbias is not None:
            by_head = slope.view(-1, heads, end - start, reach)
            dbias[:, :, start:end, :reach] += by_head.sum(0) if len(dbias) == 1 else by_head
    assert dk is not None and dv is not None and dk.shape[1] == keys.shape[1]
    return slopes[0] if len(slopes) == 1 else torch.cat(slopes, 1), dk, dv


def kept_bytes(q: Tensor, k: Tensor) -> int:
    """Return the bytes of attention weights that are kept for the backward pass, at most (causal ones are half)."""
    return q[..., 0].numel() * k.shape[2] * q.element_size()


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
    rows: int = 0,
) -> Tensor:
    """softmax(scale q k' + bias) v: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    causal: position i sees slots 0..i. below: the mask shows nothing after i, which need not be computed.
    mask (B, 1, T or 1, S) bool without an empty row. bias (B or 1, H, T, S), given a gradient.
    dropout: the chance of a weight to be left out. rows: query rows of a block, ROWS where it is 0.
    """
    hidden = None if mask is None else q.new_zeros(mask.shape).masked_fill_(~mask, float("-inf"))
    with torch.autocast("cpu", enabled=False):
        return _Blocked.apply(q, k, v, scale, causal, below, hidden, bias, dropout, rows or ROWS)
