"""Attention masks for kernels of GPUs, from the integers of each token; none of them is ever a matrix of queries by keys.

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

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from firth.types import ALL_DOCUMENTS, NEVER, host_copy

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
