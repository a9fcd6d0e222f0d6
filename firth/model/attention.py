"""The one attention, and the one rule of who sees whom.

    position i may attend to token j   iff   document[i] == document[j] and appears[j] <= looks[i] < leaves[j]
                                             (what is of EVERY document is of that of i)

Full attention: zeros. Causal: 0..n-1. Prefix: the prefix at 0, then counting. Permutation: the drawn order.
Padding: appears NEVER. What stands in for another until that is known (MPNet) leaves when it is; where nothing leaves,
there is no such field. A position that sees nothing reads zeros. One whose looks is -NEVER is not there at all: what
it reads is finite and meant for nobody, so a right-padded causal batch is still simply causal.

`Visibility.lower` turns the rule, once per batch, into the cheapest form that says the same:

    nothing at all                   every position sees every token
    causal                           position i sees slots 0..i: no mask, half of the work
    mask (B, 1, 1, S)                the same tokens for all positions of a row: padding
    block                            FlexAttention's block mask (He 2024): long rows on CUDA
    mask (B, 1, T, S)                the rule itself; `below` says that nothing after i is seen, as in packed causal rows

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
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from firth import kernels
from firth.model import blocked_attention, native
from firth.types import NEVER

EVERY = -1
"""The document of a key that belongs to all documents of its row: a trained prefix (`firth.model.prefix`)."""

FLEX = 256
"""Rows from this length on are worth a block mask on CUDA; shorter ones fit in two tiles."""


@dataclass(frozen=True)
class AttentionMask:
    """Who sees whom, lowered (see above). `blind` (B, 1, T or 1, 1): positions that see nothing; in `mask` they see all.

    keys: how many keys stay when those at the end of the rows that nobody sees (queries of a permuted order) are left out, as
    `mask` leaves them out; 0 where all stay.
    """

    is_causal: bool = False
    mask: Tensor | None = None
    lower_triangular: bool = False
    empty_rows: Tensor | None = None
    block_mask: BlockMask | None = None
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
        """looks (B, T) of the queries, appears (B, S) of the keys; documents (B, T) and (B, S), None for one each;
        leaves (B, S) of the keys, None where none does.

        flex: whether to make a block mask where a mask is needed; None: on CUDA, for long rows. A block mask can
        carry neither a bias nor dropout.
        """
        queries, keys = query_time.shape[-1], key_time.shape[-1]
        absent = query_time <= -NEVER
        low, high = query_time.masked_fill(absent, NEVER - 1), query_time.masked_fill(absent, -NEVER)
        one = torch.ones((), dtype=torch.bool, device=query_time.device)
        if query_document is not None and key_document is not None:
            one = _together(key_document, query_document[:, :1]).all() & (query_document == query_document[:, :1]).all()
        if key_expiry is not None:
            one = one & (key_expiry == NEVER).all()
        ever = key_time < NEVER
        last = key_time.masked_fill(~ever, -NEVER).amax(-1)
        alike = one & (last <= low.amin(-1)).all() & (high.amax() < NEVER)
        stairs = torch.zeros_like(one)
        if queries == keys and queries > 1:
            after = key_time.flip(-1).cummin(-1).values.flip(-1)[:, 1:]
            stairs = one & (key_time.cummax(-1).values <= low).logical_or(absent).all() & (after > high[:, :-1]).all()
        # All questions in one go: each answer read alone would make an accelerator wait.
        everything, same, causal = torch.stack((alike & ever.all(), alike, stairs)).tolist()
        if everything:
            return AttentionMask()
        if causal:
            return AttentionMask(is_causal=True)
        if same:
            return _masked(ever[:, None, None, :])
        if flex is None:
            flex = query_time.device.type == "cuda" and queries >= FLEX
        seen = mask_from_times(query_time, key_time, query_document, key_document, key_expiry)[:, None]
        if not flex:
            on_cpu = query_time.device.type == "cpu"
            below = on_cpu and queries == keys and not bool(seen.triu(1).any())
            return _masked(seen, below, 0 if below or not on_cpu else _reach(ever))

        def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return seen[batch, 0, query, key]

        block = create_block_mask(visible, len(query_time), None, queries, keys, device=query_time.device)
        return AttentionMask(block_mask=block, empty_rows=~seen.any(-1, keepdim=True))


EVEN_KEYS = 16
"""Rows of scores are a multiple of so many keys: products of odd rows are slower, and copy them first."""


def _reach(ever: Tensor) -> int:
    """How many keys (B, S) there are up to the last one that somebody may see, evened out; 0 for all."""
    seen = ever.any(0).nonzero()
    last = int(seen.amax()) + 1 if len(seen) else 0
    last = -(-last // EVEN_KEYS) * EVEN_KEYS
    return 0 if last >= ever.shape[-1] else last


def _masked(seen: Tensor, below: bool = False, keys: int = 0) -> AttentionMask:
    """A mask in which no row is empty, since kernels disagree on those, and which rows those were."""
    blind = ~seen.any(-1, keepdim=True)
    seen = seen[..., :keys].contiguous() if keys else seen
    if blind.device.type == "cpu" and not bool(blind.any()):
        return AttentionMask(mask=seen, lower_triangular=below, num_keys=keys)
    return AttentionMask(mask=seen | blind, empty_rows=blind, num_keys=keys)


def mask_from_times(
    query_time: Tensor,
    key_time: Tensor,
    query_document: Tensor | None,
    key_document: Tensor | None,
    key_expiry: Tensor | None = None,
) -> Tensor:
    """The rule written out: (B, T, S) bool."""
    seen = key_time[:, None, :] <= query_time[:, :, None]
    if key_expiry is not None:
        seen &= query_time[:, :, None] < key_expiry[:, None, :]
    if query_document is not None and key_document is not None:
        seen &= _together(key_document[:, None, :], query_document[:, :, None])
    return seen


def _together(key_document: Tensor, document: Tensor) -> Tensor:
    return (key_document == document) | (key_document == EVERY)


@cache
def _compiled_flex() -> object:
    return torch.compile(flex_attention, dynamic=False)


@dataclass(frozen=True)
class AttentionKernel:
    """How attention is trained on a CPU: query rows of a block of `firth.model.blocked_attention` (0: torch's flash kernel), and whether
    what is between its products is compiled (`firth.model.native`)."""

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
"""Name of an implementation -> what it is."""


def _workload(length: int, dtype: torch.dtype, way: AttentionKernel) -> kernels.Workload:
    """Causal attention of 1024 tokens, 4 heads of 64, forward and backward."""
    q, k, v = (torch.linspace(-1, 1, 1024 * 256).view(-1, 4, length, 64).to(dtype).requires_grad_() for _ in range(3))
    if way.compiled:
        native.library()

    def work() -> None:
        if way.rows:
            out = blocked_attention.attend(
                q, k, v, 0.125, True, False, None, None, rows=way.rows, compiled=way.compiled
            )
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.backward(out, q.detach())

    return work


LONG_ROW = 512
"""Keys of a row from which on a kernel is chosen by what it does on rows of 1,024, and not of 256."""

ATTENTION = {
    (dtype, long): kernels.Kernel(
        f"attention{'-long' if long else ''}-{name}",
        {label: partial(_workload, 1024 if long else 256, dtype, way) for label, way in KERNELS.items()},
    )
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
    for long in (False, True)
}
"""(dtype, whether rows are long) -> how attention is trained on a CPU."""


@cache
def _flash_runs(dtype: torch.dtype) -> bool:
    """Whether torch's flash kernel runs on this CPU: in bf16 it wants AVX-512 where oneDNN has bf16 products."""
    x = torch.zeros(1, 1, 256, 64, dtype=dtype)
    try:
        F.scaled_dot_product_attention(x, x, x, is_causal=True)
    except RuntimeError:
        return False
    return True


def _way(q: Tensor, k: Tensor) -> AttentionKernel:
    """Return how this attention is computed: in blocks in training on a CPU that is quicker at it, else by torch's kernel."""
    if q.device.type != "cpu":
        return KERNELS["sdpa"]
    kernel = ATTENTION.get((q.dtype, k.shape[2] > LONG_ROW))
    chosen = KERNELS["blocks-64"] if kernel is None else KERNELS[kernel.choice()]
    if q.dtype == torch.bfloat16 and q.shape[2] > 1 and not _flash_runs(q.dtype):
        return chosen if chosen.rows else KERNELS["blocks-64"]
    learns = torch.is_grad_enabled() and q.requires_grad
    return (
        chosen if learns and blocked_attention.kept_bytes(q, k) <= blocked_attention.MAX_KEPT_BYTES else KERNELS["sdpa"]
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
    """softmax(scale q k' + bias) v over what is seen: q (B, H, T, D), k and v (B, KV, S, D) -> (B, H, T, D).

    bias: (B or 1, H, T, S), added to the scores and given a gradient.
    """
    groups = q.shape[1] // k.shape[1]
    if attention_mask.num_keys:
        bias = None if bias is None else bias[..., : attention_mask.num_keys]
    if torch.is_autocast_enabled(q.device.type):  # rotary positions and XLNet's offsets leave fp32 here and there
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    way = _way(q, k) if attention_mask.block_mask is None else KERNELS["sdpa"]
    if way.rows:
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = blocked_attention.attend(
            q,
            k,
            v,
            scale,
            attention_mask.is_causal,
            attention_mask.lower_triangular,
            attention_mask.mask,
            bias,
            dropout,
            way.rows,
            way.compiled,
        )
    elif attention_mask.block_mask is not None:
        flex = _compiled_flex() if q.device.type == "cuda" else flex_attention
        out = flex(q, k, v, block_mask=attention_mask.block_mask, scale=scale, enable_gqa=groups > 1)  # type: ignore[operator]
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


class KVCache:
    """Keys and values of the tokens read so far, in preallocated slots, and what is needed to see them.

    rows: batch size. capacity: most slots a row may fill; one that has been filled keeps its place, padding too, which
    nobody sees. For an encoder-decoder also the keys and values of the source, made once.
    """

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity, self.length, self.layer = rows, capacity, 0, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.fields: dict[str, Tensor] = {}
        self.cross: list[tuple[Tensor, Tensor]] = []
        self.source: dict[str, Tensor] = {}
        self.cross_mask: AttentionMask | None = None
        self.decoding_mask: Tensor | None = None
        self.gaps = False

    def start_decoding(self) -> None:
        """From here on each row grows by one token a pass, which sees all of its row that is not padding.

        Nothing about the new tokens need be noted or lowered any more, which would take longer than a block.
        """
        self.decoding_mask = torch.ones(
            self.rows, 1, 1, self.capacity, dtype=torch.bool, device=self.fields["key_time"].device
        )
        self.decoding_mask[:, 0, 0, : self.length] = self.fields["key_time"][:, : self.length] < NEVER
        self.gaps = not bool(self.decoding_mask.all())

    def next_mask(self) -> AttentionMask:
        """What the next token of each row sees, after `write_on`: all slots, itself too, but those of padding."""
        assert self.decoding_mask is not None
        return AttentionMask(mask=self.decoding_mask[..., : self.length + 1] if self.gaps else None)

    def append_field(self, name: str, value: Tensor) -> Tensor:
        """Store a field (B or 1, T) of the new tokens; return that field of all tokens: (B, length + T)."""
        end = self.length + value.shape[-1]
        if end > self.capacity:
            raise ValueError(f"a cache of {self.capacity} slots cannot hold {end} tokens")
        if name not in self.fields:
            self.fields[name] = value.new_empty((self.rows, self.capacity))
        self.fields[name][:, self.length : end] = value
        return self.fields[name][:, :end]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B, KV, T, D) of the next layer of this pass; return those of all tokens."""
        layer = self.layer
        self.layer += 1
        if layer == len(self.keys):
            size = (self.rows, k.shape[1], self.capacity, k.shape[3])
            self.keys.append(k.new_empty(size))
            self.values.append(v.new_empty(size))
        keys, values, count = self.keys[layer], self.values[layer], k.shape[2]
        keys.narrow(2, self.length, count).copy_(k)
        values.narrow(2, self.length, count).copy_(v)
        end = self.length + count
        return keys.narrow(2, 0, end), values.narrow(2, 0, end)

    def advance(self, count: int) -> None:
        """A pass over `count` new tokens is done."""
        self.length, self.layer = self.length + count, 0

    def select(self, rows: Tensor) -> None:
        """Keep these rows (indices, repeats allowed), in this order."""
        self.rows = len(rows)
        self.keys = [x.index_select(0, rows) for x in self.keys]
        self.values = [x.index_select(0, rows) for x in self.values]
        self.cross = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.cross]
        self.fields = {n: x.index_select(0, rows) for n, x in self.fields.items()}
        self.source = {n: x.index_select(0, rows) for n, x in self.source.items()}
        self.cross_mask, self.decoding_mask = (
            None,
            None if self.decoding_mask is None else self.decoding_mask.index_select(0, rows),
        )
