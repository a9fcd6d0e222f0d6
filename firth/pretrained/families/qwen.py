"""Qwen2 (Yang 2024) and Qwen3 (Yang 2025): Llama's layout.

Qwen2 has biases where queries, keys and values are made. Qwen3 makes queries and keys unit RMS, with a gain, before they
are turned, and may have heads of another width than width / heads. Their sliding windows are off as published; one that is
on is refused.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import llama

DEFAULTS = {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096}


def windowless(config: dict[str, Any]) -> dict[str, Any]:
    said = DEFAULTS | config
    llama.whole(said, said["sliding_window"] if said["use_sliding_window"] else None)
    return said | {"mlp_bias": False}


def config(model_config: ModelConfig) -> dict[str, Any]:
    return {
        **llama.config(model_config),
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * model_config.num_layers,
    }


def shape2(config: dict[str, Any]) -> ModelConfig:
    return replace(llama.shape(windowless(config) | {"attention_bias": True}), bias_location="qkv")


def shape3(config: dict[str, Any]) -> ModelConfig:
    return replace(llama.shape({"head_dim": 128} | windowless(config)), qk_norm=True, qk_norm_weight=True)


QWEN2 = llama.kin("qwen2", "Qwen2", config, shape2)
QWEN3 = llama.kin("qwen3", "Qwen3", config, shape3)
