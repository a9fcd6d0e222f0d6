"""Llama (Touvron 2023): RMSNorm, rotary positions, SwiGLU, grouped keys, no biases."""

from __future__ import annotations

from typing import Any

from firth.model.families.family import Entry, Family, activation, both, ropes, theta
from firth.model.shape import Shape

ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "gelu_new": "geglu_tanh", "gelu_pytorch_tanh": "geglu_tanh"}


def config(shape: Shape) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": shape.vocab, "hidden_size": shape.width, "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "head_dim": shape.head_width,
        "intermediate_size": shape.hidden, "hidden_act": theirs.get(shape.activation, shape.activation),
        "max_position_embeddings": shape.context, "rms_norm_eps": shape.norm_eps, "attention_bias": shape.bias,
        "mlp_bias": shape.bias, "attention_dropout": shape.dropout, "initializer_range": 0.02,
        "tie_word_embeddings": shape.tied,
    } | ropes(shape.rotary_theta)  # fmt: skip


def shape(config: dict[str, Any]) -> Shape:
    heads = config["num_attention_heads"]
    return Shape(
        vocab=config["vocab_size"], width=config["hidden_size"], depth=config["num_hidden_layers"], heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads, head_width=config.get("head_dim") or 0,
        hidden=config["intermediate_size"], context=config["max_position_embeddings"], norm="rms", norm_bias=False,
        norm_eps=config.get("rms_norm_eps", 1e-6), position="rotary", rotary_theta=theta(config, 10000.0),
        activation=activation(config.get("hidden_act", "silu"), ACTIVATIONS, "hidden_act"),  # type: ignore[arg-type]
        bias=config.get("attention_bias", False), dropout=config.get("attention_dropout", 0.0),
        tied=config.get("tie_word_embeddings", False),
    )  # fmt: skip


def entries(shape: Shape, head: bool) -> list[Entry]:
    out = both({"tokens": "embed_tokens", "trunk.norm": "norm"}, "", "model.", bias=False)
    maps = {
        "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    for i in range(shape.depth):
        out += both(maps, f"trunk.blocks.{i}.", f"model.layers.{i}.", bias=shape.bias)
        out += both(norms, f"trunk.blocks.{i}.", f"model.layers.{i}.", bias=False)
    return out + [Entry("lm_head.weight", ("parts.lm.weight",))] * (head and not shape.tied)


FAMILY = Family(
    "llama",
    ("LlamaForCausalLM", "LlamaModel"),
    config,
    shape,
    entries,
    "model.",
    spare=r"rotary_emb\.inv_freq$|lm_head",
)
