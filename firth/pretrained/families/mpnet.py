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


def config(shape: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": shape.vocab, "hidden_size": shape.width, "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads, "intermediate_size": shape.hidden, "hidden_act": shape.activation,
        "hidden_dropout_prob": shape.dropout, "attention_probs_dropout_prob": shape.dropout,
        "max_position_embeddings": shape.context + PADDED, "relative_attention_num_buckets": shape.buckets,
        "layer_norm_eps": shape.norm_eps, "initializer_range": 0.02, "tie_word_embeddings": shape.tied,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    buckets = config.get("relative_attention_num_buckets", BUCKETS)
    if buckets != BUCKETS:
        raise UserError(f"config.json asks for relative_attention_num_buckets={buckets}; MPNet's code reads {BUCKETS}")
    return ModelConfig(
        vocab=config["vocab_size"], width=config["hidden_size"], depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"], hidden=config["intermediate_size"], causal=False,
        context=config["max_position_embeddings"] - PADDED, norm_at="post", norm_eps=config.get("layer_norm_eps", 1e-12),
        embed_norm=True, position="mpnet", buckets=buckets, dropout=config.get("hidden_dropout_prob", 0.1),
        activation=activation(config.get("hidden_act", "gelu"), {"gelu": "gelu"}, "hidden_act"),  # type: ignore[arg-type]
        head="transform", head_bias=True, tied=config.get("tie_word_embeddings", True),
    )  # fmt: skip


def entries(shape: ModelConfig, head: bool) -> list[WeightMapping]:
    out = both({"tokens": "word_embeddings"}, "", "mpnet.embeddings.", bias=False)
    out.append(WeightMapping("mpnet.embeddings.position_embeddings.weight", ("places.weight",), unread=PADDED))
    out += both({"trunk.embed_norm": "LayerNorm"}, "", "mpnet.embeddings.", bias=True)
    out.append(WeightMapping("mpnet.encoder.relative_attention_bias.weight", ("trunk.relative.weight",)))
    block = {f"attention.{x}": f"attention.attn.{x}" for x in "qkvo"} | {
        "attention_norm": "attention.LayerNorm", "mlp.up": "intermediate.dense", "mlp.down": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }  # fmt: skip
    for i in range(shape.depth):
        out += both(block, f"trunk.blocks.{i}.", f"mpnet.encoder.layer.{i}.", bias=True)
    if head:
        out += both({"dense": "dense", "norm": "layer_norm"}, "parts.lm.", "lm_head.", bias=True)
        out.append(WeightMapping("lm_head.bias", ("parts.lm.bias",)))
        if not shape.tied:  # then theirs takes its offset for another one too, and looks for it
            out += both({"": "decoder"}, "parts.lm", "lm_head.", bias=True)
    return out


FAMILY = Family(
    "mpnet", ("MPNetForMaskedLM", "MPNetModel"), config, shape, entries, "mpnet.",
    spare=r"position_ids$", tied=r"^lm_head\.decoder\.",
    unused=r"^mpnet\.pooler\.|^lm_head\.|^classifier\.|^qa_outputs\.",
    headed=bert.tasks(
        "MPNet", {"0": "classifier.dense", "2": "classifier.out_proj"}, {"0": "mpnet.pooler.dense", "2": "classifier"}
    ),
)  # fmt: skip
