"""NanoChat (Karpathy 2025): weightless RMSNorm, also on the embeddings; rotary turns the other way round, then
unit-RMS queries and keys; squared ReLU; logits softly capped. Our default decoder."""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families.family import Family, WeightMapping, activation, both, ropes, theta

ACTIVATIONS = {"relu2": "relu2", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}


def config(model_config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": model_config.vocab_size, "hidden_size": model_config.hidden_size, "num_hidden_layers": model_config.num_layers,
        "num_attention_heads": model_config.num_heads, "num_key_value_heads": model_config.num_kv_heads,
        "intermediate_size": model_config.intermediate_size, "hidden_act": theirs.get(model_config.activation, model_config.activation),
        "max_position_embeddings": model_config.max_positions, "rms_norm_eps": model_config.norm_eps, "attention_bias": False,
        "attention_dropout": model_config.dropout, "final_logit_softcapping": model_config.logit_softcap or None,
        "initializer_range": 0.02, "tie_word_embeddings": model_config.tie_embeddings,
    } | ropes(model_config)  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    heads = config["num_attention_heads"]
    return ModelConfig(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"], num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads, intermediate_size=config["intermediate_size"],
        max_positions=config["max_position_embeddings"], norm="rms", norm_weight=False, norm_bias=False,
        norm_eps=config.get("rms_norm_eps", 1e-6), embedding_norm=True, position="rotary", rope_sign=-1,
        rope_theta=theta(config, 10000.0), qk_norm=True,
        activation=activation(config.get("hidden_act", "relu2"), ACTIVATIONS, "hidden_act"),  # type: ignore[arg-type]
        bias=config.get("attention_bias", False), dropout=config.get("attention_dropout", 0.0),
        logit_softcap=config.get("final_logit_softcapping") or 0.0, tie_embeddings=config.get("tie_word_embeddings", False),
    )  # fmt: skip


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = both({"tokens": "embed_tokens"}, "", "model.", bias=False)
    maps = {
        "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.o_proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
    }  # fmt: skip
    for i in range(config.num_layers):
        out += both(maps, f"stack.blocks.{i}.", f"model.layers.{i}.", bias=False)
    return out + [WeightMapping("lm_head.weight", ("heads.lm.weight",))] * (head and not config.tie_embeddings)


FAMILY = Family(
    "nanochat",
    ("NanoChatForCausalLM", "NanoChatModel"),
    config,
    shape,
    entries,
    "model.",
    spare=r"inv_freq$",
    tied=r"^lm_head\.weight$",
)
