"""How many parameters a shape has, exactly, and the numbers and names that this rests on.

>>> from firth.model.config import decoder_config
>>> num_parameters(decoder_config(vocab=8192, width=384, depth=6))
16908288
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from firth.model.config import ModelConfig

GATED = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_tanh"}
"""Activations with a gate -> the function applied to the gate (Shazeer 2020, arXiv:2002.05202)."""

VECTORS = 4
"""Vectors that a latent becomes, for a decoder to attend to."""

LEARNED, BIASED, SINUSOIDAL = ("learned", "mpnet"), ("t5", "mpnet"), ("sinusoidal", "marian")
"""Positions with a learned vector for each, those with a learned number for each bucket of distances, and those with a vector
that is computed."""
LETTERS, LETTER = 259, 16
"""What a token is spelled with (256 bytes, its beginning, its end, nothing), and the width of the vector of each."""
WINDOWS = ((1, 1), (2, 1), (3, 2), (4, 4), (5, 8), (6, 16), (7, 32))
"""Bytes that a filter sees -> 64ths of the filters that see so many, as in ELMo."""

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
"""Recurrent cells -> the linear maps in one."""


def num_parameters(shape: ModelConfig) -> int:
    """Number of parameters of the model with its vocabulary head, exactly; a tied head counts once."""
    table, each = shape.table_width, shape.norm_weight + (shape.norm_bias and shape.norm == "layer")
    norm = each * shape.width
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    offsets = (queries + 2 * keys + shape.width * (shape.bias_at != "qkv")) * shape.bias
    attention = shape.width * (2 * queries + 2 * keys) + offsets + 2 * shape.head_width * shape.qk_weight
    if shape.position == "xlnet":
        attention += shape.width * queries + 2 * queries + 3 * queries * (shape.segments > 0)
        attention -= offsets
    inner = shape.hidden * (2 if shape.gated else 1)
    mlp = shape.width * (inner + shape.hidden) + (inner + shape.width) * (shape.bias and shape.bias_at == "all")
    block = attention + mlp + 2 * norm
    trunks = [shape.depth] + ([shape.encoder] if shape.encoder else [])
    total = spelling_parameters(shape) if shape.characters else shape.vocab * table
    if shape.recurrent:
        total += recurrent_products(shape) + 2 * shape.depth * (2 - shape.causal) * cells(shape)
    for depth in () if shape.recurrent else trunks:
        total += (shape.groups or depth) * block
        total += norm * ((shape.norm_at == "pre") - (not shape.first_norm)) + each * table * shape.embed_norm
        total += shape.width * (table + shape.bias) * (shape.embed > 0)
        total += shape.heads * shape.buckets * (shape.position in BIASED)
    total += (shape.groups or shape.depth) * (attention + norm) * (shape.encoder > 0)
    total += table * (shape.context * (shape.position in LEARNED) * len(trunks) + shape.query)
    total += table * shape.segments * (shape.position != "xlnet")
    total += math.prod(shape.projections) * shape.context * shape.linformer
    if shape.latent:
        total += 2 * shape.latent * (shape.width + 1) + VECTORS * shape.width * (shape.latent + 1)
    transform = shape.head == "transform"
    read = table if shape.apart else shape.width
    total += shape.vocab * (shape.head_bias + (table if transform else read) * (not shape.tied))
    return total + (read + shape.bias + each) * table * transform


def cells(shape: ModelConfig) -> int:
    """Rows of a recurrent layer's matrices: its cells, times the linear maps in one."""
    return GATES[shape.recurrent] * shape.hidden


def recurrent_products(shape: ModelConfig) -> int:
    """Numbers in the matrices of all recurrent layers, which is also their multiplications per token."""
    one = cells(shape) * (shape.table_width + shape.stream) + shape.stream * shape.hidden * (
        shape.hidden > shape.stream
    )
    return shape.depth * (2 - shape.causal) * one


def spelling_parameters(shape: ModelConfig) -> int:
    """Parameters of the embedding that reads the bytes of a token (`firth.model.characters`)."""
    convolved = sum((size * LETTER + 1) * shape.filters * share // 64 for size, share in WINDOWS)
    highways = 2 * 2 * (shape.filters + 1) * shape.filters
    return LETTERS * LETTER + convolved + highways + (shape.filters + 1) * shape.table_width
