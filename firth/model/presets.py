"""Configurations of published models, as in their papers and released checkpoints.

    preset                  parameters        from
    gpt                     117 M             Radford 2018, section 4.1
    gpt2 ... gpt2-xl        124 M to 1.56 B   Radford 2019, table 2 (its 117 M and 345 M are miscounts: 124 M and 355 M)
    chinchilla              70 B              Hoffmann 2022, table 4: Gopher's architecture (see `transformer_xl`)
    gpt3                    175 B             Brown 2020, table 2.1 (dense attention in all layers; theirs alternates with sparse)
    bert-base, bert-large   110 M, 340 M      Devlin 2019, section 3, with the pooler
    roberta-base, -large    125 M, 355 M      Liu 2019, section 2 and 5, with one token type, as released
    distilbert-base         66 M              Sanh 2019, table 3, without the head
    xlnet-base, xlnet-large 117 M, 361 M      Yang 2019, appendix A.4, and the released base
    mpnet-base              110 M             Song 2020, section 3.1 (BERT-base with relative positions)
    spanbert                334 M             Joshi 2020: BERT-large with its cased vocabulary
    albert-base ...         12, 18, 60, 223 M Lan 2020, table 1, with the pooler (its 235 M for the last is 223 M as released)
    electra-small, -base    14 M, 110 M       Clark 2020, table 6: the discriminator
    t5-small ... t5-11b     61 M to 11 B      Raffel 2020, section 3.7 (there 60 M, 220 M, 770 M, 3 B, 11 B)
    bart-base, bart-large   139 M, 406 M      Lewis 2019, section 2.1 (base) and 5 (large)
    llama-7b                6.7 B             Touvron 2023, table 2

>>> from firth.model.flops import num_parameters
>>> f"{num_parameters(PRESETS['gpt2-xl']):,}"
'1,557,611,200'
"""

from __future__ import annotations

from firth.model.config import ModelConfig
from firth.model.config_groups import (
    AttentionConfig,
    EmbeddingConfig,
    EncoderConfig,
    InitConfig,
    LMHeadConfig,
    NormConfig,
    PositionConfig,
)


def gpt(vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_positions: int = 512) -> ModelConfig:
    """Return GPT: a decoder with the norm after each branch, learned positions, a tied head (Radford 2018)."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        max_positions=max_positions,
        norm=NormConfig(placement="post"),
        dropout=0.1,
    )


def gpt2(vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_positions: int = 1024) -> ModelConfig:
    """Return GPT-2: the norm before each branch and a final norm (Radford 2019, section 2.3)."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        max_positions=max_positions,
        dropout=0.1,
    )


def transformer_xl(
    hidden_size: int, num_layers: int, num_heads: int, head_dim: int, vocab_size: int = 32000, max_positions: int = 2048
) -> ModelConfig:
    """Return Gopher's architecture: RMSNorm before each branch, relative positions as in Transformer-XL, a tied embedding
    of 32,000 tokens (Rae 2021, section 2.1; Hoffmann 2022, section 4.1).

    The paper states no more, and no weights were released. Its parameter counts agree with this interpretation: with a
    distance projection in each layer, biases in the MLP and the two of the scores, this function gives 46 of the 50 sizes of
    its table A9 to the million, and the others to 0.7 million (16,183 M for 47 layers of 5,120; without the projections
    14,951 M). The activation is not stated.
    """
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        head_dim=head_dim,
        max_positions=max_positions,
        norm=NormConfig("rms", bias=False, eps=1e-6),
        position=PositionConfig("xlnet"),
        activation="gelu",
    )


def llama(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    intermediate_size: int,
    max_positions: int = 2048,
    num_kv_heads: int = 0,
) -> ModelConfig:
    """Return Llama: RMSNorm, SwiGLU, rotary positions, no biases, an untied head (Touvron 2023, section 2.2)."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        intermediate_size=intermediate_size,
        max_positions=max_positions,
        norm=NormConfig("rms", bias=False, eps=1e-6),
        position=PositionConfig("rotary"),
        activation="swiglu",
        bias=False,
        tie_embeddings=False,
    )


def bert(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    max_positions: int = 512,
    type_vocab_size: int = 2,
) -> ModelConfig:
    """Return BERT: an encoder with the norm after each branch, learned positions and token types (Devlin 2019, section 3)."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        max_positions=max_positions,
        causal=False,
        embedding=EmbeddingConfig(type_vocab_size=type_vocab_size),
        norm=NormConfig(placement="post", eps=1e-12, embedding=True),
        activation="gelu",
        dropout=0.1,
        lm_head=LMHeadConfig("transform", bias=True),
    )


def xlnet(
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    max_positions: int = 512,
    memory_length: int = 384,
) -> ModelConfig:
    """Return XLNet: post-norm, relative positions and token types, a memory, a learned query vector (Yang 2019, section 2)."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        max_positions=max_positions,
        causal=False,
        norm=NormConfig(placement="post", eps=1e-12),
        position=PositionConfig("xlnet"),
        embedding=EmbeddingConfig(mask=True, type_vocab_size=2),
        attention=AttentionConfig(memory_length=memory_length),
        activation="gelu",
        dropout=0.1,
        lm_head=LMHeadConfig(bias=True),
    )


def mpnet(vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_positions: int = 512) -> ModelConfig:
    """Return MPNet: BERT without token types, with T5's relative bias on top of its positions (Song 2020, section 3.1)."""
    return bert(vocab_size, hidden_size, num_layers, num_heads, max_positions, type_vocab_size=0).with_fields(
        {"position.type": "mpnet"}
    )


def albert(hidden_size: int, num_layers: int, num_heads: int, vocab_size: int = 30000) -> ModelConfig:
    """Return ALBERT: BERT with one block for all layers, embeddings of width 128 and GELU in its tanh form (Lan 2020, section 3.1)."""
    config = bert(vocab_size, hidden_size, num_layers, num_heads)
    return config.with_fields({"embedding.size": 128, "num_layer_groups": 1, "activation": "gelu_tanh"})


def electra(hidden_size: int, num_heads: int, embedding_size: int = 0) -> ModelConfig:
    """Return ELECTRA: BERT with twelve blocks, and embeddings of `embedding_size` if it is not 0 (Clark 2020, table 6)."""
    return bert(30522, hidden_size, 12, num_heads).with_fields({"embedding.size": embedding_size})


def t5(
    vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, head_dim: int, intermediate_size: int
) -> ModelConfig:
    """Return T5 1.0: an encoder-decoder with relative positions, ReLU and a tied, scaled head (Raffel 2020, section 2.1)."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        encoder=EncoderConfig(num_layers=num_layers),
        num_heads=num_heads,
        head_dim=head_dim,
        intermediate_size=intermediate_size,
        max_positions=512,
        norm=NormConfig("rms", bias=False, eps=1e-6),
        position=PositionConfig("t5"),
        activation="relu",
        bias=False,
        attention=AttentionConfig(scale_scores=False),
        lm_head=LMHeadConfig(scale=hidden_size**-0.5),
        dropout=0.1,
        init=InitConfig(std=0.0),
    )


def bart(vocab_size: int, hidden_size: int, num_layers: int, num_heads: int, max_positions: int = 1024) -> ModelConfig:
    """Return BART: an encoder-decoder with the norm after each branch and learned positions (Lewis 2019, section 2.1)."""
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        encoder=EncoderConfig(num_layers=num_layers, decoder_start_token="eos"),
        num_heads=num_heads,
        max_positions=max_positions,
        norm=NormConfig(placement="post", embedding=True),
        activation="gelu",
        dropout=0.1,
        lm_head=LMHeadConfig(bias=True),
    )


PRESETS: dict[str, ModelConfig] = {
    "gpt": gpt(40478, 768, 12, 12),
    "gpt2": gpt2(50257, 768, 12, 12),
    "gpt2-medium": gpt2(50257, 1024, 24, 16),
    "gpt2-large": gpt2(50257, 1280, 36, 20),
    "gpt2-xl": gpt2(50257, 1600, 48, 25),
    "gpt3": gpt2(50257, 12288, 96, 96, max_positions=2048),
    "chinchilla": transformer_xl(8192, 80, 64, 128),
    "bert-base": bert(30522, 768, 12, 12),
    "bert-large": bert(30522, 1024, 24, 16),
    "roberta-base": bert(50265, 768, 12, 12, type_vocab_size=1),
    "roberta-large": bert(50265, 1024, 24, 16, type_vocab_size=1),
    "distilbert-base": bert(30522, 768, 6, 12, type_vocab_size=0),
    "xlnet-base": xlnet(32000, 768, 12, 12),
    "xlnet-large": xlnet(32000, 1024, 24, 16),
    "mpnet-base": mpnet(30527, 768, 12, 12),
    "spanbert": bert(28996, 1024, 24, 16),
    "albert-base": albert(768, 12, 12),
    "albert-large": albert(1024, 24, 16),
    "albert-xlarge": albert(2048, 24, 16),
    "albert-xxlarge": albert(4096, 12, 64),
    "electra-small": electra(256, 4, embedding_size=128),
    "electra-base": electra(768, 12),
    "t5-small": t5(32128, 512, 6, 8, 64, 2048),
    "t5-base": t5(32128, 768, 12, 12, 64, 3072),
    "t5-large": t5(32128, 1024, 24, 16, 64, 4096),
    "t5-3b": t5(32128, 1024, 24, 32, 128, 16384),
    "t5-11b": t5(32128, 1024, 24, 128, 128, 65536),
    "bart-base": bart(50265, 768, 6, 12),
    "bart-large": bart(50265, 1024, 12, 16),
    "llama-7b": llama(32000, 4096, 32, 32, 11008),
}
"""Name -> configuration, with the vocabulary size of the released tokenizer (T5's rounded up to 32,128)."""
