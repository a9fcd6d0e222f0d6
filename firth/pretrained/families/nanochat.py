"""NanoChat (Karpathy 2025), the default decoder.

RMSNorm without weights, also on the embeddings; rotary positions with the opposite sign, followed by QK norm; squared
ReLU; a softcap on the logits.
"""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.model.config_groups import AttentionConfig, LMHeadConfig, NormConfig, PositionConfig, RopeConfig
from firth.pretrained.families.family import Family, WeightMapping, activation, module_mappings, rope_fields, theta

ACTIVATIONS = {"relu2": "relu2", "relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu"}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "num_key_value_heads": config.num_kv_heads,
        "intermediate_size": config.intermediate_size, "hidden_act": theirs.get(config.activation, config.activation),
        "max_position_embeddings": config.max_positions, "rms_norm_eps": config.norm.eps, "attention_bias": False,
        "attention_dropout": config.dropout, "final_logit_softcapping": config.lm_head.softcap or None,
        "initializer_range": 0.02, "tie_word_embeddings": config.tie_embeddings,
    } | rope_fields(config)  # fmt: skip


def to_config(hf: dict[str, Any]) -> ModelConfig:
    heads = hf["num_attention_heads"]
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"], num_layers=hf["num_hidden_layers"], num_heads=heads,
        num_kv_heads=hf.get("num_key_value_heads") or heads, intermediate_size=hf["intermediate_size"],
        max_positions=hf["max_position_embeddings"],
        norm=NormConfig("rms", weight=False, bias=False, eps=hf.get("rms_norm_eps", 1e-6), embedding=True),
        position=PositionConfig("rotary", RopeConfig(theta(hf, 10000.0), sign=-1)), attention=AttentionConfig(qk_norm=True),
        activation=activation(hf.get("hidden_act", "relu2"), ACTIVATIONS, "hidden_act"),  # type: ignore[arg-type]
        bias=hf.get("attention_bias", False), dropout=hf.get("attention_dropout", 0.0),
        lm_head=LMHeadConfig(softcap=hf.get("final_logit_softcapping") or 0.0),
        tie_embeddings=hf.get("tie_word_embeddings", False),
    )  # fmt: skip


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = module_mappings({"tokens": "embed_tokens"}, "", "model.", bias=False)
    maps = {
        "attention.q": "self_attn.q_proj", "attention.k": "self_attn.k_proj", "attention.v": "self_attn.v_proj",
        "attention.o": "self_attn.o_proj", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2",
    }  # fmt: skip
    for i in range(config.num_layers):
        out += module_mappings(maps, f"stack.blocks.{i}.", f"model.layers.{i}.", bias=False)
    return out + [WeightMapping("lm_head.weight", ("heads.lm.weight",))] * (head and not config.tie_embeddings)


FAMILY = Family(
    "nanochat",
    ("NanoChatForCausalLM", "NanoChatModel"),
    to_hf_config,
    to_config,
    weight_mappings,
    "model.",
    ignored_names=r"inv_freq$",
    tied_names=r"^lm_head\.weight$",
)
