"""Llama and the decoders with its layout: Mistral, Qwen2 and Qwen3.

Llama (Touvron 2023): RMSNorm, rotary positions, SwiGLU, grouped-query attention, no biases. SmolLM2 is a Llama.

The others differ only in config fields (`llama_like`).

Mistral (Jiang 2023): the first version has a sliding window of 4,096 tokens. Later versions have no window and are written
as Llamas; a config with an effective window is rejected.

Qwen2 (Yang 2024) and Qwen3 (Yang 2025): Qwen2 has biases in the query, key and value projections. Qwen3 applies RMSNorm
with a gain to queries and keys before the rotary embedding, and its head_dim may differ from hidden_size / num_heads. The
published models do not use their sliding window; a config that does is rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from firth.model.config import ModelConfig
from firth.model.config_groups import NormConfig, PositionConfig
from firth.pretrained.families import bert
from firth.pretrained.families.family import (
    Family,
    HeadSpec,
    WeightMapping,
    activation,
    module_mappings,
    rope,
    rope_fields,
)
from firth.pretrained.families.gpt2 import sequence_heads
from firth.types import UserError

ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "gelu_new": "geglu_tanh", "gelu_pytorch_tanh": "geglu_tanh"}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads, "head_dim": config.head_dim,
        "intermediate_size": config.intermediate_size, "hidden_act": theirs.get(config.activation, config.activation),
        "max_position_embeddings": config.max_positions, "rms_norm_eps": config.norm.eps, "attention_bias": config.bias,
        "mlp_bias": config.bias and config.bias_location == "all", "attention_dropout": config.dropout, "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
    } | rope_fields(config)  # fmt: skip


def to_config(hf: dict[str, Any]) -> ModelConfig:
    heads, bias = hf["num_attention_heads"], hf.get("attention_bias", False)
    if hf.get("mlp_bias", False) and not bias:
        raise UserError(
            "config.json has mlp_bias without attention_bias; firth supports biases everywhere or in attention alone"
        )
    everywhere = hf.get("mlp_bias", False) or not bias
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"], num_layers=hf["num_hidden_layers"], num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads, head_dim=hf.get("head_dim") or 0,
        intermediate_size=hf["intermediate_size"], max_positions=hf["max_position_embeddings"],
        norm=NormConfig("rms", bias=False, eps=hf.get("rms_norm_eps", 1e-6)), position=PositionConfig("rotary", rope(hf, 10000.0)),
        activation=activation(hf.get("hidden_act", "silu"), ACTIVATIONS, "hidden_act"),  # type: ignore[arg-type]
        bias=bias, bias_location="all" if everywhere else "attention", dropout=hf.get("attention_dropout", 0.0),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )  # fmt: skip


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = module_mappings({"tokens": "embed_tokens", "stack.norm": "norm"}, "", "model.", bias=False)
    maps = {
        "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    bias_locations = {"all": (*"qkvo", "gate", "up", "down"), "attention": "qkvo", "qkv": "qkv"}[config.bias_location]
    gains = {"attention.q_gain": "q_norm", "attention.k_gain": "k_norm"} if config.attention.qk_norm_weight else {}
    for i in range(config.num_layers):
        for ours, theirs in maps.items():
            bias = config.bias and ours.rpartition(".")[2] in bias_locations
            out += module_mappings({ours: theirs}, f"stack.blocks.{i}.", f"model.layers.{i}.", bias=bias)
        for ours, theirs in gains.items():
            out.append(WeightMapping(f"model.layers.{i}.self_attn.{theirs}.weight", (f"stack.blocks.{i}.{ours}",)))
        out += module_mappings(norms, f"stack.blocks.{i}.", f"model.layers.{i}.", bias=False)
    return out + [WeightMapping("lm_head.weight", ("heads.lm.weight",))] * (head and not config.tie_embeddings)


def llama_like(
    model_type: str,
    name: str,
    to_hf_config: Callable[[ModelConfig], dict[str, Any]],
    to_config: Callable[[dict[str, Any]], ModelConfig],
    qa_prefix: str | None = "transformer.",
) -> Family:
    """Return a family with Llama's layout.

    Args:
        model_type: `model_type` in config.json.
        name: Prefix of the transformers class names.
        to_hf_config: ModelConfig -> config.json.
        to_config: config.json -> ModelConfig.
        qa_prefix: Prefix of the transformer stack's tensors in the question-answering class; None for the family's.
    """
    return Family(
        model_type, (f"{name}ForCausalLM", f"{name}Model"), to_hf_config, to_config, weight_mappings, "model.",
        ignored_names=r"rotary_emb\.inv_freq$", tied_names=r"^lm_head\.weight$", unused_heads=r"^lm_head\.|^score\.|^qa_outputs\.",
        heads=(
            *sequence_heads(name),
            HeadSpec(f"{name}ForTokenClassification", "tags", bert.linear_head, {"": "score"}),
            HeadSpec(f"{name}ForQuestionAnswering", "span", bert.linear_head, {"": "qa_outputs"}, num_outputs=2, prefix=qa_prefix),
        ),
    )  # fmt: skip


def check_sliding_window(config: dict[str, Any], window: int | None) -> None:
    """Raise a UserError if a sliding window is shorter than `max_position_embeddings`."""
    if window and window < config["max_position_embeddings"]:
        raise UserError(
            f"config.json has a sliding window of {window} tokens and max_position_embeddings={config['max_position_embeddings']}; "
            f"firth does not support sliding windows. Up to {window} tokens the window has no effect: set "
            f"max_position_embeddings={window}"
        )


FAMILY = llama_like("llama", "Llama", to_hf_config, to_config)


MISTRAL_DEFAULTS = {"num_key_value_heads": 8, "sliding_window": 4096}


def mistral_to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {**to_hf_config(config), "sliding_window": None}


def mistral_to_config(hf: dict[str, Any]) -> ModelConfig:
    hf = MISTRAL_DEFAULTS | hf
    check_sliding_window(hf, hf["sliding_window"])
    return to_config(hf | {"attention_bias": False, "mlp_bias": False})


MISTRAL = llama_like("mistral", "Mistral", mistral_to_hf_config, mistral_to_config, qa_prefix=None)


QWEN_DEFAULTS = {"num_key_value_heads": 32, "use_sliding_window": False, "sliding_window": 4096}


def without_window(hf: dict[str, Any]) -> dict[str, Any]:
    """Return a hf with its defaults as a Llama's; raise a UserError if its sliding window has an effect."""
    hf = QWEN_DEFAULTS | hf
    check_sliding_window(hf, hf["sliding_window"] if hf["use_sliding_window"] else None)
    return hf | {"mlp_bias": False}


def qwen_to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **to_hf_config(config),
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * config.num_layers,
    }


def to_qwen2_config(hf: dict[str, Any]) -> ModelConfig:
    return replace(to_config(without_window(hf) | {"attention_bias": True}), bias_location="qkv")


def to_qwen3_config(hf: dict[str, Any]) -> ModelConfig:
    return to_config({"head_dim": 128} | without_window(hf)).with_fields(
        {"attention.qk_norm": True, "attention.qk_norm_weight": True}
    )


QWEN2 = llama_like("qwen2", "Qwen2", qwen_to_hf_config, to_qwen2_config)
QWEN3 = llama_like("qwen3", "Qwen3", qwen_to_hf_config, to_qwen3_config)
