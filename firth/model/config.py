"""Model architecture: `ModelConfig`, from which `LM` builds the model, and the default configurations.

The published families are configurations, not classes (`norm=rms` sets `norm.type`, as in a recipe):

    BERT        causal off, norm.placement=post, position=learned, embedding.type_vocab_size=2, norm.embedding,
                lm_head=transform, lm_head.bias
    RoBERTa     BERT with embedding.type_vocab_size=1;   DistilBERT: embedding.type_vocab_size=0
    ALBERT      BERT with embedding.size=128, num_layer_groups=1 (one block for all layers)
    ELECTRA     BERT with embedding.size=128 (small)
    MPNet       causal off, norm.placement=post, position=mpnet, norm.embedding, lm_head=transform, lm_head.bias
    ModernBERT  causal off, norm.bias off, norm.embedding, norm.first_attention off, position=rotary,
                activation=geglu, lm_head=transform
    XLNet       causal off, norm.placement=post, position=xlnet, embedding.mask, embedding.type_vocab_size=2,
                attention.memory_length=384, lm_head.bias
    GPT-2       position=learned, activation=gelu_tanh, tie_embeddings
    Llama       norm=rms, norm.bias off, position=rotary, activation=swiglu, bias off;   Mistral: the same
    Qwen2       Llama with bias, bias_location=qkv;   Qwen3: Llama with attention.qk_norm, attention.qk_norm_weight
    NanoChat    norm=rms, norm.weight off, norm.embedding, attention.qk_norm, activation=relu2, lm_head.softcap=15,
                position.rope.sign=-1
    T5          encoder.num_layers=12, norm=rms, position=t5, activation=relu or geglu_tanh, attention.scale_scores off
    BART        encoder.num_layers=12, norm.placement=post, position=learned, activation=gelu, norm.embedding,
                lm_head.bias, encoder.decoder_start_token=eos
    Marian      BART with position=marian, norm.embedding off, embedding.scale=hidden_size ** 0.5,
                encoder.decoder_start_token=pad
    ELMo        rnn=lstm, rnn.separate_directions, rnn.residual, intermediate_size=4096,
                embedding.characters.max_length=50, embedding.characters.num_filters=2048, causal off,
                tie_embeddings off
    word2vec    num_layers=0

>>> decoder_config(vocab_size=8192, hidden_size=384, num_layers=6).num_parameters()
16908288
>>> ModelConfig(vocab_size=100, hidden_size=30, num_layers=1, num_heads=4)
Traceback (most recent call last):
    ...
firth.types.UserError: model.hidden_size=30 is not a multiple of model.num_heads=4: change one of them, or set model.head_dim
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Interval

from firth.fields import (
    NonNegativeFloat,
    OptionalTokenCount,
    PositiveFloat,
    PositiveInt,
    ShareBelowOne,
    TokenCount,
    Validated,
)
from firth.model import nested_config
from firth.model.config_checks import check_combinations, check_head_dim
from firth.model.parameter_count import GATED, num_parameters

AttentionPattern = Literal[
    "any", "causal", "bidirectional", "permuted", "prefix", "seq2seq", "bidirectional_separate", "none", "latent"
]
"""Attention pattern that an objective uses:

    any                     the model's own
    causal                  each token attends to itself and the tokens before it
    bidirectional           each token attends to all tokens
    permuted                each token attends to those before it in a sampled order (XLNet)
    prefix                  the prompt is bidirectional, the tokens after it are causal
    seq2seq                 an encoder reads the source, a causal decoder the target
    bidirectional_separate  a left-to-right and a right-to-left model that share no state (ELMo)
    none                    each token on its own
    latent                  an encoder reads the source, a decoder reproduces it from a latent vector alone (VAE)
"""


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


@dataclass(frozen=True)
class ModelConfig(Validated, section="model"):
    """Configuration of a model architecture; the defaults are GPT-2's.

    A size of 0 means "default" or "off", as stated.

    Args:
        vocab_size: Number of token ids, 1 to 2**31 - 1.
        hidden_size: Width of a hidden state, 1 to 2**20.
        num_layers: Number of decoder (or encoder-only) blocks or recurrent layers, 0 to 10,000; 0: embeddings only.
        num_heads: Number of attention heads, 1 to 2**16; divides `hidden_size` unless `head_dim` is set.
        num_kv_heads: Number of key/value heads, a divisor of `num_heads`; 0: `num_heads` (Ainslie 2023).
        head_dim: Width of a head, even with rotary positions; 0: hidden_size / num_heads.
        intermediate_size: Inner width of the MLP; 0: 4 * hidden_size. With `rnn.type`: cells per direction.
        max_positions: Longest row in tokens, from 1; a hard limit only for learned positions and for Linformer.
        num_layer_groups: Number of distinct blocks, shared by consecutive layers; 0: one for each layer (ALBERT: 1).
        activation: "gelu", "gelu_tanh", "relu", "relu2", "silu"; gated: "swiglu", "geglu", "geglu_tanh" (Shazeer 2020).
        bias: Whether the linear maps of a block have biases.
        bias_location: Which of them: "all", "attention", or "qkv" (queries, keys and values: Qwen2).
        dropout: Probability on embeddings, attention weights and branch outputs, at least 0 and below 1.
        causal: Whether each token attends only to itself and those before it (limits `supported_patterns`).
        tie_embeddings: Whether the LM head uses the token embedding as its matrix.
        norm: The norms.
        position: The position encoding.
        attention: Attention.
        embedding: The embeddings.
        lm_head: The LM head.
        encoder: The encoder of an encoder-decoder.
        rnn: Recurrent layers in place of attention.
        init: The initial weights.

    Raises:
        UserError: A field is out of range, or fields do not fit each other (`firth.model.config_checks`).
    """

    vocab_size: TokenIds
    hidden_size: Width
    num_layers: Layers
    num_heads: Heads
    num_kv_heads: OptionalHeads = 0
    head_dim: OptionalWidth = 0
    intermediate_size: OptionalWidth = 0
    max_positions: TokenCount = 1024
    num_layer_groups: Layers = 0
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh"] = "gelu_tanh"
    bias: bool = True
    bias_location: Literal["all", "attention", "qkv"] = "all"
    dropout: ShareBelowOne = 0.0
    causal: bool = True
    tie_embeddings: bool = True
    norm: NormConfig = NormConfig()
    position: PositionConfig = PositionConfig()
    attention: AttentionConfig = AttentionConfig()
    embedding: EmbeddingConfig = EmbeddingConfig()
    lm_head: LMHeadConfig = LMHeadConfig()
    encoder: EncoderConfig = EncoderConfig()
    rnn: RNNConfig = RNNConfig()
    init: InitConfig = InitConfig()

    def __post_init__(self) -> None:
        super().__post_init__()

        def fill(name: str, value: int) -> None:
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)

        check_head_dim(self)
        fill("num_kv_heads", self.num_heads)
        fill("head_dim", self.hidden_size // self.num_heads)
        fill("intermediate_size", self.direction_size if self.rnn.type else 4 * self.hidden_size)
        check_combinations(self)

    @property
    def direction_size(self) -> int:
        """Output width of one recurrent direction."""
        return self.hidden_size if self.causal else self.hidden_size // 2

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate projection."""
        return self.activation in GATED

    @property
    def embedding_dim(self) -> int:
        """Width of the embedding tables."""
        return self.embedding.size or (self.hidden_size // 2 if self.rnn.separate_directions else self.hidden_size)

    @property
    def description(self) -> str:
        """Short name of the architecture for messages, with its article."""
        if not self.num_layers:
            return "a table of word vectors"
        if self.rnn.type:
            name = self.rnn.type.upper()
            both = f"a bidirectional {name}" + " with separate directions" * self.rnn.separate_directions
            return f"a left-to-right {name}" if self.causal else both
        if self.encoder.num_layers:
            return "a variational autoencoder" if self.encoder.latent_size else "an encoder-decoder"
        if self.attention.linformer.k:
            return "a Linformer"
        if self.attention.prefix_lm:
            return "a prefix language model"
        if self.causal:
            return "a causal decoder"
        return (
            "an encoder"
            if self.lm_head.type == "transform" or self.embedding.mask
            else "a decoder that can attend in both directions"
        )

    @property
    def supported_patterns(self) -> frozenset[AttentionPattern]:
        """Attention patterns that the model can run."""
        if not self.num_layers:
            return frozenset({"any", "none"})
        if self.rnn.type and not self.causal:
            # With separate stacks, the last state of each direction has read the whole text.
            return frozenset(
                {"any", "bidirectional", "bidirectional_separate"}
                if self.rnn.separate_directions
                else {"any", "bidirectional"}
            )
        if self.encoder.num_layers:
            return frozenset({"any", "latent" if self.encoder.latent_size else "seq2seq"})
        if self.attention.linformer.k:
            return frozenset({"any", "bidirectional"})
        return frozenset({"any", "causal"} if self.causal else {"any", "causal", "bidirectional", "permuted", "prefix"})

    @property
    def packable(self) -> bool:
        """Whether a row may hold several documents that do not attend to each other."""
        return not self.attention.linformer.k and not self.encoder.latent_size

    @property
    def supports_subset(self) -> bool:
        """Whether the last block can run at a subset of the positions."""
        return not (self.rnn.type or self.attention.linformer.k or self.encoder.num_layers) and self.num_layers > 0

    @property
    def linformer_projections(self) -> tuple[int, int]:
        """Number of separate Linformer projections: (layers, 1 or 2 for keys and values)."""
        layers = 1 if self.attention.linformer.sharing == "layerwise" else self.num_layers
        return layers, 1 + (self.attention.linformer.sharing == "headwise")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Return the config of nested dicts; the inverse of `dataclasses.asdict`.

        Raises:
            UserError: A field is unknown or invalid.
            TypeError: A required field is missing, or a group is not a dict.
        """
        config: ModelConfig = nested_config.from_dict(cls, data)
        return config

    def flat_fields(self) -> dict[str, Any]:
        """Return the dotted name -> value of every field, groups expanded: {"vocab_size": 8192, "norm.eps": 1e-5, ...}."""
        return nested_config.flat_fields(self)

    def with_fields(self, values: Mapping[str, Any]) -> ModelConfig:
        """Return a copy with fields set by their dotted names.

        >>> decoder_config(100, 64, 1).with_fields({"norm.eps": 1e-5, "causal": False}).norm.eps
        1e-05
        """
        config: ModelConfig = nested_config.with_fields(self, values)
        return config

    def num_parameters(self) -> int:
        """Return the exact number of parameters with the LM head; a tied head counts once."""
        return num_parameters(self)


def decoder_config(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int = 0,
    max_positions: int = 1024,
    intermediate_size: int = 0,
) -> ModelConfig:
    """Return the default decoder, a NanoChat: what learns fastest here per second (docs/results/index.md).

    num_heads 0: hidden_size / 64; intermediate_size 0: 4 * hidden_size.
    """
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads or max(1, hidden_size // 64),
        max_positions=max_positions,
        intermediate_size=intermediate_size,
        norm=NormConfig("rms", weight=False, bias=False, eps=1e-6, embedding=True),
        position=PositionConfig("rotary", rope=RopeConfig(sign=-1)),
        activation="relu2",
        bias=False,
        attention=AttentionConfig(qk_norm=True),
        tie_embeddings=False,
        lm_head=LMHeadConfig(softcap=15.0),
        init=InitConfig(std=0.0, zero_output=True),
    )


def encoder_config(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int = 0,
    max_positions: int = 1024,
    intermediate_size: int = 0,
) -> ModelConfig:
    """Return the default encoder, a ModernBERT with full attention in every layer.

    num_heads 0: hidden_size / 64; intermediate_size 0: 2 * hidden_size.
    """
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads or max(1, hidden_size // 64),
        max_positions=max_positions,
        intermediate_size=intermediate_size or 2 * hidden_size,
        causal=False,
        norm=NormConfig(bias=False, embedding=True, first_attention=False),
        position=PositionConfig("rotary"),
        activation="geglu",
        bias=False,
        lm_head=LMHeadConfig("transform", bias=True),
        init=InitConfig(std=0.0, zero_output=True),
    )


def encoder_decoder_config(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int = 0,
    max_positions: int = 1024,
    intermediate_size: int = 0,
) -> ModelConfig:
    """Return the default encoder-decoder, a T5 v1.1 with `num_layers` blocks on each side.

    num_heads 0: hidden_size / 64; intermediate_size 0: 2 * hidden_size.
    """
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        encoder=EncoderConfig(num_layers=num_layers),
        num_heads=num_heads or max(1, hidden_size // 64),
        max_positions=max_positions,
        intermediate_size=intermediate_size or 2 * hidden_size,
        norm=NormConfig("rms", bias=False, eps=1e-6),
        position=PositionConfig("t5"),
        activation="geglu_tanh",
        bias=False,
        attention=AttentionConfig(scale_scores=False),
        tie_embeddings=False,
        init=InitConfig(std=0.0, zero_output=True),
    )


def recurrent_config(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    rnn_type: Literal["rnn", "gru", "lstm"] = "lstm",
    max_positions: int = 1024,
) -> ModelConfig:
    """Return the default recurrent language model: left-to-right layers and a head tied to the embeddings."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=1,
        max_positions=max_positions,
        norm=NormConfig(placement="post"),
        position=PositionConfig("none"),
        rnn=RNNConfig(rnn_type),
        lm_head=LMHeadConfig(bias=True),
    )


def word_vector_config(vocab_size: int, hidden_size: int) -> ModelConfig:
    """Return the configuration of word vectors: embeddings without layers (word2vec)."""
    # With init.std 0.3 rare words keep much of their initial vector; with 0.003 all vectors share a direction for long.
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=0,
        num_heads=1,
        norm=NormConfig(placement="post"),
        position=PositionConfig("none"),
        causal=False,
        init=InitConfig(std=0.1),
    )
