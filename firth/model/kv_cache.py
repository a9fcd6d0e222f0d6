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

from collections.abc import Sequence

import torch
import torch.nn.functional as F
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

    def merge(self, rows: Tensor, other: KVCache, room: int) -> KVCache:
        """Return a cache with some rows of this one and all rows of another, for further tokens of both.

        The tokens of a row stay in order and end in the last slot in use; slots that are padding in every row are dropped.

        Args:
            rows: The rows of this cache to keep (indices).
            other: Another cache of the same model, after `start_decoding`.
            room: Free slots of the new cache.
        """
        parts = ((self, rows), (other, torch.arange(other.rows, device=rows.device)))
        shown = [part.decoding_mask[index, 0, 0, : part.length] for part, index in parts]  # type: ignore[index]
        length = max(int(mask.sum(1).max()) for mask in shown)
        merged = KVCache(sum(len(index) for _, index in parts), length + room)
        merged.length = length
        # Padding first, then the tokens in order; None where they already are, as without a trained prefix.
        moves = [
            None if bool((mask[:, 1:] >= mask[:, :-1]).all()) else mask.int().argsort(dim=1, stable=True)
            for mask in shown
        ]

        def joined(pair: tuple[Tensor, Tensor], axis: int) -> Tensor:
            """Return the tensors (rows, ..., slots, ...) of both caches in one."""
            shape = list(pair[0].shape)
            shape[0], shape[axis] = merged.rows, merged.capacity
            out, first = pair[0].new_empty(shape), 0
            for x, (part, index), move in zip(pair, parts, moves, strict=True):
                count = min(part.length, length)
                used = x.narrow(axis, part.length - count, count) if move is None else x.narrow(axis, 0, part.length)
                used = used if part is other else used.index_select(0, index)
                if move is not None:
                    view = [1] * x.dim()
                    view[0], view[axis] = len(index), count
                    used = used.gather(
                        axis, move[:, -count:].reshape(view).expand(*used.shape[:axis], count, *used.shape[axis + 1 :])
                    )
                place = out[first : first + len(index)]
                place.narrow(axis, 0, length - count).zero_()
                place.narrow(axis, length - count, count).copy_(used)
                first += len(index)
            return out

        merged.keys = [joined(pair, 2) for pair in zip(self.keys, other.keys, strict=True)]
        merged.values = [joined(pair, 2) for pair in zip(self.values, other.values, strict=True)]
        names = self.fields.keys() & other.fields.keys()
        merged.fields = {name: joined((self.fields[name], other.fields[name]), 1) for name in sorted(names)}
        mask = joined((self.decoding_mask[:, 0, 0], other.decoding_mask[:, 0, 0]), 1)  # type: ignore[index]
        mask[:, length:] = True
        merged.decoding_mask = mask[:, None, None]
        merged.has_padding = not bool(mask.all())
        merged._merge_encoder(parts)
        return merged

    def _merge_encoder(self, parts: Sequence[tuple[KVCache, Tensor]]) -> None:
        """Take the encoder's keys and values of some rows of several caches, padded on the right."""
        size = max((k.shape[2] for part, _ in parts for k, _ in part.encoder_kv[:1]), default=0)

        def joined(pair: Sequence[Tensor]) -> Tensor:
            """Return keys or values (rows, KV, S, D) of all parts in one."""
            rows = [x.index_select(0, index) for x, (_, index) in zip(pair, parts, strict=True)]
            return torch.cat([F.pad(x, (0, 0, 0, size - x.shape[2])) for x in rows])

        layers = zip(*(part.encoder_kv for part, _ in parts), strict=True)
        self.encoder_kv = [(joined([k for k, _ in layer]), joined([v for _, v in layer])) for layer in layers]
        for name in parts[0][0].encoder_fields:
            fill = NEVER if name == "key_time" else 0
            rows = [part.encoder_fields[name].expand(part.rows, -1)[index] for part, index in parts]
            self.encoder_fields[name] = torch.cat([F.pad(x, (0, size - x.shape[1]), value=fill) for x in rows])

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

    def merge(self, rows: Tensor, other: KVCache, room: int) -> KVCache:
        assert isinstance(other, RecurrentCache)
        merged = RecurrentCache(len(rows) + other.rows, max(self.capacity, other.capacity))
        merged.length = max(self.length, other.length)
        merged.layers = {
            i: tuple(torch.cat((a.index_select(1, rows), b), 1) for a, b in zip(states, other.layers[i], strict=True))
            for i, states in self.layers.items()
        }
        return merged

    def select(self, rows: Tensor) -> None:
        self.rows = len(rows)
        self.layers = {i: tuple(s.index_select(1, rows) for s in states) for i, states in self.layers.items()}
