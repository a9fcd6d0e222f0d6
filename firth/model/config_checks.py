"""Validation of `ModelConfig`: one error message for each field or combination that makes no architecture.

>>> from firth.model.config import ModelConfig, PositionConfig, RopeConfig
>>> ModelConfig(vocab_size=100, hidden_size=32, num_layers=1, num_heads=4, position=PositionConfig(rope=RopeConfig(sign=0)))
Traceback (most recent call last):
    ...
firth.types.UserError: model.position.rope.sign=0 must be 1 or -1
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from firth.model.parameter_count import SINUSOIDAL_POSITIONS
from firth.types import UserError

if TYPE_CHECKING:
    from firth.model.config import ModelConfig


def check_head_dim(config: ModelConfig) -> None:
    """Raise UserError for a hidden size that the heads do not divide."""
    if not config.head_dim and config.hidden_size % config.num_heads:
        raise UserError(
            f"model.hidden_size={config.hidden_size} is not a multiple of model.num_heads={config.num_heads}: "
            "change one of them, or set model.head_dim"
        )


def check_combinations(config: ModelConfig) -> None:
    """Raise UserError for fields that do not fit each other."""
    if config.num_heads % config.num_kv_heads:
        raise UserError(
            f"model.num_heads={config.num_heads} is not a multiple of model.num_kv_heads={config.num_kv_heads}"
        )
    if config.position.type == "rotary" and config.head_dim % 2:
        raise UserError(
            f"model.position=rotary rotates pairs of numbers, and model.head_dim={config.head_dim} is odd: make it even"
        )
    if config.position.type in SINUSOIDAL_POSITIONS and config.embedding_dim % 2:
        raise UserError(
            f"model.position={config.position.type} makes pairs of numbers, and an embedding width of {config.embedding_dim} "
            "is odd: make it even"
        )
    if config.embedding.size and config.tie_embeddings and config.lm_head.type == "linear":
        raise UserError(
            f"a linear head of width {config.hidden_size} cannot be tied to tables of "
            f"model.embedding.size={config.embedding.size}: set model.lm_head=transform or model.tie_embeddings=false"
        )
    if config.num_layer_groups > min(config.num_layers, config.encoder.num_layers or config.num_layers):
        raise UserError(
            f"model.num_layer_groups={config.num_layer_groups} is more than the number of layers: "
            "make it at most model.num_layers"
        )
    if config.num_layer_groups and not config.norm.first_attention:
        raise UserError(
            "layers that share a block cannot differ in their first norm: "
            "set model.norm.first_attention=true or model.num_layer_groups=0"
        )
    if config.position.type == "xlnet" and (
        config.hidden_size % 2
        or config.encoder.num_layers
        or config.num_kv_heads != config.num_heads
        or config.attention.qk_norm
    ):
        raise UserError(
            f"model.position=xlnet needs an even model.hidden_size (it is {config.hidden_size}), "
            f"model.encoder.num_layers=0 ({config.encoder.num_layers}), model.num_kv_heads equal to model.num_heads "
            f"({config.num_kv_heads} of {config.num_heads}) and model.attention.qk_norm=false "
            f"({str(config.attention.qk_norm).lower()})"
        )
    if config.attention.memory_length and config.position.type != "xlnet":
        raise UserError(
            f"model.attention.memory_length={config.attention.memory_length} needs positions that extend before a row, "
            f"and model.position={config.position.type!r} does not: set model.position=xlnet, or "
            "model.attention.memory_length=0"
        )
    if config.attention.linformer.k and (
        config.rnn.type
        or config.causal
        or config.encoder.num_layers
        or config.position.type in ("t5", "mpnet", "xlnet")
        or config.attention.linformer.k > config.max_positions
    ):
        raise UserError(
            f"model.attention.linformer.k={config.attention.linformer.k} mixes a whole row into at most "
            f"model.max_positions={config.max_positions} slots: it needs model.causal=false, model.encoder.num_layers=0, "
            "and a model.position other than t5, mpnet and xlnet"
        )
    if config.attention.prefix_lm and (
        config.causal
        or config.encoder.num_layers
        or config.rnn.type
        or config.attention.linformer.k
        or not config.num_layers
    ):
        raise UserError(
            "model.attention.prefix_lm reads a prompt in both directions and continues it in the same row: "
            "set model.causal=false and leave out model.encoder.num_layers, model.rnn.type and model.attention.linformer.k"
        )
    if config.encoder.latent_size and not config.encoder.num_layers:
        raise UserError(
            f"model.encoder.latent_size={config.encoder.latent_size} needs an encoder and a decoder: "
            "set model.encoder.num_layers"
        )
    if config.attention.qk_norm_weight and not config.attention.qk_norm:
        raise UserError(
            "model.attention.qk_norm_weight is the gain of model.attention.qk_norm: set model.attention.qk_norm=true, "
            "or leave it out"
        )
    rope = config.position.rope
    if rope.high_freq_factor <= rope.low_freq_factor:
        raise UserError(
            f"model.position.rope.high_freq_factor={rope.high_freq_factor} must be above "
            f"model.position.rope.low_freq_factor={rope.low_freq_factor}"
        )
    if rope.sign not in (1, -1):
        raise UserError(f"model.position.rope.sign={rope.sign} must be 1 or -1")
    if config.rnn.type:
        _check_recurrent(config)
    elif config.rnn.separate_directions or config.rnn.residual:
        raise UserError(
            "model.rnn.separate_directions and model.rnn.residual are for recurrent layers: "
            "set model.rnn.type, or leave them out"
        )
    if not config.num_layers and (config.encoder.num_layers or config.rnn.type):
        raise UserError(
            "model.num_layers=0 is a model of embeddings only: leave out model.encoder.num_layers and model.rnn.type too"
        )
    characters = config.embedding.characters
    if characters.max_length and (
        config.tie_embeddings or characters.max_length < 7 or characters.num_filters < 64 or characters.num_filters % 64
    ):
        raise UserError(
            "a character CNN has no table to tie its head to, reads at least 7 bytes of each token, and has "
            "64, 128, 192 ... filters: set model.tie_embeddings=false, model.embedding.characters.max_length=16 and "
            "model.embedding.characters.num_filters=512"
        )


def _check_recurrent(config: ModelConfig) -> None:
    """Raise UserError for options of attention blocks, which recurrent layers would ignore."""
    unused = {
        "encoder.num_layers": 0,
        "embedding.size": 0,
        "num_layer_groups": 0,
        "norm.embedding": False,
        "norm.first_attention": True,
        "norm.placement": "post",
        "attention.scale_scores": True,
        "attention.qk_norm": False,
        "attention.qk_norm_weight": False,
        "init.zero_output": False,
        "bias": True,
        "bias_location": "all",
        "num_kv_heads": config.num_heads,
        "head_dim": config.hidden_size // config.num_heads,
    }
    given = config.flat_fields()
    for name, value in unused.items():
        if given[name] != value:
            raise UserError(
                f"model.{name}={given[name]} has no effect on recurrent layers: set it to {value}, "
                "or start from the recipe lstm"
            )
    if config.position.type in ("rotary", "t5"):
        raise UserError(f"model.position={config.position.type} is for attention: set model.position=none (or learned)")
    if config.causal and config.rnn.separate_directions:
        raise UserError(
            "model.rnn.separate_directions needs two directions, and model.causal=true has one: set model.causal=false"
        )
    if config.hidden_size % 2 and not config.causal:
        raise UserError(
            f"two directions have half of the width each, and model.hidden_size={config.hidden_size} is odd: make it even"
        )
    if config.intermediate_size < config.direction_size or (
        config.intermediate_size > config.direction_size and config.rnn.type != "lstm"
    ):
        raise UserError(
            f"model.intermediate_size={config.intermediate_size} cells do not give the {config.direction_size} outputs "
            "of a direction, and only an LSTM projects more cells to fewer: leave model.intermediate_size out"
        )
