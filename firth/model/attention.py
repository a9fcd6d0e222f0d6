"""Attention: batch fields, masks from integer times, scaled dot-product attention.

Batch fields of the model as rows (B, T).

>>> prefixed_fields({"tokens": torch.tensor([[[3, 4, 5], [6, 7, 8]]])}, "")["positions"].tolist()
[[0, 1, 2]]

Attention masks from integer times, and scaled dot-product attention.

One rule describes every mask:

    query i attends to key j   iff   document_ids[i] == document_ids[j] and key_time[j] <= query_time[i] < key_expiry[j]
                                     (keys of ALL_DOCUMENTS belong to every document)

Bidirectional: zeros. Causal: 0..n-1. Prefix: the prefix at 0, then counting. Permuted: the sampled order. Padding:
key_time NEVER. A placeholder that later tokens replace (MPNet) expires when they appear; without placeholders there is no
key_expiry. A query that attends to nothing outputs zeros. A query at -NEVER is padding: its output is finite and unused,
so a right-padded causal batch is still simply causal.

`AttentionMask.from_times` turns the rule, once per batch, into the cheapest equivalent form:

    no mask                          every query attends to every key
    is_causal                        query i attends to keys 0..i: no mask, half of the work
    mask (B, 1, 1, S)                the same keys for all queries of a row: padding
    block_mask, texts                FlexAttention, or variable-length attention: long rows on CUDA (`firth.model.attention_kernels`)
    mask (B, 1, T, S)                the rule itself; `lower_triangular` if no key after i is visible (packed causal rows)

>>> import torch
>>> when = torch.arange(3)[None]
>>> AttentionMask.from_times(when, when).is_causal
True
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from firth import kernel_choice
from firth.model import attention_kernels, native
from firth.model.attention_kernels import PackedTexts, attend_packed, block_mask, packed_texts, varlen_runs
from firth.types import ALL_DOCUMENTS, NEVER, Batch, host_copy, on_both

FIELDS = ("tokens", "positions", "token_type_ids", "query_time", "key_time", "key_expiry", "document_ids")


def prefixed_fields(batch: Batch, prefix: str, start: int = 0, ahead: int = 0) -> Batch:
    """Return the fields that the model reads, with free axes flattened to rows: (..., T) -> (B, T).

    Args:
        batch: Fields (..., T).
        prefix: Of the field names: "", "source_" or "memory_".
        start: First position, where the batch has no positions.
        ahead: Number of trained positions before the text, which are added to the positions.
    """
    tokens = batch[prefix + "tokens"]
    fields = {name: on_both(lambda x: x.flatten(0, -2), batch[prefix + name]) if tokens.dim() > 2 else batch[prefix + name]
              for name in FIELDS if prefix + name in batch}  # fmt: skip
    if "positions" in fields:
        fields["positions"] = fields["positions"] + ahead if ahead else fields["positions"]
    else:
        start = max(start, ahead)
        slots = torch.arange(start, start + tokens.shape[-1], device=tokens.device)
        fields["positions"] = slots[None]  # (1, T): the same for all rows, so angles and biases are computed once
    return fields


def with_memory(memory: Batch, name: str, own: Tensor) -> Tensor:
    """Return a field of the positions before a row and of its own, (B, M + T); a missing one is 0, key_expiry NEVER."""
    before = memory.get(name)
    if before is None:
        before = torch.full_like(memory["key_time"], NEVER if name == "key_expiry" else 0)
    rows = max(len(before), len(own))
    return torch.cat((before.to(own.dtype).expand(rows, -1), own.expand(rows, -1)), -1)


MIN_FLEX_LENGTH = 256
"""Queries of a row from which on a block mask is faster on CUDA; shorter rows fit in two tiles."""


@dataclass(frozen=True)
class AttentionMask:
    """Attention mask in its cheapest form (see the module).

    Args:
        is_causal: Query i attends to keys 0..i, without a mask.
        mask: (B, 1, T or 1, S) bool, True where a query attends to a key.
        lower_triangular: No query attends to a key after it.
        empty_rows: (B, 1, T or 1, 1) bool, queries that attend to nothing; in `mask` they attend to everything.
        block_mask: FlexAttention's mask, in place of `mask`.
        texts: The texts of packed rows, for kernels that take them in place of `block_mask`; None for other masks.
        num_keys: Keys left when those at the end of the rows that no query attends to (XLNet's query stream) are left
            out, as in `mask`; 0: all.
    """

    is_causal: bool = False
    mask: Tensor | None = None
    lower_triangular: bool = False
    empty_rows: Tensor | None = None
    block_mask: BlockMask | None = None
    texts: PackedTexts | None = None
    num_keys: int = 0

    @staticmethod
    def from_times(
        query_time: Tensor,
        key_time: Tensor,
        query_document: Tensor | None = None,
        key_document: Tensor | None = None,
        flex: bool | None = None,
        key_expiry: Tensor | None = None,
    ) -> AttentionMask:
        """Return the mask of the rule in its cheapest form.

        Args:
            query_time: (B, T) integers.
            key_time: (B, S) integers.
            query_document: (B, T) document ids; None: one document.
            key_document: (B, S) document ids; None: one document.
            flex: Whether to make a block mask where a mask is needed; None: on CUDA, for long rows. A block mask supports
                neither a bias nor dropout.
            key_expiry: (B, S) integers; None: no key expires.
        """
        queries, keys = query_time.shape[-1], key_time.shape[-1]
        ever = key_time < NEVER
        full, same, causal = _form(query_time, key_time, query_document, key_document, key_expiry)
        if full:
            return AttentionMask()
        if causal:
            return AttentionMask(is_causal=True)
        if same:
            return _masked(ever[:, None, None, :])
        if flex is None:
            flex = query_time.device.type == "cuda" and queries >= MIN_FLEX_LENGTH
        if flex:
            block = block_mask(query_time, key_time, query_document, key_document, key_expiry)
            texts = None
            if query_document is not None and query_document is key_document and queries == keys and key_expiry is None:
                texts = packed_texts(query_time, key_time, query_document)
            return AttentionMask(block_mask=block, texts=texts)
        seen = mask_from_times(query_time, key_time, query_document, key_document, key_expiry)[:, None]
        on_cpu = query_time.device.type == "cpu"
        lower = on_cpu and queries == keys and not bool(seen.triu(1).any())
        return _masked(seen, lower, 0 if lower or not on_cpu else _num_visible_keys(ever))


def _form(
    query_time: Tensor,
    key_time: Tensor,
    query_document: Tensor | None,
    key_document: Tensor | None,
    key_expiry: Tensor | None,
) -> tuple[bool, bool, bool]:
    """Return whether all keys are visible to all queries, the same keys are, and each query sees the keys up to its own.

    Args are those of `AttentionMask.from_times`. If all have copies in main memory, those are read.
    """
    given = (query_time, key_time, query_document, key_document, key_expiry)
    here = [None if x is None else host_copy(x) for x in given]
    if all(x is None or copy is not x for x, copy in zip(given, here, strict=True)):
        query_time, key_time, query_document, key_document, key_expiry = here  # type: ignore[assignment]
    queries, keys = query_time.shape[-1], key_time.shape[-1]
    absent = query_time <= -NEVER
    low, high = query_time.masked_fill(absent, NEVER - 1), query_time.masked_fill(absent, -NEVER)
    one = torch.ones((), dtype=torch.bool, device=query_time.device)
    if query_document is not None and key_document is not None:
        one = (
            _same_document(key_document, query_document[:, :1]).all() & (query_document == query_document[:, :1]).all()
        )
    if key_expiry is not None:
        one = one & (key_expiry == NEVER).all()
    ever = key_time < NEVER
    last = key_time.masked_fill(~ever, -NEVER).amax(-1)
    same_keys = one & (last <= low.amin(-1)).all() & (high.amax() < NEVER)
    causal_order = torch.zeros_like(one)
    if queries == keys and queries > 1:
        after = key_time.flip(-1).cummin(-1).values.flip(-1)[:, 1:]
        causal_order = one & (key_time.cummax(-1).values <= low).logical_or(absent).all() & (after > high[:, :-1]).all()
    # Read together: each value read on its own would make an accelerator wait.
    full, same, causal = torch.stack((same_keys & ever.all(), same_keys, causal_order)).tolist()
    return full, same, causal


KEY_MULTIPLE = 16
"""Rows of scores have a multiple of so many keys: products of odd rows are slower, and copy them first."""


def _num_visible_keys(ever: Tensor) -> int:
    """Return the number of keys up to the last visible one of `ever` (B, S), rounded up to KEY_MULTIPLE; 0 for all."""
    seen = ever.any(0).nonzero()
    last = int(seen.amax()) + 1 if len(seen) else 0
    last = -(-last // KEY_MULTIPLE) * KEY_MULTIPLE
    return 0 if last >= ever.shape[-1] else last


def _masked(seen: Tensor, lower_triangular: bool = False, num_keys: int = 0) -> AttentionMask:
    """Return a mask without empty rows, on which kernels disagree, and record which rows were empty."""
    empty = ~seen.any(-1, keepdim=True)
    seen = seen[..., :num_keys].contiguous() if num_keys else seen
    if empty.device.type == "cpu" and not bool(empty.any()):
        return AttentionMask(mask=seen, lower_triangular=lower_triangular, num_keys=num_keys)
    return AttentionMask(mask=seen | empty, empty_rows=empty, num_keys=num_keys)


def mask_from_times(
    query_time: Tensor,
    key_time: Tensor,
    query_document: Tensor | None,
    key_document: Tensor | None,
    key_expiry: Tensor | None = None,
) -> Tensor:
    """Return the rule as a dense mask (B, T, S) bool; arguments as for `AttentionMask.from_times`."""
    seen = key_time[:, None, :] <= query_time[:, :, None]
    if key_expiry is not None:
        seen &= query_time[:, :, None] < key_expiry[:, None, :]
    if query_document is not None and key_document is not None:
        seen &= _same_document(key_document[:, None, :], query_document[:, :, None])
    return seen


def _same_document(key_document: Tensor, document: Tensor) -> Tensor:
    return (key_document == document) | (key_document == ALL_DOCUMENTS)


@cache
def _compiled_flex() -> object:
    return torch.compile(flex_attention, dynamic=False)


@dataclass(frozen=True)
class AttentionKernel:
    """An implementation of attention for training on a CPU.

    Args:
        rows: Query rows of a block of `firth.model.attention_kernels`; 0: torch's flash kernel.
        compiled: Whether the operations between its products are compiled (`firth.model.native`).
    """

    rows: int = 0
    compiled: bool = False


KERNELS = {
    "sdpa": AttentionKernel(),
    "blocks-64": AttentionKernel(64),
    "blocks-256": AttentionKernel(256),
    "native-64": AttentionKernel(64, compiled=True),
    "native-128": AttentionKernel(128, compiled=True),
    "native-256": AttentionKernel(256, compiled=True),
}
"""Name -> implementation."""


def _workload(length: int, dtype: torch.dtype, kernel: AttentionKernel) -> kernel_choice.Workload:
    """Return causal attention of 1024 tokens, 4 heads of 64, forward and backward."""
    q, k, v = (torch.linspace(-1, 1, 1024 * 256).view(-1, 4, length, 64).to(dtype).requires_grad_() for _ in range(3))
    if kernel.compiled:
        native.library()

    def work() -> None:
        if kernel.rows:
            out = attention_kernels.attend(
                q, k, v, 0.125, True, False, None, None, rows=kernel.rows, compiled=kernel.compiled
            )
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.backward(out, q.detach())

    return work


MIN_LONG_KEYS = 512
"""Keys of a row above which a kernel is chosen by its speed on rows of 1,024 tokens, and not of 256."""

ATTENTION = {
    (dtype, long): kernel_choice.Kernel(
        f"attention{'-long' if long else ''}-{name}",
        {label: partial(_workload, 1024 if long else 256, dtype, kernel) for label, kernel in KERNELS.items()},
    )
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
    for long in (False, True)
}
"""(dtype, whether rows are long) -> measured choice among KERNELS for training on a CPU."""


@cache
def flash_runs(dtype: torch.dtype) -> bool:
    """Return whether torch's flash kernel runs on this CPU: in bf16 it needs AVX-512 where oneDNN has bf16 products."""
    x = torch.zeros(1, 1, 256, 64, dtype=dtype)
    try:
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
    except RuntimeError:
        return False
    return True


def _kernel(q: Tensor, k: Tensor) -> AttentionKernel:
    """Return the implementation to use: blocks where a CPU trains faster with them, else torch's kernel."""
    if q.device.type != "cpu":
        return KERNELS["sdpa"]
    kernel = ATTENTION.get((q.dtype, k.shape[2] > MIN_LONG_KEYS))
    chosen = KERNELS["blocks-64"] if kernel is None else KERNELS[kernel.choice()]
    if q.dtype == torch.bfloat16 and q.shape[2] > 1 and not flash_runs(q.dtype):
        return chosen if chosen.rows else KERNELS["blocks-64"]
    training = torch.is_grad_enabled() and q.requires_grad
    return (
        chosen
        if training and attention_kernels.kept_bytes(q, k) <= attention_kernels.MAX_KEPT_BYTES
        else KERNELS["sdpa"]
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: AttentionMask,
    scale: float,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return softmax(scale q k' + bias) v over the visible keys: (B, H, T, D).

    Args:
        q: (B, H, T, D).
        k: (B, KV, S, D).
        v: (B, KV, S, D).
        attention_mask: Which keys each query attends to.
        scale: Factor on the scores.
        bias: (B or 1, H, T, S), added to the scores; differentiable.
        dropout: Probability of dropping an attention weight.
    """
    groups = q.shape[1] // k.shape[1]
    if attention_mask.num_keys:
        bias = None if bias is None else bias[..., : attention_mask.num_keys]
    if torch.is_autocast_enabled(q.device.type):  # rotary positions and XLNet's offsets give fp32
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    kernel = _kernel(q, k) if attention_mask.block_mask is None else KERNELS["sdpa"]
    if kernel.rows:
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = attention_kernels.attend(
            q,
            k,
            v,
            scale,
            attention_mask.is_causal,
            attention_mask.lower_triangular,
            attention_mask.mask,
            bias,
            dropout,
            kernel.rows,
            kernel.compiled,
        )
    elif attention_mask.texts is not None and varlen_runs(q):
        out = attend_packed(q, k, v, attention_mask.texts, scale)
    elif attention_mask.block_mask is not None:
        flex, block, length = (
            _compiled_flex() if q.device.type == "cuda" else flex_attention,
            attention_mask.block_mask,
            q.shape[2],
        )
        q, k, v = (
            F.pad(x, (0, 0, 0, n - x.shape[2]))
            for x, n in zip((q, k, v), (block.shape[-2], *[block.shape[-1]] * 2), strict=True)
        )
        out = flex(q, k, v, block_mask=block, scale=scale, enable_gqa=groups > 1)[:, :, :length]  # type: ignore[operator]
    else:
        mask, causal = attention_mask.mask, attention_mask.is_causal
        if attention_mask.num_keys:
            k, v = k[:, :, : attention_mask.num_keys], v[:, :, : attention_mask.num_keys]
        if bias is not None:
            if causal:
                mask, causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril(), False
            mask = bias.to(q.dtype) if mask is None else bias.to(q.dtype).masked_fill(~mask, float("-inf"))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=groups > 1
        )
    return out if attention_mask.empty_rows is None else out.masked_fill(attention_mask.empty_rows, 0)


def attention_weights(
    q: Tensor, k: Tensor, attention_mask: AttentionMask, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Return softmax(scale q k' + bias) over the visible keys, (B, H, T, S) float32: what `attend` multiplies the values by.

    For inspection: all weights are in memory at once. A query that attends to nothing has weights of 0. Arguments as for `attend`.
    """
    keys = attention_mask.num_keys or k.shape[2]
    k = k[:, :, :keys].repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = scale * (q.float() @ k.float().mT)
    if bias is not None:
        scores = scores + bias[..., :keys].float()
    rows, _, queries, _ = scores.shape
    mask = attention_mask.mask
    if attention_mask.is_causal:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
    if attention_mask.block_mask is not None:
        block = attention_mask.block_mask
        mask = create_mask(block.mask_mod, rows, None, queries, keys, device=str(q.device))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(-1).nan_to_num(0.0)  # NaN where a block mask shows nothing
    return weights if attention_mask.empty_rows is None else weights.masked_fill(attention_mask.empty_rows, 0)
