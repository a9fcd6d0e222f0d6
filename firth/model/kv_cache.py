"""The key/value cache of decoding: what a model keeps of earlier tokens (transformers: `past_key_values`).

    cache = model.make_cache(rows, capacity)
    model(prompts, ForwardContext(cache))         # prefill: any number of tokens, whose fields and masks are computed
    cache.start_decoding()
    model(tokens, ForwardContext(cache))          # one token per row and pass

>>> cache = KVCache(rows=1, capacity=4)
>>> k, v = cache.extend(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))
>>> cache.advance(3)
>>> cache.extend(torch.ones(1, 2, 1, 8), torch.ones(1, 2, 1, 8))[0].shape
torch.Size([1, 2, 4, 8])
"""

from __future__ import annotations

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
        cross_mask: The cross-attention mask while decoding, or None.
        decoding_mask: (rows, 1, 1, capacity) bool while decoding, False for padding; None before `start_decoding`.
        has_padding: Whether `decoding_mask` has a False.
    """

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity, self.length, self.layer = rows, capacity, 0, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.fields: dict[str, Tensor] = {}
        self.encoder_kv: list[tuple[Tensor, Tensor]] = []
        self.encoder_fields: Batch = {}
        self.cross_mask: AttentionMask | None = None
        self.decoding_mask: Tensor | None = None
        self.has_padding = False

    def start_decoding(self) -> None:
        """Switch to decoding: each row grows by one token a pass, which attends to all of its row but padding.

        Fields of new tokens are then no longer stored, nor masks computed, which would take longer than a block.
        """
        self.decoding_mask = torch.ones(
            self.rows, 1, 1, self.capacity, dtype=torch.bool, device=self.fields["key_time"].device
        )
        self.decoding_mask[:, 0, 0, : self.length] = self.fields["key_time"][:, : self.length] < NEVER
        self.has_padding = not bool(self.decoding_mask.all())

    @property
    def is_decoding(self) -> bool:
        """Whether `start_decoding` has been called."""
        return self.decoding_mask is not None

    def next_mask(self) -> AttentionMask:
        """Return the mask of the next token after `start_decoding`: all slots and itself, but not padding."""
        assert self.decoding_mask is not None
        return AttentionMask(mask=self.decoding_mask[..., : self.length + 1] if self.has_padding else None)

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

    def select(self, rows: Tensor) -> None:
        """Keep these rows (indices, repeats allowed) in this order."""
        self.rows = len(rows)
        self.keys = [x.index_select(0, rows) for x in self.keys]
        self.values = [x.index_select(0, rows) for x in self.values]
        self.fields = {n: x.index_select(0, rows) for n, x in self.fields.items()}
        self.encoder_kv = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.encoder_kv]
        self.encoder_fields = {n: x.index_select(0, rows) for n, x in self.encoder_fields.items()}
        self.cross_mask = None
        if self.decoding_mask is not None:
            self.decoding_mask = self.decoding_mask.index_select(0, rows)

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


class RecurrentCache(KVCache):
    """Cache of a left-to-right recurrent model: the state of each layer, whose size does not depend on the row length."""

    def __init__(self, rows: int, capacity: int):
        super().__init__(rows, capacity)
        self.layers: dict[int, tuple[Tensor, ...]] = {}

    def start_decoding(self) -> None:
        """Do nothing: the states are the whole cache."""

    def select(self, rows: Tensor) -> None:
        self.rows = len(rows)
        self.layers = {i: tuple(s.index_select(1, rows) for s in states) for i, states in self.layers.items()}
