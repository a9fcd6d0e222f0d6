"""An architecture is a `Shape`: a few numbers and choices, from which `LM` builds the model.

The published families are points in this space, not classes:

    BERT        causal off, norm_at="post", position="learned", segments=2, embed_norm, head="transform", head_bias
    GPT-2       position="learned", activation="gelu_tanh", tied
    Llama       norm="rms", norm_bias off, position="rotary", activation="swiglu", bias off
    T5          encoder=12, norm="rms", position="t5", activation="relu" or "geglu_tanh", score_scale off
    ALBERT      BERT's, embed=128, groups=1 (one block for all layers)
    ELECTRA     BERT's, embed=128 (small)
    BART        encoder=12, norm_at="post", position="learned", activation="gelu", embed_norm, head_bias, decoder_start="eos"
    Marian      BART's, position="marian", embed_norm off, embed_scale=width ** 0.5, decoder_start="pad"
    NanoChat    norm="rms", norm_weight off, embed_norm, qk_norm, activation="relu2", softcap=15, rotary_sign=-1
    XLNet       causal off, norm_at="post", position="xlnet", query, segments=2, memory=384, head_bias
    RoBERTa     BERT's, segments=1;   DistilBERT: segments=0
    Qwen2       Llama's, bias, bias_at="qkv";   Qwen3: qk_norm, qk_weight;   Mistral: Llama's
    MPNet       causal off, norm_at="post", position="mpnet", embed_norm, head="transform", head_bias
    ModernBERT  causal off, norm_bias off, embed_norm, first_norm off, position="rotary", activation="geglu", head="transform"
    ELMo        recurrent="lstm", apart, skip, hidden=4096, characters=50, filters=2048, causal off, tied off
    word2vec    depth=0

>>> decoder_config(vocab_size=8192, hidden_size=384, num_layers=6).num_parameters()
16908288
>>> ModelConfig(vocab_size=100, hidden_size=30, num_layers=1, num_heads=4)
Traceback (most recent call last):
    ...
firth.types.UserError: model.hidden_size=30 is not a multiple of model.num_heads=4: change one of them, or state model.head_dim
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from firth.model.config_checks import check_combinations, check_fields
from firth.model.parameter_count import GATED, num_parameters
from firth.validated import (
    NonNegativeFloat,
    OptionalTokenCount,
    PositiveFloat,
    PositiveInt,
    Range,
    Ranged,
    ShareBelowOne,
    TokenCount,
)

AttentionPattern = Literal[
    "any", "causal", "bidirectional", "permuted", "prefix", "seq2seq", "bidirectional_separate", "none", "latent"
]
"""How an objective has a text read:

    any      however the trunk does
    causal   each token sees what stands before it
    bidirectional  each token sees all of it
    permuted in an order of the objective's own (a permutation)
    prefix   a prompt both ways, and what follows it from left to right
    seq2seq  a source by an encoder, and an answer to it from left to right
    bidirectional_separate  from left to right and from right to left, by two readers who do not meet
    none     each token by itself
    latent   a source by an encoder and itself again by a decoder, with nothing but a latent between the two
"""


Width = Annotated[int, Range(ge=1, le=1 << 20)]
OptionalWidth = Annotated[int, Range(ge=0, le=1 << 20)]
Heads = Annotated[int, Range(ge=1, le=1 << 16)]
OptionalHeads = Annotated[int, Range(ge=0, le=1 << 16)]
Layers = Annotated[int, Range(ge=0, le=10_000)]
Types = Annotated[int, Range(ge=0, le=1 << 16)]
TokenIds = Annotated[int, Range(ge=1, lt=1 << 31)]
"""The sizes of a model. The upper bounds are fifty times those of any published one: a larger number is a slip of the pen."""


@dataclass(frozen=True)
class ModelConfig(Ranged, section="model"):
    """Everything about an architecture; the defaults are GPT-2's. Raises UserError when the numbers do not fit.

    vocab: number of token ids. width: size of a hidden state. depth: number of blocks in the trunk.
    heads, kv_heads (0: as many as heads), head_width (0: width / heads). hidden: inner size of the MLP (0: 4 width).
    context: longest row it is meant for; a hard limit with learned positions only.
    embed: width of the token, position and segment tables, which one matrix then takes to `width`; 0: tables of `width`. A
    head that is tied to such a table reads back to its width first (head="transform"; ALBERT, Lan 2020, section 3.1).
    embed_scale: multiplies the token vectors, but not a head tied to them (Vaswani 2017, section 3.4: width ** 0.5).
    groups: how many blocks have weights of their own: consecutive layers share those of one (ALBERT: 1); 0: every layer.
    encoder: number of blocks of a separate encoder; above 0 every trunk block has cross-attention, and learned positions
    have a table for each side. decoder_start: the role of the token that its answers begin behind (T5: pad; BART: eos).
    causal: whether a position may be shown only what stands before it. Attention goes by the batch's integers either way:
    this is what may be asked of the model (`honours`) and what others will take it for (a GPT-2 reads to the left).
    prefix_lm: whether what such a model goes on from is read both ways, and only what it writes from left to right (Raffel
    2020, section 3.2.1). A run sets it by its objective; no published family says it, so only firth loads such a model.
    norm_weight, norm_bias: whether norms have a gain and an offset. embed_norm: a norm on the embeddings.
    first_norm: False leaves out the first block's norm before attention (ModernBERT).
    position: how order enters. "marian" is "sinusoidal" with all sines before all cosines, as most code has it; "mpnet" is both
    "learned" and "t5"; "xlnet" is three offsets and a map of the distance in every block, in place of attention's biases
    (`firth.model.relative_distance`), and segments are then told apart there and not in the embeddings.
    rotary_theta: base of the wavelengths of "rotary". rotary_sign: -1 turns the other way (NanoChat).
    rotary_scaling: how a model is read beyond the rows it was trained on: "linear" makes all wavelengths `rotary_factor`
    times as long (Chen 2023); "llama3" only those of which fewer than `rotary_low` fit into `rotary_original` tokens,
    none of which more than `rotary_high` fit, and in between in proportion (Llama 3.1).
    buckets, distance: T5's relative positions. memory: tokens before a row whose states it reads (XLNet alone).
    query: a learned vector of its own stands where nobody can look, whatever the token (XLNet's w); else the token's.
    score_scale: whether scores are divided by sqrt(head_width).
    bias: whether the linear maps of the blocks have one. bias_at: which of them, where not all: those of attention, or
    those that make queries, keys and values (Qwen2). qk_norm: unit-RMS queries and keys. qk_weight: with a gain for each
    number of a head (Qwen3).
    segments: number of segment types, 0 for none. dropout: on embeddings, attention weights and each branch's output.
    tied: the vocabulary head uses the token embedding. head: "linear", or "transform" for a dense layer,
    an activation and a norm before it (BERT, appendix of the code). head_bias: an offset per token id.
    head_scale: multiplies the states before the head (T5 v1.0: width ** -0.5). softcap: logits are
    softcap * tanh(logits / softcap); 0 for none (Gemma 2).
    linformer: keys and values are projected along the row into this many slots, 0 for none; an encoder's only, whose rows
    are one document of at most `context` tokens. linformer_sharing: "headwise" projects keys and values of each layer apart,
    "key-value" alike, "layerwise" in all layers alike (Wang 2020, section 4).
    latent: numbers in a Gaussian latent that is all an encoder tells its decoder (a VAE), 0 for none.
    init: standard deviation of the initial matrices, 0 for 1 / sqrt(fan in). zero_init: the two matrices that
    write into the residual stream start at zero, so that a block starts as the identity.
    recurrent: recurrent layers (Elman 1990, Cho 2014, Hochreiter 1997) in the place of attention blocks; `depth` of them,
    read from left to right if `causal`, else in two directions of width / 2 each. What a block is made of (heads, norms,
    zero_init) says nothing then and is refused; `hidden` is the number of cells of a direction (0: as wide as what it
    hands on; more than that for an LSTM with a projection, Sak 2014). apart: the two directions are stacks of their own,
    over embeddings of width / 2 (ELMo). skip: from the second layer on, what goes into a layer is added to what comes out.
    characters: above 0, no table of tokens: a convolution over the first so many bytes of each token's spelling (Kim 2016),
    with `filters` filters, a multiple of 64 (`firth.model.characters`). A depth of 0 is the embeddings alone.
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
    norm_eps: Annotated[float, Range(gt=0, lt=1)] = 1e-5
    embedding_norm: bool = False
    first_attention_norm: bool = True
    position: Literal["learned", "sinusoidal", "marian", "rotary", "t5", "mpnet", "xlnet", "none"] = "learned"
    rope_theta: PositiveFloat = 10000.0
    rope_sign: Annotated[int, Range(ge=-1, le=1)] = 1
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: PositiveFloat = 1.0
    rope_low_freq_factor: PositiveFloat = 1.0
    rope_high_freq_factor: PositiveFloat = 4.0
    rope_original_max_positions: PositiveInt = 8192
    relative_buckets: Annotated[int, Range(ge=2, le=65536)] = 32
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
        """Width of what a recurrent direction hands on."""
        return self.hidden_size if self.causal else self.hidden_size // 2

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside its input map."""
        return self.activation in GATED

    @property
    def embedding_dim(self) -> int:
        """Width of the embedding tables."""
        return self.embedding_size or (self.hidden_size // 2 if self.separate_directions else self.hidden_size)

    @property
    def description(self) -> str:
        """What one would call it."""
        if not self.num_layers:
            return "a table of word vectors"
        if self.rnn_type:
            name = self.rnn_type.upper()
            article = "a" if self.rnn_type == "gru" else "an"
            both = f"{article} {name} in two directions" + " apart" * self.separate_directions
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
            "an encoder" if self.lm_head == "transform" or self.mask_embedding else "a decoder that may read both ways"
        )

    @property
    def supported_patterns(self) -> frozenset[AttentionPattern]:
        """The ways of reading that the trunk can do."""
        if not self.num_layers:
            return frozenset({"any", "none"})
        if self.rnn_type and not self.causal:
            # Stacks that are apart have both read all of a text by its ends.
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
        """Whether a row may hold several documents that do not see each other."""
        return not self.linformer_k and not self.latent_size

    @property
    def supports_subset(self) -> bool:
        """Whether the last block can be run for some tokens of a row alone."""
        return not (self.rnn_type or self.linformer_k or self.num_encoder_layers) and self.num_layers > 0

    @property
    def linformer_projections(self) -> tuple[int, int]:
        """Layers and sides (keys, values) that a Linformer projects apart."""
        layers = 1 if self.linformer_sharing == "layerwise" else self.num_layers
        return layers, 1 + (self.linformer_sharing == "headwise")

    def num_parameters(self) -> int:
        """Number of parameters of the model with its vocabulary head, exactly; a tied head counts once."""
        return num_parameters(self)


def decoder_config(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int = 0,
    max_positions: int = 1024,
    intermediate_size: int = 0,
) -> ModelConfig:
    """The default decoder, a NanoChat: what learns fastest here per second (docs/results/index.md). heads 0: width / 64."""
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads or max(1, hidden_size // 64), max_positions=max_positions, intermediate_size=intermediate_size,
        norm="rms", norm_weight=False, norm_bias=False, norm_eps=1e-6, embedding_norm=True, position="rotary",
        rope_sign=-1, activation="relu2", bias=False, qk_norm=True, tie_embeddings=False, logit_softcap=15.0, init_std=0.0, zero_init=True,
    )  # fmt: skip


def encoder_config(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int = 0,
    max_positions: int = 1024,
    intermediate_size: int = 0,
) -> ModelConfig:
    """The default encoder, a ModernBERT with full attention in every layer."""
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers, num_heads=num_heads or max(1, hidden_size // 64), max_positions=max_positions,
        intermediate_size=intermediate_size or 2 * hidden_size, causal=False, norm_bias=False, embedding_norm=True, first_attention_norm=False, position="rotary",
        activation="geglu", bias=False, lm_head="transform", lm_head_bias=True, init_std=0.0, zero_init=True,
    )  # fmt: skip


def encoder_decoder_config(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int = 0,
    max_positions: int = 1024,
    intermediate_size: int = 0,
) -> ModelConfig:
    """The default encoder-decoder, a T5 v1.1 with `depth` blocks on each side."""
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers, num_encoder_layers=num_layers, num_heads=num_heads or max(1, hidden_size // 64), max_positions=max_positions,
        intermediate_size=intermediate_size or 2 * hidden_size, norm="rms", norm_bias=False, norm_eps=1e-6, position="t5",
        activation="geglu_tanh", bias=False, scale_attention=False, tie_embeddings=False, init_std=0.0, zero_init=True,
    )  # fmt: skip


def recurrent_config(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    rnn_type: Literal["rnn", "gru", "lstm"] = "lstm",
    max_positions: int = 1024,
) -> ModelConfig:
    """The default recurrent language model: embeddings, layers from left to right, and a head tied to the embeddings."""
    return ModelConfig(
        vocab_size=vocab_size, hidden_size=hidden_size, num_layers=num_layers, num_heads=1, max_positions=max_positions, norm_placement="post", position="none",
        rnn_type=rnn_type, lm_head_bias=True,
    )  # fmt: skip


def word_vector_config(vocab_size: int, hidden_size: int) -> ModelConfig:
    """A vector for each word and nothing else: what word2vec learns."""
    # From 0.3 rare words keep much of what they began as; from 0.003 all vectors point one way for long.
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
