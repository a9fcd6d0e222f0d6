"""Tokens in, hidden states out: the one model. What an objective adds (heads, a generator) lives in `parts`.

The model reads `tokens`, `positions`, `segments`, `looks`, `appears` and `document`, and for an encoder-decoder
the same with `source_` before them; it knows no objective. The last axis is tokens, the others are free.

>>> import torch
>>> from firth.model.shape import decoder
>>> model = LM(decoder(vocab=50, width=64, depth=1), {})
>>> model({"tokens": torch.tensor([[3, 4, 5], [6, 7, 8]])}).shape
torch.Size([2, 3, 64])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from firth.model.attention import Cache, Visibility
from firth.model.block import Block, Reading, initialise
from firth.model.latent import Latent
from firth.model.linformer import Linformer
from firth.model.norm import make_norm
from firth.model.position import Relative, rotation, sinusoidal, turns
from firth.model.shape import Shape
from firth.types import NEVER, Batch, UserError

FIELDS = ("tokens", "positions", "segments", "looks", "appears", "document")


class Trunk(nn.Module):
    """A stack of blocks, what it adds to the embeddings before them and the norm after them."""

    def __init__(self, shape: Shape, depth: int, cross: bool, both_ways: bool):
        super().__init__()
        self.shape = shape
        self.embed_norm = make_norm(shape) if shape.embed_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(shape, layer, cross) for layer in range(depth))
        self.norm = make_norm(shape) if shape.norm_at == "pre" else nn.Identity()
        self.relative = Relative(shape, both_ways) if shape.position == "t5" else None
        self.linformer = Linformer(shape) if shape.linformer else None
        self.drop = nn.Dropout(shape.dropout) if shape.dropout else nn.Identity()

    def layers(self) -> list[Block]:
        """The blocks, typed."""
        return list(self.blocks)  # type: ignore[arg-type]

    def forward(
        self,
        x: Tensor,
        fields: Batch,
        cache: Cache | None = None,
        memory: Tensor | None = None,
        source: Batch | None = None,
    ) -> Tensor:
        """x: embeddings (B, T, width); fields: (B, T) each; memory (B, S, width) with the source's fields."""
        x = self.drop(self.embed_norm(x))
        reading = self.reading(fields, cache)
        across: Reading | None = None
        crossed: Sequence[tuple[Tensor, Tensor] | None] = [None] * len(self.blocks)
        if source is not None:
            across = Reading(self.crossing(fields, source, cache))
            if memory is not None:
                made = [block.crossing(memory) for block in self.layers()]
                if cache is not None:
                    cache.cross, cache.source = made, source
            elif cache is not None:
                made = cache.cross
            crossed = made
        for block, crossing in zip(self.blocks, crossed, strict=True):
            x = block(x, reading, across, crossing)
        if cache is not None:
            cache.length += x.shape[1]
        return self.norm(x)

    def reading(self, fields: Batch, cache: Cache | None) -> Reading:
        """What the blocks share: who sees whom among these tokens and the cached ones, and where each stands."""
        positions = fields["positions"]
        angles = turns(positions, self.shape) if self.shape.position == "rotary" else None
        if cache is not None and cache.shown is not None:
            bias = None if self.relative is None else self.relative(positions, cache.note("positions", positions))
            return Reading(cache.latest(), None, None if angles is None else rotation(*angles), bias, cache)
        zeros = torch.zeros_like(fields["tokens"], dtype=torch.int32)
        looks, appears = fields.get("looks", zeros), fields.get("appears", zeros)
        document = fields.get("document")
        keys = {"appears": appears, "positions": positions} | ({} if document is None else {"document": document})
        if cache is not None:
            keys = {name: cache.note(name, value) for name, value in keys.items()}
        sees = Visibility.lower(looks, keys["appears"], document, keys.get("document"), self.flex)
        if self.linformer is not None:
            slots = self.linformer.at(positions.shape[-1], sees)
            return Reading(slots.sees, angles, slots=slots)
        bias = None if self.relative is None else self.relative(positions, keys["positions"])
        return Reading(sees, angles, None, bias, cache)

    def crossing(self, fields: Batch, source: Batch, cache: Cache | None) -> Visibility:
        """Which tokens of the source these tokens see: all of their document's. Lowered once where a row is written."""
        writing = cache is not None and cache.shown is not None
        if cache is not None and writing and cache.across is not None:
            return cache.across
        whenever = torch.full_like(fields["tokens"], NEVER - 1, dtype=torch.int32)
        sees = Visibility.lower(whenever, source["appears"], fields.get("document"), source.get("document"), self.flex)
        if cache is not None and writing:
            cache.across = sees
        return sees

    @property
    def flex(self) -> bool | None:
        """Whether to make block masks, which can carry neither T5's bias nor dropout. None: where they pay."""
        return False if self.relative is not None or (self.training and self.shape.dropout) else None


class LM(nn.Module):
    """A language model without its head. parts: name -> module; parts["lm"] is tied to the embedding if the shape says so."""

    def __init__(self, shape: Shape, parts: Mapping[str, nn.Module]):
        super().__init__()
        self.shape = shape
        self.tokens = nn.Embedding(shape.vocab, shape.width)
        self.places = nn.Embedding(shape.context, shape.width) if shape.position == "learned" else None
        self.segments = nn.Embedding(shape.segments, shape.width) if shape.segments else None
        self.encoder = Trunk(shape, shape.encoder, cross=False, both_ways=True) if shape.encoder else None
        self.trunk = Trunk(shape, shape.depth, cross=shape.encoder > 0, both_ways=not shape.causal)
        self.latent = Latent(shape) if shape.latent else None
        for child in self.children():
            initialise(child, shape)
        for table in (self.tokens, self.places, self.segments):
            if table is not None:
                nn.init.normal_(table.weight, std=shape.init or (0.02 if shape.tied else 1.0))
        self.parts = nn.ModuleDict(dict(parts))
        self.tie()

    def tie(self) -> None:
        """Make the head's matrix the embedding's, if the shape says so: one Parameter, one gradient."""
        if self.shape.tied and "lm" in self.parts:
            self.parts["lm"].weight = self.tokens.weight

    def embed(self, fields: Batch) -> Tensor:
        """Token, position and segment vectors added up: fields (B, T) -> (B, T, width)."""
        x: Tensor = self.tokens(fields["tokens"])
        positions = fields["positions"]
        if self.places is not None:
            if positions.shape[-1] > self.shape.context:
                raise UserError(
                    f"a row of {positions.shape[-1]} tokens is longer than shape.context={self.shape.context}, "
                    "the number of positions this model has learned: cut the rows or train with a longer context"
                )
            x = x + self.places(positions)
        if self.shape.position == "sinusoidal":
            x = x + sinusoidal(positions, self.shape.width).to(x.dtype)
        if self.segments is not None:
            given = fields.get("segments")
            x = x + (self.segments.weight[0] if given is None else self.segments(given))
        return x

    def encode(self, batch: Batch) -> Tensor:
        """The encoder's memory of the source: (..., S, width)."""
        if self.encoder is None:
            raise UserError("this model has no encoder: shape.encoder is 0")
        fields = rows(batch, "source_")
        return self.encoder(self.embed(fields), fields).unflatten(0, batch["source_tokens"].shape[:-1])

    def posterior(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latent of each source: two of (..., latent)."""
        if self.latent is None:
            raise UserError("this model has no latent: shape.latent is 0")
        fields = rows(batch, "source_")
        mean, log_variance = self.latent.read(self.encode(batch).flatten(0, -3), fields.get("appears"))
        lead = batch["source_tokens"].shape[:-1]
        return mean.unflatten(0, lead), log_variance.unflatten(0, lead)

    def forward(self, batch: Batch, cache: Cache | None = None, latent: Tensor | None = None) -> Tensor:
        """Hidden states of `tokens`: (..., T, width). With a cache, `tokens` are the new ones only.

        latent (..., units): what the decoder is told in place of the source; the posterior's mean where it is not given.
        """
        fields = rows(batch, "", 0 if cache is None else cache.length)
        memory, source = None, None
        if self.encoder is not None and cache is not None and cache.source:
            source = cache.source
        elif self.latent is not None:
            memory = self.latent.write((self.posterior(batch)[0] if latent is None else latent).flatten(0, -2))
            source = {"appears": memory.new_zeros(memory.shape[:2], dtype=torch.int32)}
        elif self.encoder is not None:
            whole = rows(batch, "source_")
            memory = self.encoder(self.embed(whole), whole)
            nothing = torch.zeros_like(whole["tokens"], dtype=torch.int32)
            source = {"appears": nothing} | {n: whole[n] for n in ("appears", "document") if n in whole}
        hidden = self.trunk(self.embed(fields), fields, cache, memory, source)
        return hidden.unflatten(0, batch["tokens"].shape[:-1])

    def cache(self, rows: int, capacity: int) -> Cache:
        """Room for `capacity` tokens of each of `rows` rows. UserError for a model that cannot write token by token."""
        if self.shape.linformer:
            raise UserError("a Linformer reads whole rows, and cannot write token by token: take a decoder for that")
        return Cache(rows, capacity)


def rows(batch: Batch, prefix: str, start: int = 0) -> Batch:
    """The model's own fields, their free axes flattened to rows: (..., T) -> (B, T); positions filled in."""
    tokens = batch[prefix + "tokens"]
    fields = {name: batch[prefix + name].flatten(0, -2) if tokens.dim() > 2 else batch[prefix + name]
              for name in FIELDS if prefix + name in batch}  # fmt: skip
    if "positions" not in fields:
        reach = torch.arange(start, start + tokens.shape[-1], device=tokens.device)
        fields["positions"] = reach[None]  # (1, T): the same for all rows, so angles and biases are computed once
    return fields
