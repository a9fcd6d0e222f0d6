"""ALBERT (Lan 2020): BERT with parameters shared across layers and factorized embeddings.

Its second pretraining head predicts sentence order instead of the next sentence.
"""

from __future__ import annotations

from typing import Any

from firth.model.config import EmbeddingConfig, LMHeadConfig, ModelConfig, NormConfig
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, module_mappings
from firth.types import UserError


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in bert.ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size, "embedding_size": config.embedding.size, "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers, "num_hidden_groups": config.num_layer_groups, "inner_group_num": 1,
        "num_attention_heads": config.num_heads, "intermediate_size": config.intermediate_size,
        "hidden_act": theirs.get(config.activation, config.activation), "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout, "classifier_dropout_prob": 0.0,
        "max_position_embeddings": config.max_positions, "type_vocab_size": config.embedding.type_vocab_size,
        "layer_norm_eps": config.norm.eps, "initializer_range": 0.02, "tie_word_embeddings": config.tie_embeddings,
    }  # fmt: skip


def to_config(hf: dict[str, Any]) -> ModelConfig:
    if hf.get("inner_group_num", 1) != 1:
        raise UserError("config.json has inner_group_num above 1, which firth's models do not have")
    if not hf["embedding_size"] or not hf.get("num_hidden_groups", 1):
        raise UserError("config.json must have an embedding_size and num_hidden_groups of at least 1 for an ALBERT")
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"], num_layer_groups=hf.get("num_hidden_groups", 1),
        num_heads=hf["num_attention_heads"], intermediate_size=hf["intermediate_size"], causal=False,
        max_positions=hf.get("max_position_embeddings", 512),
        embedding=EmbeddingConfig(size=hf["embedding_size"], type_vocab_size=hf.get("type_vocab_size", 2)),
        norm=NormConfig(placement="post", eps=hf.get("layer_norm_eps", 1e-12), embedding=True),
        activation=activation(hf.get("hidden_act", "gelu_new"), bert.ACTIVATIONS, "hidden_act"),  # type: ignore[arg-type]
        dropout=hf.get("hidden_dropout_prob", 0.0), lm_head=LMHeadConfig("transform", bias=True),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = bert.embedding_mappings("albert.")
    out += module_mappings({"stack.project": "embedding_hidden_mapping_in"}, "", "albert.encoder.", bias=True)
    block = {
        "attention.q": "attention.query", "attention.k": "attention.key", "attention.v": "attention.value",
        "attention.o": "attention.dense", "attention_norm": "attention.LayerNorm", "mlp.up": "ffn",
        "mlp.down": "ffn_output", "mlp_norm": "full_layer_layer_norm",
    }  # fmt: skip
    for i in range(config.num_layer_groups):
        theirs = f"albert.encoder.albert_layer_groups.{i}.albert_layers.0."
        out += module_mappings(block, f"stack.blocks.{i}.", theirs, bias=True)
    if head:
        out += module_mappings({"dense": "dense", "norm": "LayerNorm"}, "heads.lm.", "predictions.", bias=True)
        out.append(WeightMapping("predictions.bias", ("heads.lm.bias",)))
        # An untied decoder has a bias of its own, which is the one that is used: it comes last.
        out += module_mappings({"": "decoder"}, "heads.lm", "predictions.", bias=True) * (not config.tie_embeddings)
    return out


POOLED = {"0": "albert.pooler", "2": "classifier"}
ORDER = {"0": "albert.pooler", "2": "sop_classifier.classifier"}

FAMILY = Family(
    "albert", ("AlbertForMaskedLM", "AlbertModel"), to_hf_config, to_config, weight_mappings, "albert.",
    ignored_names=r"position_ids$", tied_names=r"^predictions\.decoder\.",
    unused_heads=r"^albert\.pooler\.|^predictions\.|^sop_classifier\.|^classifier\.|^qa_outputs\.",
    heads=(
        HeadSpec("AlbertForPreTraining", "order", bert.pooled_head, ORDER, num_outputs=2, lm=True),
        *bert.task_heads("Albert", POOLED, POOLED),
    ),
)  # fmt: skip
