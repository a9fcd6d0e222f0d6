"""GPT (Radford 2018): GPT-2's blocks, post-norm and without a final norm. Embeddings are always tied."""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig, NormConfig
from firth.pretrained.families import gpt2
from firth.pretrained.families.family import Family, WeightMapping, activation, module_mappings

ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
"""Its `gelu` is the tanh approximation."""


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size, "n_embd": config.hidden_size, "n_layer": config.num_layers, "n_head": config.num_heads,
        "n_positions": config.max_positions, "n_ctx": config.max_positions, "afn": theirs.get(config.activation, config.activation),
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm.eps, "initializer_range": 0.02, "tie_word_embeddings": True,
    }  # fmt: skip


def to_config(hf: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["n_embd"], num_layers=hf["n_layer"], num_heads=hf["n_head"],
        max_positions=hf["n_positions"], norm=NormConfig(placement="post", eps=hf.get("layer_norm_epsilon", 1e-5)),
        activation=activation(hf.get("afn", "gelu"), ACTIVATIONS, "afn"),  # type: ignore[arg-type]
        dropout=hf.get("resid_pdrop", 0.1),
    )  # fmt: skip


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    tables = {"tokens": "tokens_embed", "places": "positions_embed"}
    return module_mappings(tables, "", "transformer.", bias=False) + gpt2.block_mappings(config)


FAMILY = Family(
    "openai-gpt", ("OpenAIGPTLMHeadModel", "OpenAIGPTModel"), to_hf_config, to_config, weight_mappings, "transformer.",
    ignored_names=r"attn\.bias$|position_ids$", tied_names=r"^lm_head\.weight$", unused_heads=r"^score\.|^multiple_choice_head\.",
    heads=gpt2.sequence_heads("OpenAIGPT"),
)  # fmt: skip
