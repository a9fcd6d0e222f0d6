"""Mistral (Jiang 2023): Llama's layout. The first version has a sliding window of 4,096 tokens.

Later versions have no window and are written as Llamas; a config with an effective window is rejected.
"""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import llama

DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {**llama.to_hf_config(config), "sliding_window": None}


def to_config(hf: dict[str, Any]) -> ModelConfig:
    hf = DEFAULTS | hf
    llama.check_sliding_window(hf, hf["sliding_window"])
    return llama.to_config(hf | {"attention_bias": False, "mlp_bias": False})


FAMILY = llama.llama_like("mistral", "Mistral", to_hf_config, to_config, qa_prefix=None)
