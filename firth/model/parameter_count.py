"""Exact parameter count of a `ModelConfig`, and the constants that it depends on.

>>> from firth.model.config import decoder_config
>>> num_parameters(decoder_config(vocab_size=8192, hidden_size=384, num_layers=6))
16908288
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from firth.model.config import ModelConfig

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
"""Activations with a gate -> the function applied to the gate (Shazeer 2020, arXiv:2002.05202)."""

LATENT_VECTORS = 4
"""Vectors that a latent is projected to, which the decoder attends to."""

LEARNED_POSITIONS, BIAS_POSITIONS, SINUSOIDAL_POSITIONS = (
    ("learned", "mpnet"),
    ("t5", "mpnet"),
    ("sinusoidal", "marian"),
)
"""Position encodings with learned vectors, with a learned bias for each distance bucket, and with computed vectors."""
NUM_CHARACTERS, CHARACTER_DIM = 259, 16
"""Symbols of the character CNN (256 bytes, start, end and padding), and the width of their embedding."""
FILTER_SHARES = ((1, 1), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, 32))
"""Width in bytes of a filter, and 64ths of all filters that have this width, as in ELMo."""

NUM_GATES = {"rnn": 1, "gru": 3, "lstm": 4}
"""Recurrent layer type -> linear maps in a cell."""


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
