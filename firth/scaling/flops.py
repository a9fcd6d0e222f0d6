"""What a batch costs to train on: the multiplications and additions of its matrix products, counted and not estimated.

Forward, a linear map of m to n numbers costs 2 m n per position; scores and weighted values cost 4 * head_width * heads
per pair of positions of which one sees the other (a dense kernel computes masked pairs too; they are not counted); the
vocabulary head costs 2 width vocab at the positions where something is asked. Backward costs twice the forward. Norms,
activations and softmax are not matrix products and are left out; so is XLNet's map of the distances, made once a batch
and block. 6 N D (Kaplan et al. 2020) is this without attention.

>>> from firth.model.shape import decoder
>>> shape = decoder(vocab=8192, width=384, depth=6)
>>> f"{Work(positions=4096, pairs=4096 * 128, asked=4096).flops(shape):.3g}"
'3.53e+11'
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from firth.model.shape import Shape
from firth.types import IGNORE, NEVER, Batch


@dataclass(frozen=True)
class Memory:
    """What there is to read before the rows: tokens, pairs of them, and how often a token of a row sees one."""

    positions: int = 0
    pairs: int = 0
    crossing_pairs: int = 0

    def cost(self, depth: int, position: int, keys: int, pair: int) -> float:
        """In multiplications of a pass forward of which the backward one is twice: position, keys (a position's keys and
        values) and pair are such costs. All blocks but the last read the memory, without gradient; every block makes keys and
        values of it, with one."""
        read = (depth - 1) * (self.positions * position + self.pairs * pair) / 3
        return read + depth * (self.positions * keys + self.crossing_pairs * pair)


@dataclass(frozen=True)
class Work:
    """What there is to do in a batch: positions, visible pairs, asked positions; an encoder-decoder's source; a memory."""

    positions: int
    pairs: int
    asked: int
    source_positions: int = 0
    source_pairs: int = 0
    crossing_pairs: int = 0
    memory: Memory = dataclasses.field(default_factory=lambda: Memory())

    def flops(self, shape: Shape) -> float:
        """FLOPs of the forward and the backward pass."""
        queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
        ends, both = 2 * shape.width * queries, 2 * shape.width * keys  # q and o; k and v
        mlp = shape.width * shape.hidden * (3 if shape.gated else 2)
        # Scores, and the values weighed by them; in XLNet the scores of the distance too.
        seen = (3 if shape.position == "xlnet" else 2) * queries
        trunk: float = shape.depth * (self.positions * (ends + both + mlp) + self.pairs * seen)
        if shape.encoder:
            trunk += shape.encoder * (self.source_positions * (ends + both + mlp) + self.source_pairs * seen)
            trunk += shape.depth * (self.positions * ends + self.source_positions * both + self.crossing_pairs * seen)
        trunk += self.memory.cost(shape.depth, ends + both + mlp, both, seen)
        head = self.asked * shape.width * (shape.vocab + shape.width * (shape.head == "transform"))
        return 3.0 * 2.0 * (trunk + head)


def work(batch: Batch, asked: int) -> Work:
    """Count a batch. asked: positions where the vocabulary head runs. Padding (`appears` NEVER) counts as nothing."""
    looks, appears, document = _rows(batch, "")
    real = appears != NEVER
    if "looks" in batch:  # a query is seen by nobody, but it looks
        real |= looks > -NEVER
    own = int(real.sum())
    pairs = _pairs(looks, appears, document, real, document)
    if "leaves" in batch:  # what has left has appeared
        pairs -= _pairs(looks, batch["leaves"].flatten(0, -2).long(), document, real, document)
    if "memory_tokens" in batch:
        return Work(own, pairs, asked, memory=_memory(batch, looks, document, real))
    if "source_tokens" not in batch:
        return Work(own, pairs, asked)
    source_looks, source_appears, source_document = _rows(batch, "source_")
    there = source_appears != NEVER
    within = _pairs(source_looks, source_appears, source_document, there, source_document)
    across = _pairs(torch.full_like(looks, NEVER - 1), source_appears, source_document, appears != NEVER, document)
    return Work(own, pairs, asked, int(there.sum()), within, across)


def _memory(batch: Batch, looks: Tensor, document: Tensor, real: Tensor) -> Memory:
    """What stands before the rows, which all of its own document see."""
    _, appears, key_document = _rows(batch, "memory_")
    there = appears != NEVER
    within = _pairs(torch.zeros_like(appears), appears, key_document, there, key_document)
    return Memory(int(there.sum()), within, _pairs(torch.zeros_like(looks), appears, key_document, real, document))


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
