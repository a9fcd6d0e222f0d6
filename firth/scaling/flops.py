"""What a batch costs to train on: the multiplications and additions of its matrix products, counted and not estimated.

Forward, a linear map of m to n numbers costs 2 m n per position; scores and weighted values cost 4 * head_width * heads
per pair of positions of which one sees the other (a dense kernel computes masked pairs too; they are not counted); the
vocabulary head costs 2 width vocab at the positions where something is asked. Backward costs twice the forward. Norms,
activations and softmax are not matrix products and are left out. 6 N D (Kaplan et al. 2020) is this without attention.

>>> from firth.model.shape import decoder
>>> shape = decoder(vocab=8192, width=384, depth=6)
>>> f"{Work(positions=4096, pairs=4096 * 128, asked=4096).flops(shape):.3g}"
'3.53e+11'
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from firth.model.shape import Shape
from firth.types import IGNORE, NEVER, Batch


@dataclass(frozen=True)
class Work:
    """What there is to do in a batch: positions, visible pairs, asked positions; and an encoder-decoder's source."""

    positions: int
    pairs: int
    asked: int
    source_positions: int = 0
    source_pairs: int = 0
    crossing_pairs: int = 0

    def flops(self, shape: Shape) -> float:
        """FLOPs of the forward and the backward pass."""
        queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        ends, both = 2 * shape.width * queries, 2 * shape.width * keys  # q and o; k and v
        mlp = shape.width * shape.hidden * (3 if shape.gated else 2)
        seen = 2 * queries  # scores, and the values weighed by them
        trunk = shape.depth * (self.positions * (ends + both + mlp) + self.pairs * seen)
        if shape.encoder:
            trunk += shape.encoder * (self.source_positions * (ends + both + mlp) + self.source_pairs * seen)
            trunk += shape.depth * (self.positions * ends + self.source_positions * both + self.crossing_pairs * seen)
        head = self.asked * shape.width * (shape.vocab + shape.width * (shape.head == "transform"))
        return 3.0 * 2.0 * (trunk + head)


def work(batch: Batch, asked: int) -> Work:
    """Count a batch. asked: positions where the vocabulary head runs. Padding (`appears` NEVER) counts as nothing."""
    looks, appears, document = _rows(batch, "")
    own = int((appears != NEVER).sum())
    pairs = _pairs(looks, appears, document, appears != NEVER, document)
    if "source_tokens" not in batch:
        return Work(own, pairs, asked)
    source_looks, source_appears, source_document = _rows(batch, "source_")
    there = source_appears != NEVER
    within = _pairs(source_looks, source_appears, source_document, there, source_document)
    across = _pairs(torch.full_like(looks, NEVER - 1), source_appears, source_document, appears != NEVER, document)
    return Work(own, pairs, asked, int(there.sum()), within, across)


def asked_positions(batch: Batch, fields: frozenset[str]) -> int:
    """How many positions of `tokens` hold a label in the fullest of the given fields."""
    like = [batch[f] for f in fields if batch[f].shape == batch["tokens"].shape]
    return max((int((labels != IGNORE).sum()) for labels in like), default=0)


def _rows(batch: Batch, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
    """looks, appears and document as (B, T) int64, zeros where the batch has none."""
    tokens = batch[prefix + "tokens"]
    zeros = torch.zeros_like(tokens)
    fields = [batch.get(prefix + name, zeros).flatten(0, -2).long() for name in ("looks", "appears", "document")]
    return fields[0], fields[1], fields[2]


def _pairs(looks: Tensor, appears: Tensor, key_document: Tensor, real: Tensor, document: Tensor) -> int:
    """How many (i, j) share a document with appears[j] <= looks[i], i real: by sorting, without a mask."""
    keys = (key_document * (NEVER + 1) + appears).sort(-1).values
    start = document * (NEVER + 1)
    seen = torch.searchsorted(keys, start + looks, right=True) - torch.searchsorted(keys, start)
    return int((seen * real).sum())
