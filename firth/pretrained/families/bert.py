"""BERT (Devlin 2018): post-norm, learned positions, two segments, GELU, a transform before the tied head.

SpanBERT (Joshi 2020) is published in this format too, with segments of one kind only; its span boundary objective has
no place there and stays a part of ours. MiniLM and most encoders of sentences are BERTs of other sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from firth.model.config import ModelConfig
from firth.model.heads import linear, pooled
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, both, check_supported
from firth.types import UserError

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}


def config(shape: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": shape.vocab, "hidden_size": shape.width, "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads, "intermediate_size": shape.hidden,
        "hidden_act": theirs.get(shape.activation, shape.activation), "hidden_dropout_prob": shape.dropout,
        "attention_probs_dropout_prob": shape.dropout, "max_position_embeddings": shape.context,
        "type_vocab_size": shape.segments, "layer_norm_eps": shape.norm_eps, "initializer_range": 0.02,
        "tie_word_embeddings": shape.tied,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    check_supported(config, {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"})
    if not config["type_vocab_size"]:
        raise UserError("config.json has type_vocab_size=0, and the code of its family adds the vector of a segment")
    return ModelConfig(
        vocab=config["vocab_size"], width=config["hidden_size"], depth=config["num_hidden_layers"],
        heads=config["num_attention_heads"], hidden=config["intermediate_size"],
        causal=False,
        context=config["max_position_embeddings"], segments=config["type_vocab_size"], norm_at="post",
        norm_eps=config.get("layer_norm_eps", 1e-12), embed_norm=True,
        activation=activation(config.get("hidden_act", "gelu"), ACTIVATIONS, "hidden_act"),  # type: ignore[arg-type]
        dropout=config.get("hidden_dropout_prob", 0.1), head="transform", head_bias=True,
        tied=config.get("tie_word_embeddings", True),
    )  # fmt: skip


def tables(prefix: str, unread: int = 0) -> list[WeightMapping]:
    """The three tables and the norm behind them, as BERT's descendants name them too. unread: rows before position 0."""
    embeddings = {"tokens": "word_embeddings", "segments": "token_type_embeddings"}
    out = both(embeddings, "", f"{prefix}embeddings.", bias=False)
    out.append(WeightMapping(f"{prefix}embeddings.position_embeddings.weight", ("places.weight",), unread=unread))
    return out + both({"trunk.embed_norm": "LayerNorm"}, "", f"{prefix}embeddings.", bias=True)


def layers(shape: ModelConfig, prefix: str) -> list[WeightMapping]:
    """The blocks."""
    block = {
        "attention.q": "attention.self.query", "attention.k": "attention.self.key", "attention.v": "attention.self.value",
        "attention.o": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense", "mlp.down": "output.dense", "mlp_norm": "output.LayerNorm",
    }  # fmt: skip
    layer = f"{prefix}encoder.layer."
    return [e for i in range(shape.depth) for e in both(block, f"trunk.blocks.{i}.", f"{layer}{i}.", bias=True)]


def entries(shape: ModelConfig, head: bool) -> list[WeightMapping]:
    out = tables("bert.") + layers(shape, "bert.")
    if head:
        transform = {"dense": "transform.dense", "norm": "transform.LayerNorm"}
        out += both(transform, "parts.lm.", "cls.predictions.", bias=True)
        out.append(WeightMapping("cls.predictions.bias", ("parts.lm.bias",)))
        # Untied, their decoder has an offset of its own too, and that is the one which is used: it comes last.
        out += both({"": "decoder"}, "parts.lm", "cls.predictions.", bias=True) * (not shape.tied)
    return out


def pooler(shape: ModelConfig, answers: int) -> nn.Module:
    return pooled(shape.width, answers)


def plain(shape: ModelConfig, answers: int) -> nn.Module:
    return linear(shape.width, answers)


def tasks(
    name: str, text: dict[str, str], option: dict[str, str], make: Callable[[ModelConfig, int], nn.Module] = pooler
) -> tuple[HeadSpec, ...]:
    """The classes for tasks that a family of encoders has. text, option: modules of the head that reads a text, or an option
    of several -> theirs. With a single label theirs is a regression."""
    reader = f"{name}ForSequenceClassification"
    return (
        HeadSpec(reader, "score", make, text, answers=1),
        HeadSpec(reader, "classes", make, text),
        HeadSpec(f"{name}ForMultipleChoice", "choice", make, option, answers=1),
        HeadSpec(f"{name}ForTokenClassification", "tags", plain, {"": "classifier"}),
        HeadSpec(f"{name}ForQuestionAnswering", "span", plain, {"": "qa_outputs"}, answers=2),
    )


POOLED = {"0": "bert.pooler.dense", "2": "classifier"}
NEXT = {"0": "bert.pooler.dense", "2": "cls.seq_relationship"}

FAMILY = Family(
    "bert", ("BertForMaskedLM", "BertModel"), config, shape, entries, "bert.",
    spare=r"position_ids$", tied=r"^cls\.predictions\.decoder\.",
    unused=r"^bert\.pooler\.|^cls\.|^classifier\.|^qa_outputs\.",
    renames=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    headed=(
        HeadSpec("BertForPreTraining", "next", pooler, NEXT, answers=2, lm=True),
        HeadSpec("BertForNextSentencePrediction", "next", pooler, NEXT, answers=2),
        *tasks("Bert", POOLED, POOLED),
    ),
)  # fmt: skip
