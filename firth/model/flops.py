"""Exact FLOPs of a training step, the multiplications and additions of its matrix products; and the exact parameter count of a config.

Forward, a linear map of m to n numbers costs 2 m n per position; scores and weighted values cost 4 * head_dim * num_heads
per visible (query, key) pair (a dense kernel computes masked pairs too; they are not counted); the LM head costs
2 * hidden_size * vocab_size per supervised position. Backward costs twice the forward. Norms, activations and softmax are
not matrix products and are left out; so is XLNet's projection of the distances, once a batch and block. 6 N D (Kaplan et
al. 2020) is this without attention.

The cost of a batch comes from the objective (`Objective.flops`), which knows how often it runs the model and on what. It
adds up the functions here: `stack_flops` for a forward and backward pass of a model, `head_flops` for its LM head, `linear`
for other maps.

>>> from firth.model.config import decoder_config
>>> config = decoder_config(vocab_size=8192, hidden_size=384, num_layers=6)
>>> f"{stack_flops(config, Work(positions=4096, pairs=4096 * 128)) + head_flops(config, 4096):.3g}"
'3.53e+11'
>>> num_parameters(config)
16908288
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from firth.model.config import ModelConfig
from firth.model.config_groups import (
    BIAS_POSITIONS,
    CHARACTER_DIM,
    FILTER_SHARES,
    LATENT_VECTORS,
    LEARNED_POSITIONS,
    NUM_CHARACTERS,
    NUM_GATES,
)
from firth.types import IGNORE, NEVER, Batch


@dataclass(frozen=True)
class MemoryWork:
    """Counts of a memory before rows.

    Args:
        positions: Tokens of the memory.
        pairs: Visible (query, key) pairs within it.
        crossing_pairs: Visible pairs of a query in a row and a key in the memory.
    """

    positions: int = 0
    pairs: int = 0
    crossing_pairs: int = 0

    def cost(self, depth: int, position: int, keys: int, pair: int) -> float:
        """Return the cost of the memory in forward multiplications, with a backward pass of twice as many.

        All blocks but the last run on the memory without gradient; every block computes its keys and values with one.

        Args:
            depth: Number of blocks.
            position: Cost of a block per position.
            keys: Cost of the keys and values of a position.
            pair: Cost of a visible pair.
        """
        forward_only = (depth - 1) * (self.positions * position + self.pairs * pair) / 3
        return forward_only + depth * (self.positions * keys + self.crossing_pairs * pair)


@dataclass(frozen=True)
class Work:
    """Counts of a batch, without padding.

    Args:
        positions: Tokens, and queries without a key.
        pairs: Visible (query, key) pairs.
        source_positions: Tokens of an encoder-decoder's source.
        source_pairs: Visible pairs within the source.
        crossing_pairs: Visible pairs of a query in the target and a key in the source.
        rows: Rows of an encoder-decoder's batch.
        skipped_positions: Positions whose last state is not needed.
        skipped_pairs: Visible pairs whose query is such a position.
        memory: Of the tokens before rows.
    """

    positions: int
    pairs: int
    source_positions: int = 0
    source_pairs: int = 0
    crossing_pairs: int = 0
    rows: int = 0
    skipped_positions: int = 0
    skipped_pairs: int = 0
    memory: MemoryWork = dataclasses.field(default_factory=lambda: MemoryWork())


FLOPS_PER_PRODUCT = 3.0 * 2.0
"""2 for a multiplication and an addition, times 3 for the forward product and the two of the backward pass."""


def linear(rows: int, inputs: int, outputs: int) -> float:
    """Return the FLOPs of a linear map of `rows` rows, forward and backward."""
    return FLOPS_PER_PRODUCT * rows * inputs * outputs


def stack_flops(config: ModelConfig, work: Work) -> float:
    """Return the FLOPs of the model without its head, forward and backward."""
    if config.rnn.type:
        return FLOPS_PER_PRODUCT * work.positions * recurrent_products(config)
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    ends, both = 2 * config.hidden_size * queries, 2 * config.hidden_size * keys  # q and o; k and v
    mlp = config.hidden_size * config.intermediate_size * (3 if config.gated else 2)
    # Scores and weighted values; XLNet scores the distance too.
    pair = (3 if config.position.type == "xlnet" else 2) * queries
    slots = work.positions * config.attention.linformer.k * (pair + 2 * keys)
    total: float = config.num_layers * (work.positions * (ends + both + mlp) + (slots or work.pairs * pair))
    total -= work.skipped_positions * (ends + mlp) + work.skipped_pairs * pair  # in the last block
    total += (work.positions + work.source_positions) * config.embedding.size * config.hidden_size
    if config.encoder.num_layers:
        total += config.encoder.num_layers * (work.source_positions * (ends + both + mlp) + work.source_pairs * pair)
        sources, cross_pairs = work.source_positions, work.crossing_pairs
        if config.encoder.latent_size:
            sources, cross_pairs = work.rows * LATENT_VECTORS, work.positions * LATENT_VECTORS
            total += work.rows * config.encoder.latent_size * config.hidden_size * (2 + LATENT_VECTORS)
        total += config.num_layers * (work.positions * ends + sources * both + cross_pairs * pair)
    total += work.memory.cost(config.num_layers, ends + both + mlp, both, pair)
    return FLOPS_PER_PRODUCT * total


def with_prefix(work: Work, batch: Batch, config: ModelConfig, prefix: int, prompt: int) -> Work:
    """Return the work with trained positions before every text (`firth.model.prefix`).

    Args:
        work: Without them.
        batch: What `work` was counted on.
        config: The architecture.
        prefix: Keys that every token attends to.
        prompt: Tokens before each text, which attend to each other and, in an encoder, to their text.
    """
    side = "source_" if config.encoder.num_layers else ""
    _, _, document = _rows(batch, side)
    texts = int((document.amax(-1).clamp(min=1) if f"{side}document_ids" in batch else torch.ones(len(document))).sum())
    tokens = work.source_positions if config.encoder.num_layers else work.positions
    causal = config.causal and not config.encoder.num_layers
    more = prompt * tokens + texts * prompt * (prompt + 1) // 2 if causal else 2 * prompt * tokens + texts * prompt**2
    pairs = work.pairs + prefix * work.positions
    if config.encoder.num_layers:
        return dataclasses.replace(
            work, pairs=pairs, source_positions=tokens + texts * prompt, source_pairs=work.source_pairs + more,
            crossing_pairs=work.crossing_pairs + prompt * work.positions,
        )  # fmt: skip
    return dataclasses.replace(work, pairs=pairs + more, positions=tokens + texts * prompt)


def trained_share(model: nn.Module) -> float:
    """Return the FLOPs of a step as a share of `stack_flops`, which assumes that all weights are trained.

    A matrix costs a forward product, one for the gradient of its input, and one for its own gradient, which a frozen matrix
    does not need: 4 N D and not 6. If nothing in or before the stack is trained, there is no backward pass: 2 N D. LoRA
    adapters (`firth.peft.lora`) add all three. The scores of attention are counted with the same share.
    """
    trained = frozen = lora = 0
    backward = False
    for name, p in model.named_parameters():
        module, _, rest = name.partition(".")
        backward |= p.requires_grad and (module != "heads" or rest.startswith(("prefix.", "prompt.")))
        if p.ndim < 2 or module not in ("stack", "encoder", "latent"):
            continue
        if ".low." in rest:
            lora += p.numel()
        elif p.requires_grad:
            trained += p.numel()
        else:
            frozen += p.numel()
    total = trained + frozen
    return (3 * (trained + lora) + (1 + backward) * frozen) / (3 * total) if total else 1.0


def head_flops(config: ModelConfig, positions: int) -> float:
    """Return the FLOPs of the LM head at `positions` positions, forward and backward."""
    if config.lm_head.type == "transform":
        return linear(positions, config.embedding_dim, config.vocab_size + config.hidden_size)
    return linear(positions, config.hidden_size, config.vocab_size)


def work(batch: Batch, needed: Tensor | None = None) -> Work:
    """Count a batch.

    Args:
        batch: Fields (..., T); padding (`key_time` NEVER) is not counted.
        needed: (..., T) bool, where the last states are read; None: everywhere.
    """
    query_time, key_time, document = _rows(batch, "")
    real = key_time != NEVER
    if "query_time" in batch:  # a query without a key is computed too
        real |= query_time > -NEVER
    positions, unneeded = int(real.sum()), torch.zeros_like(real) if needed is None else real & ~needed.flatten(0, -2)
    pairs, skipped = (_pairs(query_time, key_time, document, some, document) for some in (real, unneeded))
    if "key_expiry" in batch:  # an expired key was visible from its key_time on: subtract its pairs
        key_expiry = batch["key_expiry"].flatten(0, -2).long()
        pairs, skipped = (
            n - _pairs(query_time, key_expiry, document, some, document)
            for n, some in ((pairs, real), (skipped, unneeded))
        )
    if "memory_tokens" in batch:
        memory = _memory(batch, query_time, document, real)
        skipped += _memory(batch, query_time, document, unneeded).crossing_pairs
        return Work(positions, pairs, skipped_positions=int(unneeded.sum()), skipped_pairs=skipped, memory=memory)
    if "source_tokens" not in batch:
        return Work(positions, pairs, skipped_positions=int(unneeded.sum()), skipped_pairs=skipped)
    source_query_time, source_key_time, source_document = _rows(batch, "source_")
    source_real = source_key_time != NEVER
    within = _pairs(source_query_time, source_key_time, source_document, source_real, source_document)
    across = _pairs(
        torch.full_like(query_time, NEVER - 1), source_key_time, source_document, key_time != NEVER, document
    )
    return Work(positions, pairs, int(source_real.sum()), within, across, len(query_time))


def _memory(batch: Batch, query_time: Tensor, document: Tensor, real: Tensor) -> MemoryWork:
    """Count the memory before the rows, which all queries of its document attend to."""
    _, key_time, key_document = _rows(batch, "memory_")
    memory_real = key_time != NEVER
    within = _pairs(torch.zeros_like(key_time), key_time, key_document, memory_real, key_document)
    return MemoryWork(
        int(memory_real.sum()), within, _pairs(torch.zeros_like(query_time), key_time, key_document, real, document)
    )


def real_tokens(batch: Batch) -> int:
    """Return the number of tokens of a batch and its source, without padding, query slots and placeholders."""
    own = _rows(batch, "")[1] != NEVER
    if "key_expiry" in batch:
        own &= batch["key_expiry"].flatten(0, -2) == NEVER
    source = int((_rows(batch, "source_")[1] != NEVER).sum()) if "source_tokens" in batch else 0
    return int(own.sum()) + source


def supervised_positions(labels: Tensor) -> int:
    """Return the number of positions with a label."""
    return int((labels != IGNORE).sum())


def _rows(batch: Batch, prefix: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return query_time, key_time and document_ids as (B, T) int64, zeros where the batch has none."""
    tokens = batch[prefix + "tokens"]
    zeros = torch.zeros_like(tokens)
    fields = [
        batch.get(prefix + name, zeros).flatten(0, -2).long() for name in ("query_time", "key_time", "document_ids")
    ]
    return fields[0], fields[1], fields[2]


def _pairs(query_time: Tensor, key_time: Tensor, key_document: Tensor, real: Tensor, document: Tensor) -> int:
    """Count (i, j) of one document with key_time[j] <= query_time[i] and real[i]: by sorting, without a mask."""
    keys = (key_document * (NEVER + 1) + key_time).sort(-1).values
    start = document * (NEVER + 1)
    seen = torch.searchsorted(keys, start + query_time, right=True) - torch.searchsorted(keys, start)
    return int((seen * real).sum())


def num_parameters(config: ModelConfig) -> int:
    """Return the exact number of parameters with the LM head; a tied head counts once."""
    table, norm_vectors = config.embedding_dim, config.norm.weight + (config.norm.bias and config.norm.type == "layer")
    norm = norm_vectors * config.hidden_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    offsets = (queries + 2 * keys + config.hidden_size * (config.bias_location != "qkv")) * config.bias
    attention = (
        config.hidden_size * (2 * queries + 2 * keys) + offsets + 2 * config.head_dim * config.attention.qk_norm_weight
    )
    if config.position.type == "xlnet":
        attention += config.hidden_size * queries + 2 * queries + 3 * queries * (config.embedding.type_vocab_size > 0)
        attention -= offsets
    inner = config.intermediate_size * (2 if config.gated else 1)
    mlp = config.hidden_size * (inner + config.intermediate_size) + (inner + config.hidden_size) * (
        config.bias and config.bias_location == "all"
    )
    block = attention + mlp + 2 * norm
    depths = [config.num_layers] + ([config.encoder.num_layers] if config.encoder.num_layers else [])
    total = character_cnn_parameters(config) if config.embedding.characters.max_length else config.vocab_size * table
    if config.rnn.type:
        total += recurrent_products(config) + 2 * config.num_layers * (2 - config.causal) * gate_rows(config)
    for depth in () if config.rnn.type else depths:
        total += (config.num_layer_groups or depth) * block
        total += (
            norm * ((config.norm.placement == "pre") - (not config.norm.first_attention))
            + norm_vectors * table * config.norm.embedding
        )
        total += config.hidden_size * (table + config.bias) * (config.embedding.size > 0)
        total += config.num_heads * config.position.relative_buckets * (config.position.type in BIAS_POSITIONS)
    total += (config.num_layer_groups or config.num_layers) * (attention + norm) * (config.encoder.num_layers > 0)
    total += table * (
        config.max_positions * (config.position.type in LEARNED_POSITIONS) * len(depths) + config.embedding.mask
    )
    total += table * config.embedding.type_vocab_size * (config.position.type != "xlnet")
    total += math.prod(config.linformer_projections) * config.max_positions * config.attention.linformer.k
    if config.encoder.latent_size:
        latent = config.encoder.latent_size
        total += 2 * latent * (config.hidden_size + 1) + LATENT_VECTORS * config.hidden_size * (latent + 1)
    transform = config.lm_head.type == "transform"
    width = table if config.rnn.separate_directions else config.hidden_size
    total += config.vocab_size * (config.lm_head.bias + (table if transform else width) * (not config.tie_embeddings))
    return total + (width + config.bias + norm_vectors) * table * transform


def gate_rows(config: ModelConfig) -> int:
    """Return the rows of a recurrent layer's matrices: its cells times the linear maps in each."""
    return NUM_GATES[config.rnn.type] * config.intermediate_size


def recurrent_products(config: ModelConfig) -> int:
    """Return the matrix weights of all recurrent layers, which is also their multiplications per token."""
    layer = gate_rows(config) * (
        config.embedding_dim + config.direction_size
    ) + config.direction_size * config.intermediate_size * (config.intermediate_size > config.direction_size)
    return config.num_layers * (2 - config.causal) * layer


def character_cnn_parameters(config: ModelConfig) -> int:
    """Return the number of parameters of the character CNN (`firth.model.variants`)."""
    filters = config.embedding.characters.num_filters
    convolved = sum((size * CHARACTER_DIM + 1) * filters * share // 64 for size, share in FILTER_SHARES)
    highways = 2 * 2 * (filters + 1) * filters
    return NUM_CHARACTERS * CHARACTER_DIM + convolved + highways + (filters + 1) * config.embedding_dim
