"""Qwen2 (Yang 2024) and Qwen3 (Yang 2025): Llama's layout.

Qwen2 has biases in the query, key and value projections. Qwen3 applies RMSNorm with a gain to queries and keys before the
rotary embedding, and its head_dim may differ from hidden_size / num_heads. The published models do not use their sliding
window; a config that does is rejected.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import llama

DEFAULTS = {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096}


def without_window(hf: dict[str, Any]) -> dict[str, Any]:
    """Return a hf with its defaults as a Llama's; raise a UserError if its sliding window has an effect."""
    hf = DEFAULTS | hf
    llama.check_sliding_window(hf, hf["sliding_window"] if hf["use_sliding_window"] else None)
    return hf | {"mlp_bias": False}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **llama.to_hf_config(config),
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * config.num_layers,
    }


def to_qwen2_config(hf: dict[str, Any]) -> ModelConfig:
    return replace(llama.to_config(without_window(hf) | {"attention_bias": True}), bias_location="qkv")


def to_qwen3_config(hf: dict[str, Any]) -> ModelConfig:
    return llama.to_config({"head_dim": 128} | without_window(hf)).with_fields(
        {"attention.qk_norm": True, "attention.qk_norm_weight": True}
    )


QWEN2 = llama.llama_like("qwen2", "Qwen2", to_hf_config, to_qwen2_config)
QWEN3 = llama.llama_like("qwen3", "Qwen3", to_hf_config, to_qwen3_config)
