"""ALBERT (Lan 2020): BERT with one block's weights for all layers and narrow tables that a matrix widens.

Also BERT's two heads, the second of which asks for the order of two sentences in place of whether they are neighbours.
"""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, both
from firth.types import UserError


def config(model_config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in bert.ACTIVATIONS.items()}
    return {
        "vocab_size": model_config.vocab_size, "embedding_size": model_config.embedding_size, "hidden_size": model_config.hidden_size,
        "num_hidden_layers": model_config.num_layers, "num_hidden_groups": model_config.num_layer_groups, "inner_group_num": 1,
        "num_attention_heads": model_config.num_heads, "intermediate_size": model_config.intermediate_size,
        "hidden_act": theirs.get(model_config.activation, model_config.activation), "hidden_dropout_prob": model_config.dropout,
        "attention_probs_dropout_prob": model_config.dropout, "classifier_dropout_prob": 0.0,
        "max_position_embeddings": model_config.max_positions, "type_vocab_size": model_config.type_vocab_size, "layer_norm_eps": model_config.norm_eps,
        "initializer_range": 0.02, "tie_word_embeddings": model_config.tie_embeddings,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    if config.get("inner_group_num", 1) != 1:
        raise UserError("config.json asks for inner_group_num above 1, which firth's models do not have")
    if not config["embedding_size"] or not config.get("num_hidden_groups", 1):
        raise UserError("an ALBERT has narrow tables and shared blocks")
    return ModelConfig(
        vocab_size=config["vocab_size"], embedding_size=config["embedding_size"], hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"], num_layer_groups=config.get("num_hidden_groups", 1),
        num_heads=config["num_attention_heads"], intermediate_size=config["intermediate_size"], causal=False,
        max_positions=config.get("max_position_embeddings", 512), type_vocab_size=config.get("type_vocab_size", 2), norm_placement="post",
        norm_eps=config.get("layer_norm_eps", 1e-12), embedding_norm=True,
        activation=activation(config.get("hidden_act", "gelu_new"), bert.ACTIVATIONS, "hidden_act"),  # type: ignore[arg-type]
        dropout=config.get("hidden_dropout_prob", 0.0), lm_head="transform", lm_head_bias=True,
        tie_embeddings=config.get("tie_word_embeddings", True),
    )  # fmt: skip


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = bert.tables("albert.")
    out += both({"stack.project": "embedding_hidden_mapping_in"}, "", "albert.encoder.", bias=True)
    block = {
        "attention.q": "attention.query", "attention.k": "attention.key", "attention.v": "attention.value",
        "attention.o": "attention.dense", "attention_norm": "attention.LayerNorm", "mlp.up": "ffn",
        "mlp.down": "ffn_output", "mlp_norm": "full_layer_layer_norm",
    }  # fmt: skip
    for i in range(config.num_layer_groups):
        theirs = f"albert.encoder.albert_layer_groups.{i}.albert_layers.0."
        out += both(block, f"stack.blocks.{i}.", theirs, bias=True)
    if head:
        out += both({"dense": "dense", "norm": "LayerNorm"}, "heads.lm.", "predictions.", bias=True)
        out.append(WeightMapping("predictions.bias", ("heads.lm.bias",)))
        # Untied, their decoder has an offset of its own too, and that is the one which is used: it comes last.
        out += both({"": "decoder"}, "heads.lm", "predictions.", bias=True) * (not config.tie_embeddings)
    return out


POOLED = {"0": "albert.pooler", "2": "classifier"}
ORDER = {"0": "albert.pooler", "2": "sop_classifier.classifier"}

FAMILY = Family(
    "albert", ("AlbertForMaskedLM", "AlbertModel"), config, shape, entries, "albert.",
    spare=r"position_ids$", tied=r"^predictions\.decoder\.",
    unused=r"^albert\.pooler\.|^predictions\.|^sop_classifier\.|^classifier\.|^qa_outputs\.",
    heads=(
        HeadSpec("AlbertForPreTraining", "order", bert.pooler, ORDER, num_outputs=2, lm=True),
        *bert.tasks("Albert", POOLED, POOLED),
    ),
)  # fmt: skip
