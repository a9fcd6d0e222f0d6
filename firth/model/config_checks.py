"""Which numbers and choices make no architecture: every refusal of a `Shape`, in one sentence each.

>>> from firth.model.config import ModelConfig
>>> ModelConfig(vocab=100, width=32, depth=1, heads=4, rotary_sign=0)
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


def check_fields(shape: ModelConfig) -> None:
    """Raise a UserError for a field that is wrong whatever the others say."""
    for name, choices in CHOICES.items():
        if getattr(shape, name) not in choices:
            raise UserError(f"shape.{name}={getattr(shape, name)!r} is not one of {', '.join(choices)}")
    if not shape.head_width and shape.width % shape.heads:
        raise UserError(
            f"shape.width={shape.width} is not a multiple of shape.heads={shape.heads}: "
            "change one of them, or state shape.head_width"
        )


def check_combinations(shape: ModelConfig) -> None:
    """Raise a UserError for fields that do not fit each other."""
    if shape.heads % shape.kv_heads:
        raise UserError(f"shape.heads={shape.heads} is not a multiple of shape.kv_heads={shape.kv_heads}")
    if shape.position == "rotary" and shape.head_width % 2:
        raise UserError(
            f"rotary positions turn pairs of numbers, and a head of {shape.head_width} is odd: make it even"
        )
    if shape.position in SINUSOIDAL and shape.table_width % 2:
        raise UserError(f"sinusoidal positions come in pairs, and a width of {shape.table_width} is odd: make it even")
    if shape.embed and shape.tied and shape.head == "linear":
        raise UserError(
            f"a linear head of width {shape.width} cannot be tied to tables of shape.embed={shape.embed}: "
            "set shape.head=transform or shape.tied=false"
        )
    if shape.groups > min(shape.depth, shape.encoder or shape.depth):
        raise UserError(f"shape.groups={shape.groups} is more than there are layers: make it at most shape.depth")
    if shape.groups and not shape.first_norm:
        raise UserError(
            "layers that share a block cannot differ in their first norm: set shape.first_norm=true or shape.groups=0"
        )
    if shape.position == "xlnet" and (
        shape.width % 2 or shape.encoder or shape.kv_heads != shape.heads or shape.qk_norm
    ):
        raise UserError(
            f"position xlnet needs an even shape.width (it is {shape.width}), encoder=0 ({shape.encoder}), as many "
            f"kv_heads as heads ({shape.kv_heads} of {shape.heads}) and qk_norm=false ({str(shape.qk_norm).lower()})"
        )
    if shape.memory and shape.position != "xlnet":
        raise UserError(
            f"shape.memory={shape.memory} needs positions that reach back before a row, which "
            f"shape.position={shape.position!r} does not: set shape.position=xlnet, or shape.memory=0"
        )
    if shape.linformer and (
        shape.recurrent
        or shape.causal
        or shape.encoder
        or shape.position in ("t5", "mpnet", "xlnet")
        or shape.linformer > shape.context
    ):
        raise UserError(
            f"shape.linformer={shape.linformer} mixes a whole row of at most shape.context={shape.context} tokens into as many "
            "slots at most: it needs causal=false, encoder=0, and a position other than t5, mpnet and xlnet"
        )
    if shape.prefix_lm and (shape.causal or shape.encoder or shape.recurrent or shape.linformer or not shape.depth):
        raise UserError(
            "shape.prefix_lm reads a text both ways and writes on in the same row: set shape.causal=false and leave out "
            "shape.encoder, shape.recurrent and shape.linformer"
        )
    if shape.latent and not shape.encoder:
        raise UserError(f"shape.latent={shape.latent} stands between an encoder and a decoder: set shape.encoder")
    if shape.qk_weight and not shape.qk_norm:
        raise UserError("shape.qk_weight is the gain of shape.qk_norm: set shape.qk_norm=true, or leave it out")
    if shape.rotary_high <= shape.rotary_low:
        raise UserError(f"shape.rotary_high={shape.rotary_high} must be above shape.rotary_low={shape.rotary_low}")
    if shape.rotary_sign not in (1, -1):
        raise UserError(f"shape.rotary_sign={shape.rotary_sign} must be 1 or -1")
    if shape.recurrent:
        _refuse_blocks(shape)
    elif shape.apart or shape.skip:
        raise UserError("shape.apart and shape.skip are for recurrent layers: set shape.recurrent, or leave them out")
    if not shape.depth and (shape.encoder or shape.recurrent):
        raise UserError("shape.depth=0 leaves the embeddings alone: leave out shape.encoder and shape.recurrent too")
    if shape.characters and (shape.tied or shape.characters < 7 or shape.filters < 64 or shape.filters % 64):
        raise UserError(
            "a model that spells its tokens has no table to tie its head to, reads at least 7 bytes of each, and has "
            "64, 128, 192 ... filters: set shape.tied=false, shape.characters=16 and shape.filters=512"
        )


def _refuse_blocks(shape: ModelConfig) -> None:
    """Recurrent layers have nothing in them that these fields could change; what is asked for is not ignored."""
    still = {"encoder": 0, "embed": 0, "groups": 0, "embed_norm": False, "first_norm": True, "norm_at": "post", "score_scale": True,
             "qk_norm": False, "qk_weight": False, "zero_init": False, "bias": True, "bias_at": "all", "kv_heads": shape.heads,
             "head_width": shape.width // shape.heads}  # fmt: skip
    for name, value in still.items():
        if getattr(shape, name) != value:
            raise UserError(
                f"shape.{name}={getattr(shape, name)} means nothing to recurrent layers: set it to {value}, "
                "or begin from the recipe lstm"
            )
    if shape.position in ("rotary", "t5"):
        raise UserError(f"{shape.position} positions are for attention: set shape.position=none (or learned)")
    if shape.causal and shape.apart:
        raise UserError("shape.apart is for two directions, and shape.causal=true is one: set shape.causal=false")
    if shape.width % 2 and not shape.causal:
        raise UserError(f"two directions share the width, and shape.width={shape.width} is odd: make it even")
    if shape.hidden < shape.stream or (shape.hidden > shape.stream and shape.recurrent != "lstm"):
        raise UserError(
            f"shape.hidden={shape.hidden} cells hand on {shape.stream} numbers in each direction, and only an LSTM "
            "projects more cells to fewer: leave shape.hidden out"
        )
