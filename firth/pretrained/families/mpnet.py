"""MPNet (Song 2020): BERT without segments, with T5's relative bias on top of the learned positions, one for all blocks.

Their table of positions begins at 2; the two rows in front belong to padding, and nobody reads them. Theirs counts
positions over the tokens whose id is not 1 (its pad), whatever the config says: give `position_ids`, or a tokenizer
whose id 1 is a pad, where that matters.
"""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, WeightMapping, activation, both
from firth.types import UserError

PADDED = 2
"""Rows of their table of positions that belong to padding."""
BUCKETS = 32
"""Theirs looks into 32 buckets whatever the config says."""


def config(model_config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model_config.vocab_size, "hidden_size": model_config.hidden_size, "num_hidden_layers": model_config.num_layers,
        "num_attention_heads": model_config.num_heads, "intermediate_size": model_config.intermediate_size, "hidden_act": model_config.activation,
        "hidden_dropout_prob": model_config.dropout, "attention_probs_dropout_prob": model_config.dropout,
        "max_position_embeddings": model_config.max_positions + PADDED, "relative_attention_num_buckets": model_config.relative_buckets,
        "layer_norm_eps": model_config.norm_eps, "initializer_range": 0.02, "tie_word_embeddings": model_config.tie_embeddings,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    buckets = config.get("relative_attention_num_buckets", BUCKETS)
    if buckets != BUCKETS:
        raise UserError(f"config.json asks for relative_attention_num_buckets={buckets}; MPNet's code reads {BUCKETS}")
    return ModelConfig(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"], intermediate_size=config["intermediate_size"], causal=False,
        max_positions=config["max_position_embeddings"] - PADDED, norm_placement="post", norm_eps=config.get("layer_norm_eps", 1e-12),
        embedding_norm=True, position="mpnet", relative_buckets=buckets, dropout=config.get("hidden_dropout_prob", 0.1),
        activation=activation(config.get("hidden_act", "gelu"), {"gelu": "gelu"}, "hidden_act"),  # type: ignore[arg-type]
        lm_head="transform", lm_head_bias=True, tie_embeddings=config.get("tie_word_embeddings", True),
    )  # fmt: skip


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = both({"tokens": "word_embeddings"}, "", "mpnet.embeddings.", bias=False)
    out.append(WeightMapping("mpnet.embeddings.position_embeddings.weight", ("places.weight",), ignored=PADDED))
    out += both({"stack.embed_norm": "LayerNorm"}, "", "mpnet.embeddings.", bias=True)
    out.append(WeightMapping("mpnet.encoder.relative_attention_bias.weight", ("stack.relative.weight",)))
    block = {f"attention.{x}": f"attention.attn.{x}" for x in "qkvo"} | {
        "attention_norm": "attention.LayerNorm", "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }  # fmt: skip
    for i in range(config.num_layers):
        out += both(block, f"stack.blocks.{i}.", f"mpnet.encoder.layer.{i}.", bias=True)
    if head:
        out += both({"dense": "dense", "norm": "layer_norm"}, "heads.lm.", "lm_head.", bias=True)
        out.append(WeightMapping("lm_head.bias", ("heads.lm.bias",)))
        if not config.tie_embeddings:  # then theirs takes its offset for another one too, and looks for it
            out += both({"": "decoder"}, "heads.lm", "lm_head.", bias=True)
    return out


FAMILY = Family(
    "mpnet", ("MPNetForMaskedLM", "MPNetModel"), config, shape, entries, "mpnet.",
    spare=r"position_ids$", tied=r"^lm_head\.decoder\.",
    unused=r"^mpnet\.pooler\.|^lm_head\.|^classifier\.|^qa_outputs\.",
    heads=bert.tasks(
        "MPNet", {"0": "classifier.dense", "2": "classifier.out_proj"}, {"0": "mpnet.pooler.dense", "2": "classifier"}
    ),
)  # fmt: skip
