"""Model architecture: `ModelConfig`, from which `LM` builds the model, and the default configurations.

The published families are configurations, not classes:

    BERT        causal off, norm_placement="post", position="learned", type_vocab_size=2, embedding_norm,
                lm_head="transform", lm_head_bias
    RoBERTa     BERT with type_vocab_size=1;   DistilBERT: type_vocab_size=0
    ALBERT      BERT with embedding_size=128, num_layer_groups=1 (one block for all layers)
    ELECTRA     BERT with embedding_size=128 (small)
    MPNet       causal off, norm_placement="post", position="mpnet", embedding_norm, lm_head="transform", lm_head_bias
    ModernBERT  causal off, norm_bias off, embedding_norm, first_attention_norm off, position="rotary",
                activation="geglu", lm_head="transform"
    XLNet       causal off, norm_placement="post", position="xlnet", mask_embedding, type_vocab_size=2,
                memory_length=384, lm_head_bias
    GPT-2       position="learned", activation="gelu_tanh", tie_embeddings
    Llama       norm="rms", norm_bias off, position="rotary", activation="swiglu", bias off;   Mistral: the same
    Qwen2       Llama with bias, bias_location="qkv";   Qwen3: Llama with qk_norm, qk_norm_weight
    NanoChat    norm="rms", norm_weight off, embedding_norm, qk_norm, activation="relu2", logit_softcap=15, rope_sign=-1
    T5          num_encoder_layers=12, norm="rms", position="t5", activation="relu" or "geglu_tanh", scale_attention off
    BART        num_encoder_layers=12, norm_placement="post", position="learned", activation="gelu", embedding_norm,
                lm_head_bias, decoder_start_token="eos"
    Marian      BART with position="marian", embedding_norm off, embedding_scale=hidden_size ** 0.5,
                decoder_start_token="pad"
    ELMo        rnn_type="lstm", separate_directions, rnn_residual, intermediate_size=4096, max_characters=50,
                char_filters=2048, causal off, tie_embeddings off
    word2vec    num_layers=0

>>> decoder_config(vocab_size=8192, hidden_size=384, num_layers=6).num_parameters()
16908288
>>> ModelConfig(vocab_size=100, hidden_size=30, num_layers=1, num_heads=4)
Traceback (most recent call last):
    ...
firth.types.UserError: model.hidden_size=30 is not a multiple of model.num_heads=4: change one of them, or set model.head_dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

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
from firth.model.config_checks import check_combinations, check_fields
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
class ModelConfig(Validated, section="model"):
    """Configuration of a model architecture; the defaults are GPT-2's.

    A size of 0 means "default" or "off", as stated. "Tables" are the token, position and token type embeddings.

    Args:
        vocab_size: Number of token ids, 1 to 2**31 - 1.
        hidden_size: Width of a hidden state, 1 to 2**20.
        num_layers: Number of decoder (or encoder-only) blocks or recurrent layers, 0 to 10,000; 0: embeddings only.
        num_heads: Number of attention heads, 1 to 2**16; divides `hidden_size` unless `head_dim` is set.
        num_kv_heads: Number of key/value heads, a divisor of `num_heads`; 0: `num_heads` (Ainslie 2023).
        head_dim: Width of a head, even with rotary positions; 0: hidden_size / num_heads.
        intermediate_size: Inner width of the MLP; 0: 4 * hidden_size. With `rnn_type`: cells per direction.
        max_positions: Longest row in tokens, from 1; a hard limit only for learned positions and for Linformer.
        embedding_size: Width of the tables, then projected to `hidden_size`; 0: hidden_size (Lan 2020, section 3.1).
        embedding_scale: Factor on token vectors, not on a tied head (Vaswani 2017, section 3.4: hidden_size ** 0.5).
        num_layer_groups: Number of distinct blocks, shared by consecutive layers; 0: one for each layer (ALBERT: 1).
        num_encoder_layers: Number of blocks of an encoder; above 0 every decoder block has cross-attention.
        decoder_start_token: Token that starts the decoder's output: "pad" (T5) or "eos" (BART).
        causal: Whether each token attends only to itself and those before it (limits `supported_patterns`).
        prefix_lm: Whether prompts are bidirectional and only outputs causal (Raffel 2020, section 3.2.1). Set by the run.
        norm: "layer" (Ba 2016) or "rms" (Zhang and Sennrich 2019).
        norm_placement: "pre": x + f(norm(x)) (GPT-2); "post": norm(x + f(x)) (BERT).
        norm_weight: Whether norms have a learned gain.
        norm_bias: Whether layer norms have a learned offset.
        norm_eps: Added to the variance, above 0 and below 1.
        embedding_norm: Whether the embeddings are normalized.
        first_attention_norm: Whether the first block has a norm before attention (ModernBERT: False).
        position: Position encoding: "learned", "sinusoidal" (sines and cosines interleaved, Vaswani 2017), "marian" (all
            sines, then all cosines), "rotary" (Su 2021), "t5" (bucketed bias, Raffel 2020), "mpnet" ("learned" and "t5"),
            "xlnet" (relative, `firth.model.relative_distance`; token types are then relative too) or "none".
        rope_theta: Base of the rotary wavelengths, above 0.
        rope_sign: Direction of rotation: 1, or -1 (NanoChat).
        rope_scaling: Context extension: "none", "linear" (all wavelengths, Chen 2023) or "llama3" (long ones only).
        rope_factor: Factor on the scaled wavelengths, above 0.
        rope_low_freq_factor: "llama3": wavelengths that fit fewer times into the original context are scaled in full.
        rope_high_freq_factor: "llama3": wavelengths that fit more times into it are not scaled; in between, in part.
        rope_original_max_positions: "llama3": the original context, in tokens, from 1.
        relative_buckets: Number of distance buckets of "t5" and "mpnet", 2 to 65,536 (Raffel 2020, section 2.1).
        relative_max_distance: Distance in tokens from which on all share the last bucket, from 1.
        memory_length: Tokens before a row whose states are attended to; 0: none. "xlnet" positions only (Dai 2019).
        mask_embedding: Whether positions without a key have a learned vector in place of their token's (XLNet's w).
        activation: "gelu", "gelu_tanh", "relu", "relu2", "silu"; gated: "swiglu", "geglu", "geglu_tanh" (Shazeer 2020).
        bias: Whether the linear maps of a block have biases.
        bias_location: Which of them: "all", "attention", or "qkv" (queries, keys and values: Qwen2).
        scale_attention: Whether scores are divided by sqrt(head_dim) (T5: False).
        qk_norm: Whether queries and keys are scaled to unit RMS.
        qk_norm_weight: Whether `qk_norm` has a gain (head_dim,) (Qwen3).
        type_vocab_size: Number of token types (segments), 0 to 2**16; 0: no such embedding.
        dropout: Probability on embeddings, attention weights and branch outputs, at least 0 and below 1.
        tie_embeddings: Whether the LM head uses the token embedding as its matrix.
        lm_head: "linear", or "transform": dense layer, activation and norm before the matrix (BERT's released code).
        lm_head_bias: Whether the LM head has a bias per token id.
        lm_head_scale: Factor on the states before the LM head, above 0 (T5 1.0: hidden_size ** -0.5).
        logit_softcap: c in c * tanh(logits / c), above 0; 0: no cap (Gemma 2).
        linformer_k: Slots that keys and values of a row are projected to; 0: full attention. Encoders only (Wang 2020).
        linformer_sharing: Projections: "headwise" (keys and values separate), "key-value" (the same for both, one for each
            layer) or "layerwise" (one for all layers) (Wang 2020, section 4).
        latent_size: Width of the Gaussian latent between encoder and decoder; 0: none (Kingma 2014, Bowman 2016).
        init_std: Standard deviation of initial matrices, at least 0; 0: fan_in ** -0.5.
        zero_init: Whether the output matrices of attention and MLP start at 0, so that a block starts as the identity.
        rnn_type: "" for attention, or "rnn" (Elman 1990), "gru" (Cho 2014), "lstm" (Hochreiter 1997): causal, or two
            directions of hidden_size / 2. Then `intermediate_size` is the cells of a direction, 0: as many as it outputs;
            more than that only for an LSTM (projection, Sak 2014). Options of attention blocks are rejected.
        separate_directions: Whether the two directions are separate stacks over embeddings of hidden_size / 2 (ELMo).
        rnn_residual: Whether the input of each recurrent layer from the second on is added to its output.
        max_characters: Bytes of each token that a character CNN reads, from 7; 0: a token table (Kim 2016).
        char_filters: Number of filters of the character CNN, a multiple of 64 (`firth.model.characters`).

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
    embedding_size: OptionalWidth = 0
    embedding_scale: PositiveFloat = 1.0
    num_layer_groups: Layers = 0
    num_encoder_layers: Layers = 0
    decoder_start_token: Literal["pad", "eos"] = "pad"
    causal: bool = True
    prefix_lm: bool = False
    norm: Literal["layer", "rms"] = "layer"
    norm_placement: Literal["pre", "post"] = "pre"
    norm_weight: bool = True
    norm_bias: bool = True
    norm_eps: Annotated[float, Interval(gt=0, lt=1)] = 1e-5
    embedding_norm: bool = False
    first_attention_norm: bool = True
    position: Literal["learned", "sinusoidal", "marian", "rotary", "t5", "mpnet", "xlnet", "none"] = "learned"
    rope_theta: PositiveFloat = 10000.0
    rope_sign: Annotated[int, Interval(ge=-1, le=1)] = 1
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: PositiveFloat = 1.0
    rope_low_freq_factor: PositiveFloat = 1.0
    rope_high_freq_factor: PositiveFloat = 4.0
    rope_original_max_positions: PositiveInt = 8192
    relative_buckets: Annotated[int, Interval(ge=2, le=65536)] = 32
    relative_max_distance: TokenCount = 128
    memory_length: OptionalTokenCount = 0
    mask_embedding: bool = False
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh"] = "gelu_tanh"
    bias: bool = True
    bias_location: Literal["all", "attention", "qkv"] = "all"
    scale_attention: bool = True
    qk_norm: bool = False
    qk_norm_weight: bool = False
    type_vocab_size: Types = 0
    dropout: ShareBelowOne = 0.0
    tie_embeddings: bool = True
    lm_head: Literal["linear", "transform"] = "linear"
    lm_head_bias: bool = False
    lm_head_scale: PositiveFloat = 1.0
    logit_softcap: NonNegativeFloat = 0.0
    linformer_k: OptionalTokenCount = 0
    linformer_sharing: Literal["headwise", "key-value", "layerwise"] = "layerwise"
    latent_size: OptionalWidth = 0
    init_std: NonNegativeFloat = 0.02
    zero_init: bool = False
    rnn_type: Literal["", "rnn", "gru", "lstm"] = ""
    separate_directions: bool = False
    rnn_residual: bool = False
    max_characters: Types = 0
    char_filters: Width = 512

    def __post_init__(self) -> None:
        super().__post_init__()

        def fill(name: str, value: int) -> None:
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)

        check_fields(self)
        fill("num_kv_heads", self.num_heads)
        fill("head_dim", self.hidden_size // self.num_heads)
        fill("intermediate_size", self.direction_size if self.rnn_type else 4 * self.hidden_size)
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
        return self.embedding_size or (self.hidden_size // 2 if self.separate_directions else self.hidden_size)

    @property
    def description(self) -> str:
        """Short name of the architecture for messages, with its article."""
        if not self.num_layers:
            return "a table of word vectors"
        if self.rnn_type:
            name = self.rnn_type.upper()
            both = f"a bidirectional {name}" + " with separate directions" * self.separate_directions
            return f"a left-to-right {name}" if self.causal else both
        if self.num_encoder_layers:
            return "a variational autoencoder" if self.latent_size else "an encoder-decoder"
        if self.linformer_k:
            return "a Linformer"
        if self.prefix_lm:
            return "a prefix language model"
        if self.causal:
            return "a causal decoder"
        return (
            "an encoder"
            if self.lm_head == "transform" or self.mask_embedding
            else "a decoder that can attend in both directions"
        )

    @property
    def supported_patterns(self) -> frozenset[AttentionPattern]:
        """Attention patterns that the model can run."""
        if not self.num_layers:
            return frozenset({"any", "none"})
        if self.rnn_type and not self.causal:
            # With separate stacks, the last state of each direction has read the whole text.
            return frozenset(
                {"any", "bidirectional", "bidirectional_separate"}
                if self.separate_directions
                else {"any", "bidirectional"}
            )
        if self.num_encoder_layers:
            return frozenset({"any", "latent" if self.latent_size else "seq2seq"})
        if self.linformer_k:
            return frozenset({"any", "bidirectional"})
        return frozenset({"any", "causal"} if self.causal else {"any", "causal", "bidirectional", "permuted", "prefix"})

    @property
    def packable(self) -> bool:
        """Whether a row may hold several documents that do not attend to each other."""
        return not self.linformer_k and not self.latent_size

    @property
    def supports_subset(self) -> bool:
        """Whether the last block can run at a subset of the positions."""
        return not (self.rnn_type or self.linformer_k or self.num_encoder_layers) and self.num_layers > 0

    @property
    def linformer_projections(self) -> tuple[int, int]:
        """Number of separate Linformer projections: (layers, 1 or 2 for keys and values)."""
        layers = 1 if self.linformer_sharing == "layerwise" else self.num_layers
        return layers, 1 + (self.linformer_sharing == "headwise")

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
        norm="rms",
        norm_weight=False,
        norm_bias=False,
        norm_eps=1e-6,
        embedding_norm=True,
        position="rotary",
        rope_sign=-1,
        activation="relu2",
        bias=False,
        qk_norm=True,
        tie_embeddings=False,
        logit_softcap=15.0,
        init_std=0.0,
        zero_init=True,
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
        norm_bias=False,
        embedding_norm=True,
        first_attention_norm=False,
        position="rotary",
        activation="geglu",
        bias=False,
        lm_head="transform",
        lm_head_bias=True,
        init_std=0.0,
        zero_init=True,
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
        num_encoder_layers=num_layers,
        num_heads=num_heads or max(1, hidden_size // 64),
        max_positions=max_positions,
        intermediate_size=intermediate_size or 2 * hidden_size,
        norm="rms",
        norm_bias=False,
        norm_eps=1e-6,
        position="t5",
        activation="geglu_tanh",
        bias=False,
        scale_attention=False,
        tie_embeddings=False,
        init_std=0.0,
        zero_init=True,
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
        norm_placement="post",
        position="none",
        rnn_type=rnn_type,
        lm_head_bias=True,
    )


def word_vector_config(vocab_size: int, hidden_size: int) -> ModelConfig:
    """Return the configuration of word vectors: embeddings without layers (word2vec)."""
    # With init_std 0.3 rare words keep much of their initial vector; with 0.003 all vectors share a direction for long.
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=0,
        num_heads=1,
        norm_placement="post",
        position="none",
        causal=False,
        init_std=0.1,
    )
