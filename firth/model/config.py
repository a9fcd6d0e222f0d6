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

>>> decoder_config(vocab_size=8192, hidden_size=384, num_layers=6).intermediate_size
1536
>>> ModelConfig(vocab_size=100, hidden_size=30, num_layers=1, num_heads=4)
Traceback (most recent call last):
    ...
firth.types.UserError: model.hidden_size=30 is not a multiple of model.num_heads=4: change one of them, or set model.head_dim
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from firth.fields import (
    ShareBelowOne,
    TokenCount,
    Validated,
)
from firth.model.config_groups import (
    GATED,
    SINUSOIDAL_POSITIONS,
    AttentionConfig,
    EmbeddingConfig,
    EncoderConfig,
    Heads,
    InitConfig,
    Layers,
    LMHeadConfig,
    NormConfig,
    OptionalHeads,
    OptionalWidth,
    PositionConfig,
    RNNConfig,
    RopeConfig,
    TokenIds,
    Width,
    flat_fields,
    nested_from_dict,
    with_fields,
)
from firth.types import UserError

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
        UserError: A field is out of range, or fields do not fit each other (`check_combinations`).
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
        config: ModelConfig = nested_from_dict(cls, data)
        return config

    def flat_fields(self) -> dict[str, Any]:
        """Return the dotted name -> value of every field, groups expanded: {"vocab_size": 8192, "norm.eps": 1e-5, ...}."""
        return flat_fields(self)

    def with_fields(self, values: Mapping[str, Any]) -> ModelConfig:
        """Return a copy with fields set by their dotted names.

        >>> decoder_config(100, 64, 1).with_fields({"norm.eps": 1e-5, "causal": False}).norm.eps
        1e-05
        """
        config: ModelConfig = with_fields(self, values)
        return config


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
