"""Attention for training on a CPU, in blocks of query rows.

torch's CPU flash kernel runs far below the machine's matrix product rate at 256 tokens. Batched products of a block of query
rows with the keys before them run near that rate, and compute little above the diagonal. The best block size, and whether
this is faster at all, is measured (`firth.model.attention.ATTENTION`): 64 rows in fp32 with AVX-512, 256 in bf16 with AMX,
whose products are so fast that the elementwise passes between them dominate. The attention weights are kept for the backward
pass (half of T x T a head). Scores are rounded to the dtype of the queries before the softmax, which computes in fp32. With
a C compiler, scale, bias, mask and softmax are one pass (`firth.model.native`), and so is the gradient of the softmax.

For kernels of GPUs the masks are made from the integers of each token; none of them is ever a matrix of queries by keys.

`block_mask` gives FlexAttention (He 2024) the rule of `firth.model.attention` as a function of the integers, and which blocks of
128 x 128 it must visit: least and greatest values of a block decide whether the rule holds for all pairs, for none, or has to
be evaluated for each. That is done without a read by the host.

`packed_texts` describes rows of texts that follow each other, for variable-length attention (`torch.nn.attention.varlen`).

>>> times, documents = torch.tensor([[0, 1, 2, 3, 4]]), torch.tensor([[0, 0, 1, 1, 1]])
>>> texts = packed_texts(times, times, documents)
>>> texts.starts.tolist(), texts.longest, texts.causal
([0, 2, 5], 3, True)
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask

from firth.model import native
from firth.model.fused import dropout_mask
from firth.model.native import address, half
from firth.types import ALL_DOCUMENTS, NEVER, host_copy

ROWS = 64
"""Default query rows of a block: larger blocks compute more above the diagonal, smaller ones have slower products."""

MAX_KEPT_BYTES = 128 << 20
"""Most bytes of attention weights kept by one layer; larger batches use the flash kernel, which keeps none."""


def _flat(x: Tensor) -> Tensor:
    """Return (B, H, T, D) of any layout as (B * H, T, D), contiguous."""
    return x.reshape(-1, *x.shape[2:]).contiguous()


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """Return scale * left @ right, batched, in one call without a separate pass for the scale."""
    if scale == 1:
        return torch.bmm(left, right)
    return torch.baddbmm(left.new_empty(1), left, right, beta=0, alpha=scale)


@dataclass(frozen=True)
class _Softmax:
    """How scores become attention weights; the fields are the arguments of `attend`."""

    scale: float
    causal: bool
    lower_triangular: bool
    mask: Tensor | None
    bias: Tensor | None
    native: bool

    def keys(self, count: int) -> int:
        """Return the number of visible keys among `count`: the mask may end before keys that no query attends to."""
        return count if self.mask is None else self.mask.shape[-1]

    @property
    def in_product(self) -> float:
        """Factor in the product that computes the scores; the native softmax applies the scale itself."""
        return 1.0 if self.native else self.scale

    def forward(self, scores: Tensor, heads: int, start: int) -> Tensor:
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

    def backward(self, grad: Tensor, weights: Tensor) -> Tensor:
        """Turn the gradient of weights into that of the scores, in place; the native one includes the scale."""
        if self.native:
            native.library().softmax_backward(
                grad.data_ptr(), weights.data_ptr(), half(grad), self.scale, weights[..., 0].numel(), weights.shape[-1],
                native.threads(),
            )  # fmt: skip
            return grad
        return torch._softmax_backward_data(grad, weights, -1, grad.dtype)


def _block(x: Tensor, start: int, rows: int, keys: int) -> Tensor:
    """Return the part of a mask or bias (B or 1, H or 1, T or 1, S) for some query rows."""
    return x[:, :, start : start + rows, :keys] if x.shape[2] > 1 else x[..., :keys]


def _softmax_forward(
    scores: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float, causal: bool, start: int
) -> None:
    """Compute softmax(scale * scores + bias) under the mask, in place: scores (B, H, rows, keys)."""
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
        bias: Tensor | None,  # noqa: ARG004 (that of the rule; an argument so that autograd requests its gradient)
        rule: _Softmax,
        dropout: float,
        rows: int,
    ) -> Tensor:
        batch, heads, length, width = q.shape
        kept, masks, blocks = [], [], []
        queries, keys, values = _flat(q), _flat(k), _flat(v)
        for start in range(0, length, rows):
            end = min(start + rows, length)
            reach = end if rule.causal or rule.lower_triangular else rule.keys(keys.shape[1])
            scores = _product(queries[:, start:end], keys[:, :reach].mT, rule.in_product)
            kept.append(rule.forward(scores, heads, start))
            if dropout:
                masks.append(dropout_mask(scores, dropout))
                scores = scores * masks[-1]
            blocks.append(torch.bmm(scores, values[:, :reach]))
        ctx.save_for_backward(queries, keys, values, *kept, *masks)
        ctx.rule, ctx.rows, ctx.drops, ctx.heads = rule, rows, bool(dropout), heads
        out = blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)
        # In memory (B, T, H, D), the layout that the next product reads.
        return out.view(batch, heads, length, width).transpose(1, 2).contiguous().transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, values, *saved = ctx.saved_tensors
        kept, masks = (saved[: len(saved) // 2], saved[len(saved) // 2 :]) if ctx.drops else (saved, [])
        rule, heads, rows = ctx.rule, ctx.heads, ctx.rows
        grad = _flat(grad)
        needs_bias = rule.bias is not None and ctx.needs_input_grad[3]
        # With one block and one bias per row, the gradient of the scores is that of the bias; otherwise it is summed.
        direct = needs_bias and len(kept) == 1 and rule.bias.numel() == kept[0].numel()
        dbias = torch.zeros_like(rule.bias) if needs_bias and not direct else None
        # Batched products are fast only into contiguous results: the last block gives whole tensors, earlier ones are added.
        score_grads: list[Tensor] = []
        dk: Tensor | None = None
        dv: Tensor | None = None
        for block in reversed(range(len(kept))):
            weights, start = kept[block], block * rows
            end, reach = start + weights.shape[1], weights.shape[2]
            block_grad = grad[:, start:end]
            score_grad = torch.bmm(block_grad, values[:, :reach].mT)
            used = weights
            if masks:
                score_grad, used = score_grad.mul_(masks[block]), weights * masks[block]
            score_grad = rule.backward(score_grad, weights)
            score_grads.insert(0, _product(score_grad, keys[:, :reach], rule.in_product))
            more_k, more_v = (
                _product(score_grad.mT, queries[:, start:end], rule.in_product),
                torch.bmm(used.mT, block_grad),
            )
            if dk is None or dv is None:
                dk, dv = more_k, more_v
            else:
                dk[:, :reach] += more_k
                dv[:, :reach] += more_v
            if dbias is not None:
                by_head = score_grad.view(-1, heads, end - start, reach)
                by_head = by_head.sum(0, keepdim=True) if len(dbias) == 1 else by_head
                dbias[:, :, start:end, :reach].add_(by_head, alpha=rule.in_product / rule.scale)
        assert dk is not None and dv is not None
        if unseen := keys.shape[1] - dk.shape[1]:
            dk, dv = (F.pad(x, (0, 0, 0, unseen)) for x in (dk, dv))
        if direct:
            dbias = score_grad.view(rule.bias.shape).to(rule.bias.dtype) * (rule.in_product / rule.scale)
        dq = score_grads[0] if len(score_grads) == 1 else torch.cat(score_grads, 1)
        dq, dk, dv = (x.view(-1, heads, *x.shape[1:]) for x in (dq, dk, dv))
        return dq, dk, dv, dbias, None, None, None


def kept_bytes(q: Tensor, k: Tensor) -> int:
    """Return the most bytes of attention weights kept for the backward pass (half of it if causal)."""
    return q[..., 0].numel() * k.shape[2] * q.element_size()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool,
    lower_triangular: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    dropout: float = 0.0,
    rows: int = 0,
    compiled: bool = False,
) -> Tensor:
    """Return softmax(scale q k' + bias) v: (B, H, T, D).

    Args:
        q: (B, H, T, D).
        k: (B, H, S, D).
        v: (B, H, S, D).
        scale: Factor on the scores.
        causal: Query i attends to keys 0..i.
        lower_triangular: The mask hides all keys after i, which are then not computed.
        mask: (B, 1, T or 1, S) bool without an empty row. It may end, as the bias, before keys that no query attends to.
        bias: (B or 1, H, T, S), differentiable.
        dropout: Probability of dropping an attention weight.
        rows: Query rows of a block; 0: ROWS.
        compiled: Whether all but the products is computed by `native.c`.
    """
    rule = _Softmax(
        scale,
        causal,
        lower_triangular,
        mask,
        None if bias is None else bias.detach(),
        compiled and native.supports(q, bias),
    )
    with torch.autocast("cpu", enabled=False):
        return _Blocked.apply(q, k, v, bias, rule, dropout, rows or ROWS)


BLOCK = 128
"""Queries and keys of a block. Rows are rounded up to a multiple, so that few lengths are compiled."""


def block_mask(
    query_time: Tensor,
    key_time: Tensor,
    query_document: Tensor | None = None,
    key_document: Tensor | None = None,
    key_expiry: Tensor | None = None,
) -> BlockMask:
    """Return the rule for FlexAttention, for rows rounded up to a multiple of BLOCK.

    Args:
        query_time: (B, T) integers.
        key_time: (B, S) integers.
        query_document: (B, T) document ids; None: one document.
        key_document: (B, S) document ids; None: one document.
        key_expiry: (B, S) integers; None: no key expires.
    """
    rows = max(len(query_time), len(key_time))
    queries = _rounded(query_time, rows)
    keys = _rounded(key_time, rows, torch.iinfo(torch.int32).max)  # after every query
    (query_low, query_high), (key_low, key_high) = _bounds(queries, 2), _bounds(keys, 1)
    some, every = key_low <= query_high, key_high <= query_low
    expiry = None if key_expiry is None else _rounded(key_expiry, rows)
    if expiry is not None:
        low, high = _bounds(expiry, 1)
        some, every = some & (query_low < high), every & (query_high < low)
    own = other = None
    if query_document is not None and key_document is not None:
        own, other = _rounded(query_document, rows), _rounded(key_document, rows)
        (own_low, own_high), (low, high) = _bounds(own, 2), _bounds(other, 1)
        some = some & ((low <= own_high) & (own_low <= high) | (low == ALL_DOCUMENTS))
        one = (own_low == own_high) & (low == high) & (low == own_low)
        every = every & (one | (high == ALL_DOCUMENTS))

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = keys[batch, key] <= queries[batch, query]
        if expiry is not None:
            seen = seen & (queries[batch, query] < expiry[batch, key])
        if own is not None and other is not None:
            document = other[batch, key]
            seen = seen & ((document == own[batch, query]) | (document == ALL_DOCUMENTS))
        return seen

    partial, full = _listed(some & ~every), _listed(every)
    return BlockMask.from_kv_blocks(*partial, *full, BLOCK, visible, (queries.shape[-1], keys.shape[-1]))


def _rounded(x: Tensor, rows: int, fill: int | None = None) -> Tensor:
    """Return integers (B or 1, T) as (rows, T'), with T' a multiple of BLOCK: further ones are `fill`, or as the last one."""
    more = x[:, -1:] if fill is None else torch.full_like(x[:, -1:], fill)
    return torch.cat((x, more.expand(-1, -x.shape[-1] % BLOCK)), -1).expand(rows, -1).contiguous()


def _bounds(x: Tensor, at: int) -> tuple[Tensor, Tensor]:
    """Return least and greatest values of each block, two of (B, Q, 1) for queries (at 2) or of (B, 1, K) for keys (at 1)."""
    low, high = x.unflatten(-1, (-1, BLOCK)).aminmax(dim=-1)
    return low.unsqueeze(at), high.unsqueeze(at)


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of chosen key blocks of each query block, (B, 1, Q), and all key blocks, those first: (B, 1, Q, K)."""
    order = chosen.byte().argsort(dim=-1, descending=True, stable=True)
    return chosen.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None].contiguous()


@dataclass(frozen=True)
class PackedTexts:
    """Texts that follow each other in the rows of a batch, without tokens between them.

    Args:
        starts: (N + 1,) int32, the first token of each text in the flattened rows, and the end of the last one.
        longest: Tokens of the longest one.
        causal: Whether a token attends to those before it in its text, and to itself, and not to all.
    """

    starts: Tensor
    longest: int
    causal: bool


def packed_texts(query_time: Tensor, key_time: Tensor, document: Tensor) -> PackedTexts | None:
    """Return the texts of packed rows, or None if attention within them is neither causal nor complete.

    Padding at the end of a row is a text of its own, whose output is unused. What the host reads comes from the copies of the
    integers in main memory, if all have one.

    Args:
        query_time: (B, T) integers.
        key_time: (B, T) integers.
        document: (B, T) document ids.
    """
    given = (query_time, key_time, document)
    copies = [host_copy(x) for x in given]
    copied = all(copy is not x for x, copy in zip(given, copies, strict=True))
    query_time, key_time, document = copies if copied else given
    real, new = key_time < NEVER, _first_tokens(key_time, document)
    within = ~new[:, 1:] & real[:, 1:]
    # Ids that never fall are those of adjacent texts; real tokens never follow padding.
    adjacent = ((document[:, 1:] >= document[:, :-1]) | ~real[:, 1:]).all() & (real[:, 1:] <= real[:, :-1]).all()
    absent = query_time <= -NEVER
    plain = adjacent & (document != ALL_DOCUMENTS).all() & torch.where(real, query_time == key_time, absent).all()
    rises = (key_time[:, 1:] > key_time[:, :-1]).logical_or(~within).all()
    level = (key_time[:, 1:] == key_time[:, :-1]).logical_or(~within).all()
    causal, complete = torch.stack((plain & rises, plain & level)).tolist()
    if not (causal or complete):
        return None
    starts = F.pad(new.flatten().nonzero()[:, 0], (0, 1), value=new.numel()).int()
    longest = int(starts.diff().amax())
    if copied:
        first = torch.nonzero_static(_first_tokens(*given[1:]).flatten(), size=len(starts) - 1)[:, 0]
        starts = F.pad(first, (0, 1), value=new.numel()).int()
    return PackedTexts(starts, longest, causal)


def _first_tokens(key_time: Tensor, document: Tensor) -> Tensor:
    """Return which tokens of rows are the first of a text or of padding, (B, T) bool."""
    real = key_time < NEVER
    first = torch.ones_like(real[:, :1])
    return torch.cat((first, (document[:, 1:] != document[:, :-1]) | (real[:, 1:] != real[:, :-1])), 1)


HAS_VARLEN = importlib.util.find_spec("torch.nn.attention.varlen") is not None
"""Whether torch has variable-length attention. A search for a module would interrupt what torch.compile makes of a block."""


def varlen_runs(q: Tensor) -> bool:
    """Return whether torch's variable-length attention takes queries (B, H, T, D): in half precision, on a GPU from Ampere on."""
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.bfloat16, torch.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 256
        and HAS_VARLEN
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def attend_packed(q: Tensor, k: Tensor, v: Tensor, texts: PackedTexts, scale: float) -> Tensor:
    """Return attention within each text of packed rows: q (B, H, T, D), k and v (B, KV, T, D) -> (B, H, T, D)."""
    from torch.nn.attention.varlen import varlen_attn  # absent from older versions

    groups, rows = q.shape[1] // k.shape[1], q.shape[0]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).contiguous() for x in (q, k, v))  # (B T, H, D)
    window = (-1, 0) if texts.causal else (-1, -1)
    out = varlen_attn(
        q, k, v, texts.starts, texts.starts, texts.longest, texts.longest, scale=scale, window_size=window
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (rows, -1)).transpose(1, 2)
