"""GPT (Radford 2018): GPT-2's blocks with the norm behind each branch and none at the end. Always tied."""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import gpt2
from firth.pretrained.families.family import Family, WeightMapping, activation, both

ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
"""What they call gelu is its tanh form."""


def config(shape: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": shape.vocab, "n_embd": shape.width, "n_layer": shape.depth, "n_head": shape.heads,
        "n_positions": shape.context, "n_ctx": shape.context, "afn": theirs.get(shape.activation, shape.activation),
        "resid_pdrop": shape.dropout, "embd_pdrop": shape.dropout, "attn_pdrop": shape.dropout,
        "layer_norm_epsilon": shape.norm_eps, "initializer_range": 0.02, "tie_word_embeddings": True,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab=config["vocab_size"], width=config["n_embd"], depth=config["n_layer"], heads=config["n_head"],
        context=config["n_positions"], norm_at="post", norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation(config.get("afn", "gelu"), ACTIVATIONS, "afn"),  # type: ignore[arg-type]
        dropout=config.get("resid_pdrop", 0.1),
    )  # fmt: skip


def entries(shape: ModelConfig, head: bool) -> list[WeightMapping]:
    tables = {"tokens": "tokens_embed", "places": "positions_embed"}
    return both(tables, "", "transformer.", bias=False) + gpt2.blocks(shape)


FAMILY = Family(
    "openai-gpt", ("OpenAIGPTLMHeadModel", "OpenAIGPTModel"), config, shape, entries, "transformer.",
    spare=r"attn\.bias$|position_ids$", tied=r"^lm_head\.weight$", unused=r"^score\.|^multiple_choice_head\.",
    headed=gpt2.scored("OpenAIGPT"),
)  # fmt: skip
