"""Groups of the fields of `firth.model.config.ModelConfig`, the constants of architectures, and dataclasses in each other as dicts.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Norm:
...     eps: float = 1e-5
>>> @dataclass(frozen=True)
... class Block:
...     width: int
...     norm: Norm = Norm()
>>> block = nested_from_dict(Block, {"width": 8, "norm": {"eps": 1e-6}})
>>> flat_fields(block)
{'width': 8, 'norm.eps': 1e-06}
>>> with_fields(block, {"width": 4, "norm.eps": 0.1})
Block(width=4, norm=Norm(eps=0.1))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import Interval

from firth.fields import (
    NonNegativeFloat,
    OptionalTokenCount,
    PositiveFloat,
    PositiveInt,
    TokenCount,
    Validated,
)
from firth.types import UserError

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

Width = Annotated[int, Interval(ge=1, le=1 << 20)]
OptionalWidth = Annotated[int, Interval(ge=0, le=1 << 20)]
Heads = Annotated[int, Interval(ge=1, le=1 << 16)]
OptionalHeads = Annotated[int, Interval(ge=0, le=1 << 16)]
Layers = Annotated[int, Interval(ge=0, le=10_000)]
Types = Annotated[int, Interval(ge=0, le=1 << 16)]
TokenIds = Annotated[int, Interval(ge=1, lt=1 << 31)]
"""Ranges of model sizes. The upper bounds are fifty times those of any published model: a larger number is a typing error."""


@dataclass(frozen=True)
class NormConfig(Validated, section="model.norm"):
    """Configuration of the norms.

    Args:
        type: "layer" (Ba 2016) or "rms" (Zhang and Sennrich 2019).
        placement: "pre": x + f(norm(x)) (GPT-2); "post": norm(x + f(x)) (BERT).
        weight: Whether norms have a learned gain.
        bias: Whether layer norms have a learned offset.
        eps: Added to the variance, above 0 and below 1.
        embedding: Whether the embeddings are normalized.
        first_attention: Whether the first block has a norm before attention (ModernBERT: False).
    """

    type: Literal["layer", "rms"] = "layer"
    placement: Literal["pre", "post"] = "pre"
    weight: bool = True
    bias: bool = True
    eps: Annotated[float, Interval(gt=0, lt=1)] = 1e-5
    embedding: bool = False
    first_attention: bool = True


@dataclass(frozen=True)
class RopeConfig(Validated, section="model.position.rope"):
    """Configuration of rotary positions (Su 2021).

    Args:
        theta: Base of the wavelengths, above 0.
        sign: Direction of rotation: 1, or -1 (NanoChat).
        scaling: Context extension: "none", "linear" (all wavelengths, Chen 2023) or "llama3" (long ones only).
        factor: Factor on the scaled wavelengths, above 0.
        low_freq_factor: "llama3": wavelengths that fit fewer times into the original context are scaled in full.
        high_freq_factor: "llama3": wavelengths that fit more times into it are not scaled; in between, in part.
        original_max_positions: "llama3": the original context, in tokens, from 1.
    """

    theta: PositiveFloat = 10000.0
    sign: Annotated[int, Interval(ge=-1, le=1)] = 1
    scaling: Literal["none", "linear", "llama3"] = "none"
    factor: PositiveFloat = 1.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_positions: PositiveInt = 8192


@dataclass(frozen=True)
class PositionConfig(Validated, section="model.position"):
    """Configuration of the position encoding.

    Args:
        type: "learned", "sinusoidal" (sines and cosines interleaved, Vaswani 2017), "marian" (all sines, then all
            cosines), "rotary" (Su 2021), "t5" (bucketed bias, Raffel 2020), "mpnet" ("learned" and "t5"), "xlnet"
            (relative, `firth.model.positions`; token types are then relative too) or "none".
        rope: Settings of "rotary".
        relative_buckets: Number of distance buckets of "t5" and "mpnet", 2 to 65,536 (Raffel 2020, section 2.1).
        relative_max_distance: Distance in tokens from which on all share the last bucket, from 1.
    """

    type: Literal["learned", "sinusoidal", "marian", "rotary", "t5", "mpnet", "xlnet", "none"] = "learned"
    rope: RopeConfig = RopeConfig()
    relative_buckets: Annotated[int, Interval(ge=2, le=65536)] = 32
    relative_max_distance: TokenCount = 128


@dataclass(frozen=True)
class LinformerConfig(Validated, section="model.attention.linformer"):
    """Configuration of the Linformer's projections of keys and values, for encoders (Wang 2020).

    Args:
        k: Slots that keys and values of a row are projected to; 0: full attention.
        sharing: Projections: "headwise" (keys and values separate), "key-value" (the same for both, one for each
            layer) or "layerwise" (one for all layers) (Wang 2020, section 4).
    """

    k: OptionalTokenCount = 0
    sharing: Literal["headwise", "key-value", "layerwise"] = "layerwise"


@dataclass(frozen=True)
class AttentionConfig(Validated, section="model.attention"):
    """Configuration of attention, beyond its heads.

    Args:
        scale_scores: Whether scores are divided by sqrt(head_dim) (T5: False).
        qk_norm: Whether queries and keys are scaled to unit RMS.
        qk_norm_weight: Whether `qk_norm` has a gain (head_dim,) (Qwen3).
        prefix_lm: Whether prompts are bidirectional and only outputs causal (Raffel 2020, section 3.2.1). Set by the run.
        memory_length: Tokens before a row whose states are attended to; 0: none. "xlnet" positions only (Dai 2019).
        linformer: Projection of keys and values to fewer slots.
    """

    scale_scores: bool = True
    qk_norm: bool = False
    qk_norm_weight: bool = False
    prefix_lm: bool = False
    memory_length: OptionalTokenCount = 0
    linformer: LinformerConfig = LinformerConfig()


@dataclass(frozen=True)
class CharacterConfig(Validated, section="model.embedding.characters"):
    """Configuration of the character CNN in place of a token table (Kim 2016, `firth.model.variants`).

    Args:
        max_length: Bytes of each token that the CNN reads, from 7; 0: a token table.
        num_filters: Number of filters, a multiple of 64.
    """

    max_length: Types = 0
    num_filters: Width = 512


@dataclass(frozen=True)
class EmbeddingConfig(Validated, section="model.embedding"):
    """Configuration of the embeddings. "Tables" are the token, position and token type embeddings.

    Args:
        size: Width of the tables, then projected to `hidden_size`; 0: hidden_size (Lan 2020, section 3.1).
        scale: Factor on token vectors, not on a tied head (Vaswani 2017, section 3.4: hidden_size ** 0.5).
        type_vocab_size: Number of token types (segments), 0 to 2**16; 0: no such embedding.
        mask: Whether positions without a key have a learned vector in place of their token's (XLNet's w).
        characters: The character CNN.
    """

    size: OptionalWidth = 0
    scale: PositiveFloat = 1.0
    type_vocab_size: Types = 0
    mask: bool = False
    characters: CharacterConfig = CharacterConfig()


@dataclass(frozen=True)
class EncoderConfig(Validated, section="model.encoder"):
    """Configuration of an encoder that a decoder attends to; an encoder-only model (BERT) has none.

    Args:
        num_layers: Number of blocks; above 0 every decoder block has cross-attention.
        decoder_start_token: Token that starts the decoder's output: "pad" (T5) or "eos" (BART).
        latent_size: Width of the Gaussian latent between encoder and decoder; 0: none (Kingma 2014, Bowman 2016).
    """

    num_layers: Layers = 0
    decoder_start_token: Literal["pad", "eos"] = "pad"
    latent_size: OptionalWidth = 0


@dataclass(frozen=True)
class LMHeadConfig(Validated, section="model.lm_head"):
    """Configuration of the LM head.

    Args:
        type: "linear", or "transform": dense layer, activation and norm before the matrix (BERT's released code).
        bias: Whether the head has a bias per token id.
        scale: Factor on the states before the head, above 0 (T5 1.0: hidden_size ** -0.5).
        softcap: c in c * tanh(logits / c), above 0; 0: no cap (Gemma 2).
    """

    type: Literal["linear", "transform"] = "linear"
    bias: bool = False
    scale: PositiveFloat = 1.0
    softcap: NonNegativeFloat = 0.0


@dataclass(frozen=True)
class RNNConfig(Validated, section="model.rnn"):
    """Configuration of recurrent layers in place of attention blocks.

    Args:
        type: "" for attention, or "rnn" (Elman 1990), "gru" (Cho 2014), "lstm" (Hochreiter 1997): causal, or two
            directions of hidden_size / 2. Then `intermediate_size` is the cells of a direction, 0: as many as it outputs;
            more than that only for an LSTM (projection, Sak 2014). Options of attention blocks are rejected.
        separate_directions: Whether the two directions are separate stacks over embeddings of hidden_size / 2 (ELMo).
        residual: Whether the input of each layer from the second on is added to its output.
    """

    type: Literal["", "rnn", "gru", "lstm"] = ""
    separate_directions: bool = False
    residual: bool = False


@dataclass(frozen=True)
class InitConfig(Validated, section="model.init"):
    """Configuration of the initial weights.

    Args:
        std: Standard deviation of initial matrices, at least 0; 0: fan_in ** -0.5.
        zero_output: Whether the output matrices of attention and MLP start at 0, so that a block starts as the identity.
    """

    std: NonNegativeFloat = 0.02
    zero_output: bool = False


def nested_from_dict(kind: Any, data: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a dataclass from nested dicts; a field with a dataclass as its default is built from a dict of its own.

    Args:
        kind: The dataclass.
        data: Field -> value, nested as `dataclasses.asdict` nests them.
        prefix: Names of the parents and a dot, for messages.

    Raises:
        UserError: A field is unknown, or a dataclass rejects its fields.
        TypeError: A required field is missing, or a nested dataclass is not a dict.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"model.{prefix[:-1]} is {data!r:.40}, not a mapping of fields")
    defaults = {field.name: field.default for field in fields(kind)}
    values = {}
    for name, value in data.items():
        if name not in defaults:
            raise UserError(f"unknown model config field {prefix + name!r}: another version of firth wrote it")
        default: Any = defaults[name]
        values[name] = nested_from_dict(type(default), value, f"{prefix}{name}.") if is_dataclass(default) else value
    return kind(**values)


def flat_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the dotted name -> value of every field, nested dataclasses expanded."""
    found = {}
    for field in fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        found.update(flat_fields(value, f"{name}.") if is_dataclass(value) else {name: value})
    return found


def with_fields(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a copy of a dataclass with fields set by their dotted names."""
    changed: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        group, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(group, {})[rest] = value
    for group, those in inner.items():
        changed[group] = with_fields(changed.get(group, getattr(config, group)), those)
    return replace(config, **changed)
