"""Attention for training on a CPU, in blocks of query rows: what a flash kernel does for memory, done for speed.

torch's CPU flash kernel runs far below the machine's product rate at 256 tokens. Batched products of a block of query rows
against the keys before them run near that rate, and what is above the diagonal is hardly computed. How large a block is best,
and whether this is quicker at all, is measured (`firth.model.attention.ATTENTION`): 64 rows in fp32 with AVX-512, 256 in
bf16 with AMX, whose products are so quick that the elementwise passes between them are what costs. The weights are kept for
the backward pass (half of T x T a head). Scores are rounded to the dtype of the queries before the softmax, which computes in fp32.
With a C compiler, scale, bias, mask and softmax are one pass (`firth.model.native`), and so is the softmax's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from firth.model import native
from firth.model.fused import dropout_mask
from firth.model.native import address, half

ROWS = 64
"""Query rows of a block, where `attend` is not given another number: larger ones waste work above the diagonal, smaller ones
starve the products."""

MAX_KEPT_BYTES = 128 << 20
"""Bytes of attention weights that one layer may keep: a batch with more takes the flash kernel, which keeps none."""


def _flat(x: Tensor) -> Tensor:
    """(B, H, T, D) of any layout -> (B * H, T, D), contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale * left @ right, batched: one call, no pass of its own for the scale."""
    if scale == 1:
        return torch.bmm(left, right)
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)


@dataclass(frozen=True)
class _Rule:
    """How scores become weights. mask (B or 1, 1, T or 1, S) bool; bias (B or 1, H, T, S); see `attend`."""

    scale: float
    causal: bool
    below: bool
    mask: Tensor | None
    bias: Tensor | None
    native: bool

    def keys(self, count: int) -> int:
        """How many of so many keys are read: the mask may end before those that nobody sees."""
        return count if self.mask is None else self.mask.shape[-1]

    @property
    def in_product(self) -> float:
        """What scores are multiplied with in the product that makes them: the native softmax has a scale of its own."""
        return 1.0 if self.native else self.scale

    def weigh(self, scores: Tensor, heads: int, start: int) -> Tensor:
        """Turn scores (B * heads, rows, keys) of the query rows from `start` on into weights, in place."""
        rows, keys = scores.shape[1:]
        by_head = scores.view(-1, heads, rows, keys)
        mask, bias = (None if x is None else _block(x, start, rows, keys) for x in (self.mask, self.bias))
        if self.native:
            _softmax_forward(by_head, mask, bias, self.scale, self.causal, start)
            return scores
        if self.causal:
            corner = scores.new_full((rows, rows), float("-inf")).triu_(1)
            scores[:, :, start:].add_(corner)
        if mask is not None:
            by_head.masked_fill_(~mask, float("-inf"))
        if bias is not None:
            by_head += bias
        return torch.softmax(scores, -1, out=scores)

    def slope(self, grad: Tensor, weights: Tensor) -> Tensor:
        """Turn the gradient of weights into that of the scores, in place; the native one has the scale in it."""
        if self.native:
            native.library().softmax_backward(
                grad.data_ptr(), weights.data_ptr(), half(grad), self.scale, weights[..., 0].numel(), weights.shape[-1],
                native.threads(),
            )  # fmt: skip
            return grad
        return torch._softmax_backward_data(grad, weights, -1, grad.dtype)


def _block(x: Tensor, start: int, rows: int, keys: int) -> Tensor:
    """The part of a mask or bias (B or 1, H or 1, T or 1, S) that some query rows read."""
    return x[:, :, start : start + rows, :keys] if x.shape[2] > 1 else x[..., :keys]


def _softmax_forward(
    scores: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool, start: int
) -> None:
    """softmax(scale * scores + bias) where the mask shows, in place: scores (B, H, rows, keys)."""
    shape = scores.shape
    mask, bias = (None if x is None else x.expand(shape) for x in (mask, bias))
    mask, bias = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (mask, bias))
    strides = [None if x is None else native.longs(x.stride()[:3]) for x in (mask, bias)]
    native.library().softmax_forward(
        scores.data_ptr(), half(scores), address(mask), strides[0], address(bias), 0 if bias is None else half(bias),
        strides[1], scale, causal, start, *shape, native.threads(),
    )  # fmt: skip


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,  # noqa: ARG004 (that of the rule; here so that autograd asks for its gradient)
        rule: _Rule,
        dropout: float,
        rows: int,
    ) -> Tensor:
        batch, heads, length, width = q.shape
        kept, survive, blocks = [], [], []
        queries, keys, values = _flat(q), _flat(k), _flat(v)
        for start in range(0, length, rows):
            end = min(start + rows, length)
            reach = end if rule.causal or rule.below else rule.keys(keys.shape[1])
            scores = _product(queries[:, start:end], keys[:, :reach].mT, rule.in_product)
            kept.append(rule.weigh(scores, heads, start))
            if dropout:
                survive.append(dropout_mask(scores, dropout))
                scores = scores * survive[-1]
            blocks.append(torch.bmm(scores, values[:, :reach]))
        ctx.save_for_backward(queries, keys, values, *kept, *survive)
        ctx.rule, ctx.rows, ctx.drops, ctx.heads = rule, rows, bool(dropout), heads
        done = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
        # Memory is laid out as (B, T, H, D), which is what the next product reads.
        return done.view(batch, heads, length, width).transpose(1, 2).contiguous().transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, *saved = ctx.saved_tensors
        kept, survive = (saved[: len(saved) // 2], saved[len(saved) // 2 :]) if ctx.drops else (saved, [])
        rule, heads, rows = ctx.rule, ctx.heads, ctx.rows
        grad = _flat(grad)
        learns = rule.bias is not None and ctx.needs_input_grad[3]
        # One block that is the whole of a bias of its own is its gradient as it is; others are added in.
        alone = learns and len(kept) == 1 and rule.bias.numel() == kept[0].numel()
        dbias = torch.zeros_like(rule.bias) if learns and not alone else None
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
            slope = rule.slope(slope, weights)
            slopes.insert(0, _product(slope, keys[:, :reach], rule.in_product))
            more_k, more_v = _product(slope.mT, queries[:, start:end], rule.in_product), torch.bmm(used.mT, here)
            if dk is None or dv is None:
                dk, dv = more_k, more_v
            else:
                dk[:, :reach] += more_k
                dv[:, :reach] += more_v
            if dbias is not None:
                by_head = slope.view(-1, heads, end - start, reach)
                by_head = by_head.sum(0, keepdim=True) if len(dbias) == 1 else by_head
                dbias[:, :, start:end, :reach].add_(by_head, alpha=rule.in_product / rule.scale)
        assert dk is not None and dv is not None
        if unseen := keys.shape[1] - dk.shape[1]:
            dk, dv = (F.pad(x, (0, 0, 0, unseen)) for x in (dk, dv))
        if alone:
            dbias = slope.view(rule.bias.shape).to(rule.bias.dtype) * (rule.in_product / rule.scale)
        dq = slopes[0] if len(slopes) == 1 else torch.cat(slopes, 1)
        dq, dk, dv = (x.view(-1, heads, *x.shape[1:]) for x in (dq, dk, dv))
        return dq, dk, dv, dbias, None, None, None


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
    compiled: bool = False,
) -> Tensor:
    """softmax(scale q k' + bias) v: q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D).

    causal: position i sees slots 0..i. below: the mask shows nothing after i, which need not be computed.
    mask (B, 1, T or 1, S) bool without an empty row; it may end before the last keys, which nobody sees then, as the bias does.
    bias (B or 1, H, T, S), given a gradient.
    dropout: the chance of a weight to be left out. rows: query rows of a block, ROWS where it is 0.
    compiled: whether what is not a product is done by `native.c`.
    """
    rule = _Rule(
        scale, causal, below, mask, None if bias is None else bias.detach(), compiled and native.supports(q, bias)
    )
    with torch.autocast("cpu", enabled=False):
        return _Blocked.apply(q, k, v, bias, rule, dropout, rows or ROWS)
