"""NanoChat (Karpathy 2025): weightless RMSNorm, also on the embeddings; rotary turns the other way round, then
unit-RMS queries and keys; squared ReLU; logits softly capped. Our default decoder."""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families.family import Family, WeightMapping, activation, both, ropes, theta

ACTIVATIONS = {"relu2": "relu2", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}


def config(shape: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": shape.vocab, "hidden_size": shape.width, "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "intermediate_size": shape.hidden, "hidden_act": theirs.get(shape.activation, shape.activation),
        "max_position_embeddings": shape.context, "rms_norm_eps": shape.norm_eps, "attention_bias": False,
        "attention_dropout": shape.dropout, "final_logit_softcapping": shape.softcap or None,
        "initializer_range": 0.02, "tie_word_embeddings": shape.tied,
    } | ropes(shape)  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    heads = config["num_attention_heads"]
    return ModelConfig(
        vocab=config["vocab_size"], width=config["hidden_size"], depth=config["num_hidden_layers"], heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads, hidden=config["intermediate_size"],
        context=config["max_position_embeddings"], norm="rms", norm_weight=False, norm_bias=False,
        norm_eps=config.get("rms_norm_eps", 1e-6), embed_norm=True, position="rotary", rotary_sign=-1,
        rotary_theta=theta(config, 10000.0), qk_norm=True,
        activation=activation(config.get("hidden_act", "relu2"), ACTIVATIONS, "hidden_act"),  # type: ignore[arg-type]
        bias=config.get("attention_bias", False), dropout=config.get("attention_dropout", 0.0),
        softcap=config.get("final_logit_softcapping") or 0.0, tied=config.get("tie_word_embeddings", False),
    )  # fmt: skip


def entries(shape: ModelConfig, head: bool) -> list[WeightMapping]:
    out = both({"tokens": "embed_tokens"}, "", "model.", bias=False)
    maps = {
        "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.o_proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
    }  # fmt: skip
    for i in range(shape.depth):
        out += both(maps, f"trunk.blocks.{i}.", f"model.layers.{i}.", bias=False)
    return out + [WeightMapping("lm_head.weight", ("parts.lm.weight",))] * (head and not shape.tied)


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
