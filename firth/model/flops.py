"""What a batch costs to train on: the multiplications and additions of its matrix products, counted and not estimated.

Forward, a linear map of m to n numbers costs 2 m n per position; scores and weighted values cost 4 * head_width * heads
per pair of positions of which one sees the other (a dense kernel computes masked pairs too; they are not counted); the
vocabulary head costs 2 width vocab at the positions where something is asked. Backward costs twice the forward. Norms,
activations and softmax are not matrix products and are left out; so is XLNet's map of the distances, made once a batch
and block. 6 N D (Kaplan et al. 2020) is this without attention.

What a batch costs is asked of the objective (`Objective.run_flops`, `loss_flops`), which knows how often it runs the model
and on what; it adds up what stands here: `trunk` for a forward and backward pass of a model of a shape, `head` for its
vocabulary head, `linear` for a map of its own.

>>> from firth.model.config import decoder_config
>>> shape = decoder_config(vocab_size=8192, hidden_size=384, num_layers=6)
>>> f"{stack_flops(shape, Work(positions=4096, pairs=4096 * 128)) + head_flops(shape, 4096):.3g}"
'3.53e+11'
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from firth.model.config import ModelConfig
from firth.model.parameter_count import VECTORS, recurrent_products
from firth.types import IGNORE, NEVER, Batch


@dataclass(frozen=True)
class MemoryWork:
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
    """What there is to read in a batch: positions and visible pairs; an encoder-decoder's source, in so many rows; what
    stands before rows. spared, spared_pairs: positions whose last state no one wants, and pairs in which they are who looks."""

    positions: int
    pairs: int
    source_positions: int = 0
    source_pairs: int = 0
    crossing_pairs: int = 0
    rows: int = 0
    spared: int = 0
    spared_pairs: int = 0
    memory: MemoryWork = dataclasses.field(default_factory=lambda: MemoryWork())


BOTH = 3.0 * 2.0
"""A multiplication is added up: 2; the backward pass computes two products for each of the forward one: 3 in all."""


def linear(rows: int, inputs: int, outputs: int) -> float:
    """A linear map of so many rows, forward and backward."""
    return BOTH * rows * inputs * outputs


def stack_flops(config: ModelConfig, work: Work) -> float:
    """FLOPs of the model without its head, forward and backward: the one place that knows what an architecture costs."""
    if config.rnn_type:
        return BOTH * work.positions * recurrent_products(config)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ends, both = 2 * config.hidden_size * queries, 2 * config.hidden_size * keys  # q and o; k and v
    mlp = config.hidden_size * config.intermediate_size * (3 if config.gated else 2)
    # Scores, and the values weighed by them; XLNet scores the distance too.
    seen = (3 if config.position == "xlnet" else 2) * queries
    mixed = work.positions * config.linformer_k * (seen + 2 * keys)
    total: float = config.num_layers * (work.positions * (ends + both + mlp) + (mixed or work.pairs * seen))
    total -= work.spared * (ends + mlp) + work.spared_pairs * seen  # in the last block
    total += (work.positions + work.source_positions) * config.embedding_size * config.hidden_size
    if config.num_encoder_layers:
        total += config.num_encoder_layers * (work.source_positions * (ends + both + mlp) + work.source_pairs * seen)
        told, seeing = work.source_positions, work.crossing_pairs
        if config.latent_size:
            told, seeing = work.rows * VECTORS, work.positions * VECTORS
            total += work.rows * config.latent_size * config.hidden_size * (2 + VECTORS)
        total += config.num_layers * (work.positions * ends + told * both + seeing * seen)
    total += work.memory.cost(config.num_layers, ends + both + mlp, both, seen)
    return BOTH * total


def with_prefix(work: Work, batch: Batch, config: ModelConfig, prefix: int, prompt: int) -> Work:
    """The work with trained positions before every text (`firth.model.prefix`): so many keys that every token sees, and so
    many tokens more, which see one another and, in an encoder, their text."""
    side = "source_" if config.num_encoder_layers else ""
    _, _, document = _rows(batch, side)
    texts = int((document.amax(-1).clamp(min=1) if f"{side}document_ids" in batch else torch.ones(len(document))).sum())
    read = work.source_positions if config.num_encoder_layers else work.positions
    causal = config.causal and not config.num_encoder_layers
    more = prompt * read + texts * prompt * (prompt + 1) // 2 if causal else 2 * prompt * read + texts * prompt**2
    seen = work.pairs + prefix * work.positions
    if config.num_encoder_layers:
        return dataclasses.replace(
            work, pairs=seen, source_positions=read + texts * prompt, source_pairs=work.source_pairs + more,
            crossing_pairs=work.crossing_pairs + prompt * work.positions,
        )  # fmt: skip
    return dataclasses.replace(work, pairs=seen + more, positions=read + texts * prompt)


def trained_share(model: nn.Module) -> float:
    """What of `trunk`'s work is done where weights are frozen: 1 where all are trained.

    A matrix costs a product forward, one back to what came before it, and one for its own gradient, which a frozen one is
    spared: 4 N D and not 6. Where nothing that is trained lies in the trunk or before it, nothing goes back: 2 N D.
    Adapters (`firth.peft.lora`) come on top with all three. The scores of attention go by the same share.
    """
    own = frozen = low = 0
    back = False
    for name, p in model.named_parameters():
        room, _, rest = name.partition(".")
        back |= p.requires_grad and (room != "heads" or rest.startswith(("prefix.", "prompt.")))
        if p.ndim < 2 or room not in ("stack", "encoder", "latent"):
            continue
        if ".low." in rest:
            low += p.numel()
        elif p.requires_grad:
            own += p.numel()
        else:
            frozen += p.numel()
    whole = own + frozen
    return (3 * (own + low) + (1 + back) * frozen) / (3 * whole) if whole else 1.0


def head_flops(config: ModelConfig, asked: int) -> float:
    """FLOPs of the vocabulary head, forward and backward, where it runs at so many positions."""
    if config.lm_head == "transform":
        return linear(asked, config.embedding_dim, config.vocab_size + config.hidden_size)
    return linear(asked, config.hidden_size, config.vocab_size)


def work(batch: Batch, wanted: Tensor | None = None) -> Work:
    """Count a batch. Padding (`key_time` NEVER) counts as nothing. wanted (..., T) bool: where the last states are read."""
    looks, appears, document = _rows(batch, "")
    real = appears != NEVER
    if "query_time" in batch:  # a query is seen by nobody, but it looks
        real |= looks > -NEVER
    own, idle = int(real.sum()), torch.zeros_like(real) if wanted is None else real & ~wanted.flatten(0, -2)
    pairs, spared = (_pairs(looks, appears, document, some, document) for some in (real, idle))
    if "key_expiry" in batch:  # what has left has appeared
        leaves = batch["key_expiry"].flatten(0, -2).long()
        pairs, spared = (
            n - _pairs(looks, leaves, document, some, document) for n, some in ((pairs, real), (spared, idle))
        )
    if "memory_tokens" in batch:
        memory = _memory(batch, looks, document, real)
        spared += _memory(batch, looks, document, idle).crossing_pairs
        return Work(own, pairs, spared=int(idle.sum()), spared_pairs=spared, memory=memory)
    if "source_tokens" not in batch:
        return Work(own, pairs, spared=int(idle.sum()), spared_pairs=spared)
    source_looks, source_appears, source_document = _rows(batch, "source_")
    there = source_appears != NEVER
    within = _pairs(source_looks, source_appears, source_document, there, source_document)
    across = _pairs(torch.full_like(looks, NEVER - 1), source_appears, source_document, appears != NEVER, document)
    return Work(own, pairs, int(there.sum()), within, across, len(looks))


def _memory(batch: Batch, looks: Tensor, document: Tensor, real: Tensor) -> MemoryWork:
    """What stands before the rows, which all of its own document see."""
    _, appears, key_document = _rows(batch, "memory_")
    there = appears != NEVER
    within = _pairs(torch.zeros_like(appears), appears, key_document, there, key_document)
    return MemoryWork(int(there.sum()), within, _pairs(torch.zeros_like(looks), appears, key_document, real, document))


def real_tokens(batch: Batch) -> int:
    """How many tokens the batch holds, its source's with them; without padding, queries and what only stands in for a token."""
    own = _rows(batch, "")[1] != NEVER
    if "key_expiry" in batch:
        own &= batch["key_expiry"].flatten(0, -2) == NEVER
    source = int((_rows(batch, "source_")[1] != NEVER).sum()) if "source_tokens" in batch else 0
    return int(own.sum()) + source


def supervised_positions(labels: Tensor) -> int:
    """How many positions hold a label."""
    return int((labels != IGNORE).sum())


def _rows(batch: Batch, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
    """looks, appears and document as (B, T) int64, zeros where the batch has none."""
    tokens = batch[prefix + "tokens"]
    zeros = torch.zeros_like(tokens)
    fields = [
        batch.get(prefix + name, zeros).flatten(0, -2).long() for name in ("query_time", "key_time", "document_ids")
    ]
    return fields[0], fields[1], fields[2]


def _pairs(looks: Tensor, appears: Tensor, key_document: Tensor, real: Tensor, document: Tensor) -> int:
    """How many (i, j) share a document with appears[j] <= looks[i], i real: by sorting, without a mask."""
    keys = (key_document * (NEVER + 1) + appears).sort(-1).values
    start = document * (NEVER + 1)
    seen = torch.searchsorted(keys, start + looks, right=True) - torch.searchsorted(keys, start)
    return int((seen * real).sum())
