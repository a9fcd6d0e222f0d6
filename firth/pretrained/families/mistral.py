"""Mistral (Jiang 2023): Llama's layout, whose first version let each token see a window of 4,096 tokens only.

Later versions have no window and are Llamas, under whose name they are written; one with a window is refused.
"""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import llama

DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


def config(model_config: ModelConfig) -> dict[str, Any]:
    return {**llama.config(model_config), "sliding_window": None}


def shape(config: dict[str, Any]) -> ModelConfig:
    said = DEFAULTS | config
    llama.whole(said, said["sliding_window"])
    return llama.shape(said | {"attention_bias": False, "mlp_bias": False})


FAMILY = llama.kin("mistral", "Mistral", config, shape, within=None)
