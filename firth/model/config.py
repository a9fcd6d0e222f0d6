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

>>> decoder_config(vocab=8192, width=384, depth=6).parameters()
16908288
>>> ModelConfig(vocab=100, width=30, depth=1, heads=4)
Traceback (most recent call last):
    ...
firth.types.UserError: shape.width=30 is not a multiple of shape.heads=4: change one of them, or state shape.head_width
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

AttentionPattern = Literal["any", "left", "both", "free", "prefix", "source", "apart", "alone", "latent"]
"""How an objective has a text read:

    any      however the trunk does
    left     each token sees what stands before it
    both     each token sees all of it
    free     in an order of the objective's own (a permutation)
    prefix   a prompt both ways, and what follows it from left to right
    source   a source by an encoder, and an answer to it from left to right
    apart    from left to right and from right to left, by two readers who do not meet
    alone    each token by itself
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
class ModelConfig(Ranged, section="shape"):
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

    vocab: TokenIds
    width: Width
    depth: Layers
    heads: Heads
    kv_heads: OptionalHeads = 0
    head_width: OptionalWidth = 0
    hidden: OptionalWidth = 0
    context: TokenCount = 1024
    embed: OptionalWidth = 0
    embed_scale: PositiveFloat = 1.0
    groups: Layers = 0
    encoder: Layers = 0
    decoder_start: Literal["pad", "eos"] = "pad"
    causal: bool = True
    prefix_lm: bool = False
    norm: Literal["layer", "rms"] = "layer"
    norm_at: Literal["pre", "post"] = "pre"
    norm_weight: bool = True
    norm_bias: bool = True
    norm_eps: Annotated[float, Range(gt=0, lt=1)] = 1e-5
    embed_norm: bool = False
    first_norm: bool = True
    position: Literal["learned", "sinusoidal", "marian", "rotary", "t5", "mpnet", "xlnet", "none"] = "learned"
    rotary_theta: PositiveFloat = 10000.0
    rotary_sign: Annotated[int, Range(ge=-1, le=1)] = 1
    rotary_scaling: Literal["none", "linear", "llama3"] = "none"
    rotary_factor: PositiveFloat = 1.0
    rotary_low: PositiveFloat = 1.0
    rotary_high: PositiveFloat = 4.0
    rotary_original: PositiveInt = 8192
    buckets: Annotated[int, Range(ge=2, le=65536)] = 32
    distance: TokenCount = 128
    memory: OptionalTokenCount = 0
    query: bool = False
    activation: Literal["gelu", "gelu_tanh", "relu", "relu2", "silu", "swiglu", "geglu", "geglu_tanh"] = "gelu_tanh"
    bias: bool = True
    bias_at: Literal["all", "attention", "qkv"] = "all"
    score_scale: bool = True
    qk_norm: bool = False
    qk_weight: bool = False
    segments: Types = 0
    dropout: ShareBelowOne = 0.0
    tied: bool = True
    head: Literal["linear", "transform"] = "linear"
    head_bias: bool = False
    head_scale: PositiveFloat = 1.0
    softcap: NonNegativeFloat = 0.0
    linformer: OptionalTokenCount = 0
    linformer_sharing: Literal["headwise", "key-value", "layerwise"] = "layerwise"
    latent: OptionalWidth = 0
    init: NonNegativeFloat = 0.02
    zero_init: bool = False
    recurrent: Literal["", "rnn", "gru", "lstm"] = ""
    apart: bool = False
    skip: bool = False
    characters: Types = 0
    filters: Width = 512

    def __post_init__(self) -> None:
        super().__post_init__()

        def fill(name: str, value: int) -> None:
            if getattr(self, name) == 0:
                object.__setattr__(self, name, value)

        check_fields(self)
        fill("kv_heads", self.heads)
        fill("head_width", self.width // self.heads)
        fill("hidden", self.stream if self.recurrent else 4 * self.width)
        check_combinations(self)

    @property
    def stream(self) -> int:
        """Width of what a recurrent direction hands on."""
        return self.width if self.causal else self.width // 2

    @property
    def gated(self) -> bool:
        """Whether the MLP has a gate beside its input map."""
        return self.activation in GATED

    @property
    def table_width(self) -> int:
        """Width of the embedding tables."""
        return self.embed or (self.width // 2 if self.apart else self.width)

    @property
    def noun(self) -> str:
        """What one would call it."""
        if not self.depth:
            return "a table of word vectors"
        if self.recurrent:
            name = self.recurrent.upper()
            article = "a" if self.recurrent == "gru" else "an"
            both = f"{article} {name} in two directions" + " apart" * self.apart
            return f"a left-to-right {name}" if self.causal else both
        if self.encoder:
            return "a variational autoencoder" if self.latent else "an encoder-decoder"
        if self.linformer:
            return "a Linformer"
        if self.prefix_lm:
            return "a prefix language model"
        if self.causal:
            return "a causal decoder"
        return "an encoder" if self.head == "transform" or self.query else "a decoder that may read both ways"

    @property
    def honours(self) -> frozenset[AttentionPattern]:
        """The ways of reading that the trunk can do."""
        if not self.depth:
            return frozenset({"any", "alone"})
        if self.recurrent and not self.causal:
            # Stacks that are apart have both read all of a text by its ends.
            return frozenset({"any", "both", "apart"} if self.apart else {"any", "both"})
        if self.encoder:
            return frozenset({"any", "latent" if self.latent else "source"})
        if self.linformer:
            return frozenset({"any", "both"})
        return frozenset({"any", "left"} if self.causal else {"any", "left", "both", "free", "prefix"})

    @property
    def packs(self) -> bool:
        """Whether a row may hold several documents that do not see each other."""
        return not self.linformer and not self.latent

    @property
    def narrows(self) -> bool:
        """Whether the last block can be run for some tokens of a row alone."""
        return not (self.recurrent or self.linformer or self.encoder) and self.depth > 0

    @property
    def projections(self) -> tuple[int, int]:
        """Layers and sides (keys, values) that a Linformer projects apart."""
        layers = 1 if self.linformer_sharing == "layerwise" else self.depth
        return layers, 1 + (self.linformer_sharing == "headwise")

    def parameters(self) -> int:
        """Number of parameters of the model with its vocabulary head, exactly; a tied head counts once."""
        return num_parameters(self)


def decoder_config(
    vocab: int, width: int, depth: int, heads: int = 0, context: int = 1024, hidden: int = 0
) -> ModelConfig:
    """The default decoder, a NanoChat: what learns fastest here per second (docs/results.md). heads 0: width / 64."""
    return ModelConfig(
        vocab=vocab, width=width, depth=depth, heads=heads or max(1, width // 64), context=context, hidden=hidden,
        norm="rms", norm_weight=False, norm_bias=False, norm_eps=1e-6, embed_norm=True, position="rotary",
        rotary_sign=-1, activation="relu2", bias=False, qk_norm=True, tied=False, softcap=15.0, init=0.0, zero_init=True,
    )  # fmt: skip


def encoder_config(
    vocab: int, width: int, depth: int, heads: int = 0, context: int = 1024, hidden: int = 0
) -> ModelConfig:
    """The default encoder, a ModernBERT with full attention in every layer."""
    return ModelConfig(
        vocab=vocab, width=width, depth=depth, heads=heads or max(1, width // 64), context=context,
        hidden=hidden or 2 * width, causal=False, norm_bias=False, embed_norm=True, first_norm=False, position="rotary",
        activation="geglu", bias=False, head="transform", head_bias=True, init=0.0, zero_init=True,
    )  # fmt: skip


def encoder_decoder_config(
    vocab: int, width: int, depth: int, heads: int = 0, context: int = 1024, hidden: int = 0
) -> ModelConfig:
    """The default encoder-decoder, a T5 v1.1 with `depth` blocks on each side."""
    return ModelConfig(
        vocab=vocab, width=width, depth=depth, encoder=depth, heads=heads or max(1, width // 64), context=context,
        hidden=hidden or 2 * width, norm="rms", norm_bias=False, norm_eps=1e-6, position="t5",
        activation="geglu_tanh", bias=False, score_scale=False, tied=False, init=0.0, zero_init=True,
    )  # fmt: skip


def recurrent_config(
    vocab: int, width: int, depth: int, kind: Literal["rnn", "gru", "lstm"] = "lstm", context: int = 1024
) -> ModelConfig:
    """The default recurrent language model: embeddings, layers from left to right, and a head tied to the embeddings."""
    return ModelConfig(
        vocab=vocab, width=width, depth=depth, heads=1, context=context, norm_at="post", position="none",
        recurrent=kind, head_bias=True,
    )  # fmt: skip


def word_vector_config(vocab: int, width: int) -> ModelConfig:
    """A vector for each word and nothing else: what word2vec learns."""
    # From 0.3 rare words keep much of what they began as; from 0.003 all vectors point one way for long.
    return ModelConfig(
        vocab=vocab, width=width, depth=0, heads=1, norm_at="post", position="none", causal=False, init=0.1
    )
