"""The key/value cache of decoding: what a model keeps of earlier tokens (transformers: `past_key_values`).

    cache = model.make_cache(rows, capacity)
    model(prompts, ForwardContext(cache))         # prefill: any number of tokens, whose fields and masks are computed

    decoding = model.make_decoding_cache(max_rows)
    decoding.add(cache, range(rows), lengths, capacity)
    model(tokens, ForwardContext(decoding))       # one token per row and pass; rows are added and removed between passes

>>> cache = KVCache(rows=1, capacity=4)
>>> k, v = cache.extend(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))
>>> cache.advance(3)
>>> cache.extend(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8))[0].shape
torch.Size([1, 2, 4, 8])
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from firth.model.attention import AttentionMask
from firth.types import NEVER, Batch


class KVCache:
    """Keys and values of earlier tokens, in preallocated slots, and the batch fields that their mask needs.

    Padding keeps its slot, to which no query attends.

    Args:
        rows: Batch size.
        capacity: Slots of a row.

    Attributes:
        length: Slots in use.
        keys: The keys (rows, KV, capacity, D) of each layer.
        values: The values of each layer, likewise.
        fields: Batch fields of the tokens, (rows, capacity) each.
        encoder_kv: Keys and values (rows, KV, S, D) of the encoder's states for each layer, computed once.
        encoder_fields: The batch fields of these states, (rows or 1, S) each.
    """

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity, self.length, self.layer = rows, capacity, 0, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.fields: dict[str, Tensor] = {}
        self.encoder_kv: list[tuple[Tensor, Tensor]] = []
        self.encoder_fields: Batch = {}

    def append_field(self, name: str, value: Tensor) -> Tensor:
        """Store a field (B or 1, T) of the new tokens; return the field of all tokens, (B, length + T)."""
        end = self.length + value.shape[-1]
        if end > self.capacity:
            raise ValueError(f"a cache of {self.capacity} slots cannot hold {end} tokens")
        if name not in self.fields:
            self.fields[name] = value.new_empty((self.rows, self.capacity))
        self.fields[name][:, self.length : end] = value
        return self.fields[name][:, :end]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (B, KV, T, D) of the new tokens for the next layer; return those of all tokens."""
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
        """End a pass over `count` new tokens."""
        self.length, self.layer = self.length + count, 0

    def load(self, pairs: Tensor, trained: int) -> None:
        """Fill an empty cache of one row with the keys and values of a causal text.

        Args:
            pairs: (2, layers, KV, slots, D), with those of the trained positions before the text.
            trained: Number of trained positions.
        """
        self.length = pairs.shape[3]
        for own, layers in ((self.keys, pairs[0]), (self.values, pairs[1])):
            own.extend(x.new_empty((1, x.shape[0], self.capacity, x.shape[2])) for x in layers)
            for to, x in zip(own, layers, strict=True):
                to[0, :, : self.length] = x
        slots = torch.arange(self.capacity, device=pairs.device)[None]
        self.fields = {"key_time": slots - trained, "positions": slots}

    def repeat(self, rows: int, capacity: int) -> KVCache:
        """Return a cache with `rows` copies of the only row of this one, and `capacity` slots; this one is unchanged."""
        copy, size = KVCache(rows, capacity), self.length
        copy.length = size
        for own, theirs in ((self.keys, copy.keys), (self.values, copy.values)):
            for x in own:
                grown = x.new_empty((rows, x.shape[1], capacity, x.shape[3]))
                grown[:, :, :size] = x[:, :, :size]
                theirs.append(grown)
        for name, x in self.fields.items():
            copy.fields[name] = x.new_empty((rows, capacity))
            copy.fields[name][:, :size] = x[:, :size]
        return copy


class DecodingCache(KVCache):
    """Keys and values of rows that grow by one token a pass, each with a length of its own.

    Row r has its tokens in the slots 0 to lengths[r] - 1, without padding, so that the position of a token is its slot, and
    the sums of a row are those of the row alone. The rows in use are the first ones: the last row is copied to the place of
    a removed one. Tensors are allocated for the longest row that is added; if a longer one comes, again, at least half as
    large again.

    Args:
        max_rows: Most rows.
        trained: Trained positions before each text (`LM.num_virtual_tokens`).

    Attributes:
        lengths: Slots in use of each row.
        source_lengths: Encoder states of each row.
        allocations: How often tensors were allocated: their addresses change then.
    """

    def __init__(self, max_rows: int, trained: int = 0):
        super().__init__(0, 0)
        self.max_rows, self.trained, self.allocations = max_rows, trained, 0
        self.lengths: list[int] = []
        self.source_lengths: list[int] = []
        self._slots: Tensor | None = None  # of the new tokens in this pass; None: the same for all rows

    def add(self, cache: KVCache, rows: Sequence[int], lengths: Sequence[int], capacity: int) -> None:
        """Copy rows of a prefilled cache, without their padding.

        Args:
            cache: Rows that end in the last slot in use; trained positions before the text are in the first slots.
            rows: Which rows (indices, repeats allowed).
            lengths: Slots of each row, without padding and with trained positions.
            capacity: Most slots that any of these rows will need.
        """
        first, end, ahead = self.rows, self.rows + len(rows), self.trained
        sources = [0] * len(rows)
        if cache.encoder_kv:
            found = (cache.encoder_fields["key_time"] < NEVER).sum(-1).expand(cache.rows).tolist()
            sources = [found[row] for row in rows]
        self._allocate(cache, end, capacity, max(sources))
        index = torch.tensor(rows, device=self.keys[0].device)
        for to, x in zip((*self.keys, *self.values), (*cache.keys, *cache.values), strict=True):
            if min(lengths) == cache.length:
                to[first:end, :, : cache.length] = x[index, :, : cache.length]
                continue
            for i, (row, n) in enumerate(zip(rows, lengths, strict=True), first):
                to[i, :, :ahead] = x[row, :, :ahead]
                to[i, :, ahead:n] = x[row, :, cache.length - n + ahead : cache.length]
        for own, given in zip(self.encoder_kv, cache.encoder_kv, strict=True):
            for to, x in zip(own, given, strict=True):
                to[first:end, :, : max(sources)] = x[index, :, : max(sources)]
        self.source_lengths += sources
        self._set_lengths([*self.lengths, *lengths])

    def _allocate(self, like: KVCache, rows: int, capacity: int, source: int) -> None:
        """Allocate tensors for so many rows, slots and encoder states, if they are not there yet; contents are kept."""
        old_rows = len(self.keys[0]) if self.keys else 0
        old_source = self.encoder_kv[0][0].shape[2] if self.encoder_kv else 0
        if rows <= old_rows and capacity <= self.capacity and source <= old_source:
            return
        rows = max(old_rows, rows if rows <= old_rows else min(self.max_rows, max(rows, 2 * old_rows)))
        capacity = _grown(self.capacity, capacity)
        source = _grown(old_source, source)

        def grown(old: Sequence[Tensor], like: Sequence[Tensor], slots: int) -> list[Tensor]:
            new = [_zeros((rows, x.shape[1], slots, x.shape[3]), x) for x in like]
            for to, x in zip(new, old, strict=False):
                to[: self.rows, :, : x.shape[2]] = x[: self.rows]
            return new

        self.keys, self.values = grown(self.keys, like.keys, capacity), grown(self.values, like.values, capacity)
        keys = grown([k for k, _ in self.encoder_kv], [k for k, _ in like.encoder_kv], source)
        values = grown([v for _, v in self.encoder_kv], [v for _, v in like.encoder_kv], source)
        self.encoder_kv = list(zip(keys, values, strict=True))
        self.capacity, self.allocations = capacity, self.allocations + 1

    def remove(self, rows: Collection[int]) -> list[int]:
        """Remove rows, and return the old index of the row that is now in each place."""
        gone, kept = set(rows), self.rows - len(set(rows))
        order = list(range(kept))
        moved = [row for row in range(kept, self.rows) if row not in gone]
        for place, row in zip(sorted(row for row in gone if row < kept), moved, strict=True):
            order[place] = row
            for x in (*self.keys, *self.values):
                x[place, :, : self.lengths[row]] = x[row, :, : self.lengths[row]]
            for x in (x for pair in self.encoder_kv for x in pair):
                x[place, :, : self.source_lengths[row]] = x[row, :, : self.source_lengths[row]]
        self.source_lengths = [self.source_lengths[row] for row in order]
        self._set_lengths([self.lengths[row] for row in order])
        return order

    def rewind(self, lengths: list[int]) -> None:
        """Forget the slots of each row from its new length on."""
        self._set_lengths(lengths)

    def _set_lengths(self, lengths: list[int]) -> None:
        self.lengths, self.rows, self.length = lengths, len(lengths), max(lengths, default=0)

    def next_slots(self) -> Tensor:
        """Return the slots, which are the positions, of the next tokens: (rows,) int64."""
        return torch.tensor(self.lengths, device=self.keys[0].device)

    def key_positions(self) -> Tensor:
        """Return the positions (1, longest) of the slots of the longest row with its next token."""
        return torch.arange(self.length + 1, device=self.keys[0].device)[None]

    def next_mask(self) -> AttentionMask:
        """Return the mask of the next tokens: each attends to its row and itself."""
        if min(self.lengths) == self.length:
            return AttentionMask()
        return AttentionMask(mask=(self.key_positions() <= self.next_slots()[:, None])[:, None, None])

    def source_mask(self) -> AttentionMask:
        """Return the mask of cross-attention: each row attends to its source."""
        longest = max(self.source_lengths)
        if min(self.source_lengths) == longest:
            return AttentionMask()
        slots = torch.arange(longest, device=self.keys[0].device)
        return AttentionMask(mask=(slots < self.source_size()[:, None])[:, None, None])

    def source_size(self) -> Tensor:
        """Return the number of encoder states of each row: (rows,) int64."""
        return torch.tensor(self.source_lengths, device=self.keys[0].device)

    def source_kv(self) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values (rows, KV, longest, D) of the encoder's states for each layer."""
        rows, longest = self.rows, max(self.source_lengths)
        return [(k[:rows, :, :longest], v[:rows, :, :longest]) for k, v in self.encoder_kv]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store keys and values (rows, KV, 1, D) of the new tokens for the next layer; return those of all tokens."""
        keys, values = self.keys[self.layer][: self.rows], self.values[self.layer][: self.rows]
        if not self.layer:
            self._slots = None if min(self.lengths) == self.length else self.next_slots()
        self.layer += 1
        for to, x in ((keys, k), (values, v)):
            if self._slots is None:
                to.narrow(2, self.length, 1).copy_(x)
            else:
                to[torch.arange(self.rows, device=to.device), :, self._slots] = x[:, :, 0].to(to.dtype)
        return keys.narrow(2, 0, self.length + 1), values.narrow(2, 0, self.length + 1)

    def advance(self, count: int) -> None:
        self.layer = 0
        self._set_lengths([n + count for n in self.lengths])


def _grown(old: int, needed: int) -> int:
    """Return a capacity of at least `needed`; one that grows grows by half, so that copies are rare."""
    return old if needed <= old else max(needed, old * 3 // 2)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return zeros of the dtype and device of `like`. On a CPU the system gives memory only to the pages that are written.

    Slots behind the end of a row are read with weight 0, so they must hold numbers.
    """
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size, line = math.prod(shape) * like.element_size(), 64
    buffer = torch.from_numpy(np.zeros(size + line, np.uint8))
    start = -buffer.data_ptr() % line
    return buffer[start : start + size].view(like.dtype).view(shape)


class RecurrentCache(DecodingCache):
    """Cache of a left-to-right recurrent model: the state of each layer, whose size does not depend on the row length.

    Args:
        rows: Batch size; 0 for a cache to which rows are added.
    """

    def __init__(self, rows: int = 0):
        super().__init__(rows)
        self.layers: dict[int, tuple[Tensor, ...]] = {}
        self._set_lengths([0] * rows)

    def add(self, cache: KVCache, rows: Sequence[int], lengths: Sequence[int], capacity: int) -> None:
        assert isinstance(cache, RecurrentCache)
        for i, states in cache.layers.items():
            new = tuple(s[:, rows] for s in states)
            old = self.layers.get(i)
            self.layers[i] = new if old is None else tuple(torch.cat(pair, 1) for pair in zip(old, new, strict=True))
        self._set_lengths([*self.lengths, *lengths])

    def remove(self, rows: Collection[int]) -> list[int]:
        order = [row for row in range(self.rows) if row not in rows]
        self.layers = {i: tuple(s[:, order] for s in states) for i, states in self.layers.items()}
        self._set_lengths([self.lengths[row] for row in order])
        return order

    def next_slots(self) -> Tensor:
        return torch.tensor(self.lengths, device=self.layers[0][0].device)
