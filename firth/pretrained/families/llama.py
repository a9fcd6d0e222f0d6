"""Llama (Touvron 2023): RMSNorm, rotary positions, SwiGLU, grouped keys, no biases. SmolLM2 is a Llama.

Mistral, Qwen2 and Qwen3 have its layout, and their files say only in which fields they differ (`llama.kin`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, both, rope, ropes
from firth.pretrained.families.gpt2 import scored
from firth.types import UserError

ACTIVATIONS = {"silu": "swiglu", "gelu": "geglu", "gelu_new": "geglu_tanh", "gelu_pytorch_tanh": "geglu_tanh"}


def config(model_config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    return {
        "vocab_size": model_config.vocab_size, "hidden_size": model_config.hidden_size, "num_hidden_layers": model_config.num_layers,
        "num_attention_heads": model_config.num_heads, "num_key_value_heads": model_config.num_kv_heads, "head_dim": model_config.head_dim,
        "intermediate_size": model_config.intermediate_size, "hidden_act": theirs.get(model_config.activation, model_config.activation),
        "max_position_embeddings": model_config.max_positions, "rms_norm_eps": model_config.norm_eps, "attention_bias": model_config.bias,
        "mlp_bias": model_config.bias and model_config.bias_location == "all", "attention_dropout": model_config.dropout, "initializer_range": 0.02,
        "tie_word_embeddings": model_config.tie_embeddings,
    } | ropes(model_config)  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    heads, bias = config["num_attention_heads"], config.get("attention_bias", False)
    if config.get("mlp_bias", False) and not bias:
        raise UserError("config.json asks for biases in the MLP alone; firth has them everywhere or in attention")
    rotary, everywhere = rope(config, 10000.0), config.get("mlp_bias", False) or not bias
    return ModelConfig(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"], num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads") or heads, head_dim=config.get("head_dim") or 0,
        intermediate_size=config["intermediate_size"], max_positions=config["max_position_embeddings"], norm="rms", norm_bias=False,
        norm_eps=config.get("rms_norm_eps", 1e-6), position="rotary", rope_theta=rotary.theta,
        rope_scaling=rotary.scaling, rope_factor=rotary.factor, rope_low_freq_factor=rotary.low, rope_high_freq_factor=rotary.high,
        rope_original_max_positions=rotary.original,
        activation=activation(config.get("hidden_act", "silu"), ACTIVATIONS, "hidden_act"),  # type: ignore[arg-type]
        bias=bias, bias_location="all" if everywhere else "attention", dropout=config.get("attention_dropout", 0.0),
        tie_embeddings=config.get("tie_word_embeddings", False),
    )  # fmt: skip


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = both({"tokens": "embed_tokens", "stack.norm": "norm"}, "", "model.", bias=False)
    maps = {
        "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.o_proj", "mlp.gate": "mlp.gate_proj", "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }  # fmt: skip
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    biased = {"all": (*"qkvo", "gate", "up", "down"), "attention": "qkvo", "qkv": "qkv"}[config.bias_location]
    gains = {"attention.q_gain": "q_norm", "attention.k_gain": "k_norm"} if config.qk_norm_weight else {}
    for i in range(config.num_layers):
        for ours, theirs in maps.items():
            bias = config.bias and ours.rpartition(".")[2] in biased
            out += both({ours: theirs}, f"stack.blocks.{i}.", f"model.layers.{i}.", bias=bias)
        for ours, theirs in gains.items():
            out.append(WeightMapping(f"model.layers.{i}.self_attn.{theirs}.weight", (f"stack.blocks.{i}.{ours}",)))
        out += both(norms, f"stack.blocks.{i}.", f"model.layers.{i}.", bias=False)
    return out + [WeightMapping("lm_head.weight", ("heads.lm.weight",))] * (head and not config.tie_embeddings)


def kin(
    kind: str,
    name: str,
    config: Callable[[ModelConfig], dict[str, Any]],
    shape: Callable[[dict[str, Any]], ModelConfig],
    within: str | None = "transformer.",
) -> Family:
    """A family of Llama's layout. within: what stands before the trunk's names in its class for questions."""
    return Family(
        kind, (f"{name}ForCausalLM", f"{name}Model"), config, shape, entries, "model.",
        spare=r"rotary_emb\.inv_freq$", tied=r"^lm_head\.weight$", unused=r"^lm_head\.|^score\.|^qa_outputs\.",
        heads=(
            *scored(name),
            HeadSpec(f"{name}ForTokenClassification", "tags", bert.plain, {"": "score"}),
            HeadSpec(f"{name}ForQuestionAnswering", "span", bert.plain, {"": "qa_outputs"}, num_outputs=2, prefix=within),
        ),
    )  # fmt: skip


def whole(config: dict[str, Any], window: int | None) -> None:
    """Raise a UserError where a row may be longer than what each of its tokens sees."""
    if window and window < config["max_position_embeddings"]:
        raise UserError(
            f"config.json asks for a sliding window of {window} tokens in rows of {config['max_position_embeddings']}, which "
            f"firth's models do not have: up to {window} tokens it changes nothing, so set max_position_embeddings to that"
        )


FAMILY = kin("llama", "Llama", config, shape)
