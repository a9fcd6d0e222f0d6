"""What a batch costs to train on: the multiplications and additions of its matrix products, counted and not estimated.

Forward, a linear map of m to n numbers costs 2 m n per position; scores and weighted values cost 4 * head_width * heads
per pair of positions of which one sees the other (a dense kernel computes masked pairs too; they are not counted); the
vocabulary head costs 2 width vocab at the positions where something is asked. Backward costs twice the forward. Norms,
activations and softmax are not matrix products and are left out. 6 N D (Kaplan et al. 2020) is this without attention.

What a batch costs is asked of the objective (`Objective.run_flops`, `loss_flops`), which knows how often it runs the model
and on what; it adds up what stands here: `trunk` for a forward and backward pass of a model of a shape, `head` for its
vocabulary head, `linear` for a map of its own.

>>> from firth.model.shape import decoder
>>> shape = decoder(vocab=8192, width=384, depth=6)
>>> f"{trunk(shape, Work(positions=4096, pairs=4096 * 128)) + head(shape, 4096):.3g}"
'3.53e+11'
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from firth.model.shape import VECTORS, Shape
from firth.types import IGNORE, NEVER, Batch


@dataclass(frozen=True)
class Work:
    """What there is to read in a batch: positions and visible pairs; and an encoder-decoder's source, in so many rows."""

    positions: int
    pairs: int
    source_positions: int = 0
    source_pairs: int = 0
    crossing_pairs: int = 0
    rows: int = 0


BOTH = 3.0 * 2.0
"""A multiplication is added up: 2; the backward pass computes two products for each of the forward one: 3 in all."""


def linear(rows: int, inputs: int, outputs: int) -> float:
    """A linear map of so many rows, forward and backward."""
    return BOTH * rows * inputs * outputs


def trunk(shape: Shape, work: Work) -> float:
    """FLOPs of the model without its head, forward and backward: the one place that knows what an architecture costs."""
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    ends, both = 2 * shape.width * queries, 2 * shape.width * keys  # q and o; k and v
    mlp = shape.width * shape.hidden * (3 if shape.gated else 2)
    seen = 2 * queries  # scores, and the values weighed by them
    pairs = work.positions * shape.linformer * seen + work.positions * shape.linformer * 2 * keys
    total = shape.depth * (work.positions * (ends + both + mlp) + (pairs if shape.linformer else work.pairs * seen))
    if shape.encoder:
        total += shape.encoder * (work.source_positions * (ends + both + mlp) + work.source_pairs * seen)
        told, seeing = work.source_positions, work.crossing_pairs
        if shape.latent:
            told, seeing = work.rows * VECTORS, work.positions * VECTORS
            total += work.rows * shape.latent * shape.width * (2 + VECTORS)
        total += shape.depth * (work.positions * ends + told * both + seeing * seen)
    return BOTH * total


def head(shape: Shape, asked: int) -> float:
    """FLOPs of the vocabulary head, forward and backward, where it runs at so many positions."""
    return linear(asked, shape.width, shape.vocab + shape.width * (shape.head == "transform"))


def work(batch: Batch) -> Work:
    """Count a batch. Padding (`appears` NEVER) counts as nothing."""
    looks, appears, document = _rows(batch, "")
    own = int((appears != NEVER).sum())
    pairs = _pairs(looks, appears, document, appears != NEVER, document)
    if "source_tokens" not in batch:
        return Work(own, pairs)
    source_looks, source_appears, source_document = _rows(batch, "source_")
    there = source_appears != NEVER
    within = _pairs(source_looks, source_appears, source_document, there, source_document)
    across = _pairs(torch.full_like(looks, NEVER - 1), source_appears, source_document, appears != NEVER, document)
    return Work(own, pairs, int(there.sum()), within, across, len(looks))


def real_tokens(batch: Batch) -> int:
    """How many tokens the batch holds, its source's with them and padding without."""
    return sum(int((_rows(batch, side)[1] != NEVER).sum()) for side in ("", "source_") if side + "tokens" in batch)


def asked_positions(labels: Tensor) -> int:
    """How many positions hold a label."""
    return int((labels != IGNORE).sum())


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
