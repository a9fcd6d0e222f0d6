"""MPNet (Song 2020): BERT without token types, with learned positions and T5's relative bias, shared by all blocks.

The first two rows of its position table belong to padding and are unused. In transformers it counts positions over the
tokens whose id is not 1 (its pad), whatever the config says: pass `position_ids` there, or use a tokenizer that pads
with id 1.
"""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.model.config_groups import LMHeadConfig, NormConfig, PositionConfig
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, WeightMapping, activation, module_mappings
from firth.types import UserError

UNUSED_ROWS = 2
"""Unused leading rows of the position table."""
BUCKETS = 32
"""transformers uses 32 buckets whatever the config says."""


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "intermediate_size": config.intermediate_size, "hidden_act": config.activation,
        "hidden_dropout_prob": config.dropout, "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.max_positions + UNUSED_ROWS, "layer_norm_eps": config.norm.eps,
        "relative_attention_num_buckets": config.position.relative_buckets, "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
    }  # fmt: skip


def to_config(hf: dict[str, Any]) -> ModelConfig:
    buckets = hf.get("relative_attention_num_buckets", BUCKETS)
    if buckets != BUCKETS:
        raise UserError(f"config.json has relative_attention_num_buckets={buckets}; the code of MPNet uses {BUCKETS}")
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"], num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"], intermediate_size=hf["intermediate_size"], causal=False,
        max_positions=hf["max_position_embeddings"] - UNUSED_ROWS, position=PositionConfig("mpnet", relative_buckets=buckets),
        norm=NormConfig(placement="post", eps=hf.get("layer_norm_eps", 1e-12), embedding=True), dropout=hf.get("hidden_dropout_prob", 0.1),
        activation=activation(hf.get("hidden_act", "gelu"), {"gelu": "gelu"}, "hidden_act"),  # type: ignore[arg-type]
        lm_head=LMHeadConfig("transform", bias=True), tie_embeddings=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = module_mappings({"tokens": "word_embeddings"}, "", "mpnet.embeddings.", bias=False)
    out.append(
        WeightMapping("mpnet.embeddings.position_embeddings.weight", ("places.weight",), unused_rows=UNUSED_ROWS)
    )
    out += module_mappings({"stack.embed_norm": "LayerNorm"}, "", "mpnet.embeddings.", bias=True)
    out.append(WeightMapping("mpnet.encoder.relative_attention_bias.weight", ("stack.relative.weight",)))
    block = {f"attention.{x}": f"attention.attn.{x}" for x in "qkvo"} | {
        "attention_norm": "attention.LayerNorm", "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }  # fmt: skip
    for i in range(config.num_layers):
        out += module_mappings(block, f"stack.blocks.{i}.", f"mpnet.encoder.layer.{i}.", bias=True)
    if head:
        out += module_mappings({"dense": "dense", "norm": "layer_norm"}, "heads.lm.", "lm_head.", bias=True)
        out.append(WeightMapping("lm_head.bias", ("heads.lm.bias",)))
        if not config.tie_embeddings:  # its decoder then has a bias of its own
            out += module_mappings({"": "decoder"}, "heads.lm", "lm_head.", bias=True)
    return out


FAMILY = Family(
    "mpnet", ("MPNetForMaskedLM", "MPNetModel"), to_hf_config, to_config, weight_mappings, "mpnet.",
    ignored_names=r"position_ids$", tied_names=r"^lm_head\.decoder\.",
    unused_heads=r"^mpnet\.pooler\.|^lm_head\.|^classifier\.|^qa_outputs\.",
    heads=bert.task_heads(
        "MPNet", {"0": "classifier.dense", "2": "classifier.out_proj"}, {"0": "mpnet.pooler.dense", "2": "classifier"}
    ),
)  # fmt: skip
