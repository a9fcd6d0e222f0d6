"""BERT (Devlin 2018): post-norm, learned positions, two token types, GELU, a transform before the tied LM head.

SpanBERT (Joshi 2020) is published in this format too; transformers has no class for the head of its span boundary
objective, which is saved under firth's names. MiniLM and most sentence encoders are BERTs of other sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from firth.model.config import EmbeddingConfig, LMHeadConfig, ModelConfig, NormConfig
from firth.model.heads import linear, pooled
from firth.pretrained.families.family import (
    Family,
    HeadSpec,
    WeightMapping,
    activation,
    check_supported,
    module_mappings,
)
from firth.types import UserError

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "intermediate_size": config.intermediate_size,
        "hidden_act": theirs.get(config.activation, config.activation), "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout, "max_position_embeddings": config.max_positions,
        "type_vocab_size": config.embedding.type_vocab_size, "layer_norm_eps": config.norm.eps, "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
    }  # fmt: skip


def to_config(hf: dict[str, Any]) -> ModelConfig:
    check_supported(hf, {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"})
    if not hf["type_vocab_size"]:
        raise UserError("config.json has type_vocab_size=0, but the code of its family adds token type embeddings")
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"], num_layers=hf["num_hidden_layers"],
        num_heads=hf["num_attention_heads"], intermediate_size=hf["intermediate_size"],
        causal=False,
        max_positions=hf["max_position_embeddings"], embedding=EmbeddingConfig(type_vocab_size=hf["type_vocab_size"]),
        norm=NormConfig(placement="post", eps=hf.get("layer_norm_eps", 1e-12), embedding=True),
        activation=activation(hf.get("hidden_act", "gelu"), ACTIVATIONS, "hidden_act"),  # type: ignore[arg-type]
        dropout=hf.get("hidden_dropout_prob", 0.1), lm_head=LMHeadConfig("transform", bias=True),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def embedding_mappings(prefix: str, unused_rows: int = 0) -> list[WeightMapping]:
    """Return the mappings of the three embedding tables and their norm.

    Args:
        prefix: Prefix of the tensor names.
        unused_rows: Rows before position 0 in the position table.
    """
    embeddings = {"tokens": "word_embeddings", "token_types": "token_type_embeddings"}
    out = module_mappings(embeddings, "", f"{prefix}embeddings.", bias=False)
    out.append(
        WeightMapping(f"{prefix}embeddings.position_embeddings.weight", ("places.weight",), unused_rows=unused_rows)
    )
    return out + module_mappings({"stack.embed_norm": "LayerNorm"}, "", f"{prefix}embeddings.", bias=True)


def block_mappings(config: ModelConfig, prefix: str) -> list[WeightMapping]:
    """Return the mappings of the blocks."""
    block = {
        "attention.q": "attention.self.query", "attention.k": "attention.self.key", "attention.v": "attention.self.value",
        "attention.o": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense", "mlp.down": "output.dense", "mlp_norm": "output.LayerNorm",
    }  # fmt: skip
    layer = f"{prefix}encoder.layer."
    return [
        e
        for i in range(config.num_layers)
        for e in module_mappings(block, f"stack.blocks.{i}.", f"{layer}{i}.", bias=True)
    ]


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = embedding_mappings("bert.") + block_mappings(config, "bert.")
    if head:
        transform = {"dense": "transform.dense", "norm": "transform.LayerNorm"}
        out += module_mappings(transform, "heads.lm.", "cls.predictions.", bias=True)
        out.append(WeightMapping("cls.predictions.bias", ("heads.lm.bias",)))
        # An untied decoder has a bias of its own, which is the one that is used: it comes last.
        out += module_mappings({"": "decoder"}, "heads.lm", "cls.predictions.", bias=True) * (not config.tie_embeddings)
    return out


def pooled_head(config: ModelConfig, num_outputs: int) -> nn.Module:
    """Return BERT's pooler (dense layer, tanh) with a linear layer."""
    return pooled(config.hidden_size, num_outputs)


def linear_head(config: ModelConfig, num_outputs: int) -> nn.Module:
    """Return a linear layer."""
    return linear(config.hidden_size, num_outputs)


def task_heads(
    name: str,
    classification: dict[str, str],
    choice: dict[str, str],
    make: Callable[[ModelConfig, int], nn.Module] = pooled_head,
) -> tuple[HeadSpec, ...]:
    """Return the task classes of an encoder family.

    Args:
        name: Prefix of the class names.
        classification: Modules of the sequence classification head -> modules of the class. With a single label the
            class is a regression.
        choice: The same for the multiple choice head.
        make: Function (ModelConfig, number of outputs) -> either head.
    """
    class_name = f"{name}ForSequenceClassification"
    return (
        HeadSpec(class_name, "score", make, classification, num_outputs=1),
        HeadSpec(class_name, "classes", make, classification),
        HeadSpec(f"{name}ForMultipleChoice", "choice", make, choice, num_outputs=1),
        HeadSpec(f"{name}ForTokenClassification", "tags", linear_head, {"": "classifier"}),
        HeadSpec(f"{name}ForQuestionAnswering", "span", linear_head, {"": "qa_outputs"}, num_outputs=2),
    )


POOLED = {"0": "bert.pooler.dense", "2": "classifier"}
NEXT = {"0": "bert.pooler.dense", "2": "cls.seq_relationship"}

FAMILY = Family(
    "bert", ("BertForMaskedLM", "BertModel"), to_hf_config, to_config, weight_mappings, "bert.",
    ignored_names=r"position_ids$", tied_names=r"^cls\.predictions\.decoder\.",
    unused_heads=r"^bert\.pooler\.|^cls\.|^classifier\.|^qa_outputs\.",
    renames=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    heads=(
        HeadSpec("BertForPreTraining", "next", pooled_head, NEXT, num_outputs=2, lm=True),
        HeadSpec("BertForNextSentencePrediction", "next", pooled_head, NEXT, num_outputs=2),
        *task_heads("Bert", POOLED, POOLED),
    ),
)  # fmt: skip
