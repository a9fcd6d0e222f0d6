"""GPT (Radford 2018): GPT-2's blocks with the norm behind each branch and none at the end. Always tied."""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import gpt2
from firth.pretrained.families.family import Family, WeightMapping, activation, both

ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
"""What they call gelu is its tanh form."""


def config(model_config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": model_config.vocab_size, "n_embd": model_config.hidden_size, "n_layer": model_config.num_layers, "n_head": model_config.num_heads,
        "n_positions": model_config.max_positions, "n_ctx": model_config.max_positions, "afn": theirs.get(model_config.activation, model_config.activation),
        "resid_pdrop": model_config.dropout, "embd_pdrop": model_config.dropout, "attn_pdrop": model_config.dropout,
        "layer_norm_epsilon": model_config.norm_eps, "initializer_range": 0.02, "tie_word_embeddings": True,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab_size=config["vocab_size"], hidden_size=config["n_embd"], num_layers=config["n_layer"], num_heads=config["n_head"],
        max_positions=config["n_positions"], norm_placement="post", norm_eps=config.get("layer_norm_epsilon", 1e-5),
        activation=activation(config.get("afn", "gelu"), ACTIVATIONS, "afn"),  # type: ignore[arg-type]
        dropout=config.get("resid_pdrop", 0.1),
    )  # fmt: skip


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    tables = {"tokens": "tokens_embed", "places": "positions_embed"}
    return both(tables, "", "transformer.", bias=False) + gpt2.blocks(config)


FAMILY = Family(
    "openai-gpt", ("OpenAIGPTLMHeadModel", "OpenAIGPTModel"), config, shape, entries, "transformer.",
    spare=r"attn\.bias$|position_ids$", tied=r"^lm_head\.weight$", unused=r"^score\.|^multiple_choice_head\.",
    heads=gpt2.scored("OpenAIGPT"),
)  # fmt: skip
