"""Which numbers and choices make no architecture: every refusal of a `Shape`, in one sentence each.

>>> from firth.model.config import ModelConfig
>>> ModelConfig(vocab_size=100, hidden_size=32, num_layers=1, num_heads=4, rope_sign=0)
Traceback (most recent call last):
    ...
firth.types.UserError: shape.rotary_sign=0 must be 1 or -1
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from firth.model.parameter_count import GATED, GATES, SINUSOIDAL
from firth.types import UserError

if TYPE_CHECKING:
    from firth.model.config import ModelConfig

CHOICES: dict[str, tuple[str, ...]] = {
    "decoder_start": ("pad", "eos"),
    "bias_at": ("all", "attention", "qkv"),
    "rotary_scaling": ("none", "linear", "llama3"),
    "recurrent": ("", *GATES),
    "norm": ("layer", "rms"),
    "norm_at": ("pre", "post"),
    "position": ("learned", "sinusoidal", "marian", "rotary", "t5", "mpnet", "xlnet", "none"),
    "activation": ("gelu", "gelu_tanh", "relu", "relu2", "silu", *GATED),
    "head": ("linear", "transform"),
    "linformer_sharing": ("headwise", "key-value", "layerwise"),
}


def check_fields(config: ModelConfig) -> None:
    """Raise a UserError for a field that is wrong whatever the others say."""
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise UserError(f"shape.{name}={getattr(config, name)!r} is not one of {', '.join(choices)}")
    if not config.head_dim and config.hidden_size % config.num_heads:
        raise UserError(
            f"shape.width={config.hidden_size} is not a multiple of shape.heads={config.num_heads}: "
            "change one of them, or state shape.head_width"
        )


def check_combinations(config: ModelConfig) -> None:
    """Raise a UserError for fields that do not fit each other."""
    if config.num_heads % config.num_kv_heads:
        raise UserError(f"shape.heads={config.num_heads} is not a multiple of shape.kv_heads={config.num_kv_heads}")
    if config.position == "rotary" and config.head_dim % 2:
        raise UserError(f"rotary positions turn pairs of numbers, and a head of {config.head_dim} is odd: make it even")
    if config.position in SINUSOIDAL and config.embedding_dim % 2:
        raise UserError(
            f"sinusoidal positions come in pairs, and a width of {config.embedding_dim} is odd: make it even"
        )
    if config.embedding_size and config.tie_embeddings and config.lm_head == "linear":
        raise UserError(
            f"a linear head of width {config.hidden_size} cannot be tied to tables of shape.embed={config.embedding_size}: "
            "set shape.head=transform or shape.tied=false"
        )
    if config.num_layer_groups > min(config.num_layers, config.num_encoder_layers or config.num_layers):
        raise UserError(
            f"shape.groups={config.num_layer_groups} is more than there are layers: make it at most shape.depth"
        )
    if config.num_layer_groups and not config.first_attention_norm:
        raise UserError(
            "layers that share a block cannot differ in their first norm: set shape.first_norm=true or shape.groups=0"
        )
    if config.position == "xlnet" and (
        config.hidden_size % 2 or config.num_encoder_layers or config.num_kv_heads != config.num_heads or config.qk_norm
    ):
        raise UserError(
            f"position xlnet needs an even shape.width (it is {config.hidden_size}), encoder=0 ({config.num_encoder_layers}), as many "
            f"kv_heads as heads ({config.num_kv_heads} of {config.num_heads}) and qk_norm=false ({str(config.qk_norm).lower()})"
        )
    if config.memory_length and config.position != "xlnet":
        raise UserError(
            f"shape.memory={config.memory_length} needs positions that reach back before a row, which "
            f"shape.position={config.position!r} does not: set shape.position=xlnet, or shape.memory=0"
        )
    if config.linformer_k and (
        config.rnn_type
        or config.causal
        or config.num_encoder_layers
        or config.position in ("t5", "mpnet", "xlnet")
        or config.linformer_k > config.max_positions
    ):
        raise UserError(
            f"shape.linformer={config.linformer_k} mixes a whole row of at most shape.context={config.max_positions} tokens into as many "
            "slots at most: it needs causal=false, encoder=0, and a position other than t5, mpnet and xlnet"
        )
    if config.prefix_lm and (
        config.causal or config.num_encoder_layers or config.rnn_type or config.linformer_k or not config.num_layers
    ):
        raise UserError(
            "shape.prefix_lm reads a text both ways and writes on in the same row: set shape.causal=false and leave out "
            "shape.encoder, shape.recurrent and shape.linformer"
        )
    if config.latent_size and not config.num_encoder_layers:
        raise UserError(f"shape.latent={config.latent_size} stands between an encoder and a decoder: set shape.encoder")
    if config.qk_norm_weight and not config.qk_norm:
        raise UserError("shape.qk_weight is the gain of shape.qk_norm: set shape.qk_norm=true, or leave it out")
    if config.rope_high_freq_factor <= config.rope_low_freq_factor:
        raise UserError(
            f"shape.rotary_high={config.rope_high_freq_factor} must be above shape.rotary_low={config.rope_low_freq_factor}"
        )
    if config.rope_sign not in (1, -1):
        raise UserError(f"shape.rotary_sign={config.rope_sign} must be 1 or -1")
    if config.rnn_type:
        _refuse_blocks(config)
    elif config.separate_directions or config.rnn_residual:
        raise UserError("shape.apart and shape.skip are for recurrent layers: set shape.recurrent, or leave them out")
    if not config.num_layers and (config.num_encoder_layers or config.rnn_type):
        raise UserError("shape.depth=0 leaves the embeddings alone: leave out shape.encoder and shape.recurrent too")
    if config.max_characters and (
        config.tie_embeddings or config.max_characters < 7 or config.char_filters < 64 or config.char_filters % 64
    ):
        raise UserError(
            "a model that spells its tokens has no table to tie its head to, reads at least 7 bytes of each, and has "
            "64, 128, 192 ... filters: set shape.tied=false, shape.characters=16 and shape.filters=512"
        )


def _refuse_blocks(config: ModelConfig) -> None:
    """Recurrent layers have nothing in them that these fields could change; what is asked for is not ignored."""
    still = {"encoder": 0, "embed": 0, "groups": 0, "embed_norm": False, "first_norm": True, "norm_at": "post", "score_scale": True,
             "qk_norm": False, "qk_weight": False, "zero_init": False, "bias": True, "bias_at": "all", "kv_heads": config.num_heads,
             "head_width": config.hidden_size // config.num_heads}  # fmt: skip
    for name, value in still.items():
        if getattr(config, name) != value:
            raise UserError(
                f"shape.{name}={getattr(config, name)} means nothing to recurrent layers: set it to {value}, "
                "or begin from the recipe lstm"
            )
    if config.position in ("rotary", "t5"):
        raise UserError(f"{config.position} positions are for attention: set shape.position=none (or learned)")
    if config.causal and config.separate_directions:
        raise UserError("shape.apart is for two directions, and shape.causal=true is one: set shape.causal=false")
    if config.hidden_size % 2 and not config.causal:
        raise UserError(f"two directions share the width, and shape.width={config.hidden_size} is odd: make it even")
    if config.intermediate_size < config.direction_size or (
        config.intermediate_size > config.direction_size and config.rnn_type != "lstm"
    ):
        raise UserError(
            f"shape.hidden={config.intermediate_size} cells hand on {config.direction_size} numbers in each direction, and only an LSTM "
            "projects more cells to fewer: leave shape.hidden out"
        )
