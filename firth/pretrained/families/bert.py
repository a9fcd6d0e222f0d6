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


def config(model_config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": model_config.vocab_size, "hidden_size": model_config.hidden_size, "num_hidden_layers": model_config.num_layers,
        "num_attention_heads": model_config.num_heads, "intermediate_size": model_config.intermediate_size,
        "hidden_act": theirs.get(model_config.activation, model_config.activation), "hidden_dropout_prob": model_config.dropout,
        "attention_probs_dropout_prob": model_config.dropout, "max_position_embeddings": model_config.max_positions,
        "type_vocab_size": model_config.type_vocab_size, "layer_norm_eps": model_config.norm_eps, "initializer_range": 0.02,
        "tie_word_embeddings": model_config.tie_embeddings,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    check_supported(config, {"is_decoder": False, "add_cross_attention": False, "position_embedding_type": "absolute"})
    if not config["type_vocab_size"]:
        raise UserError("config.json has type_vocab_size=0, and the code of its family adds the vector of a segment")
    return ModelConfig(
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"], intermediate_size=config["intermediate_size"],
        causal=False,
        max_positions=config["max_position_embeddings"], type_vocab_size=config["type_vocab_size"], norm_placement="post",
        norm_eps=config.get("layer_norm_eps", 1e-12), embedding_norm=True,
        activation=activation(config.get("hidden_act", "gelu"), ACTIVATIONS, "hidden_act"),  # type: ignore[arg-type]
        dropout=config.get("hidden_dropout_prob", 0.1), lm_head="transform", lm_head_bias=True,
        tie_embeddings=config.get("tie_word_embeddings", True),
    )  # fmt: skip


def tables(prefix: str, unread: int = 0) -> list[WeightMapping]:
    """The three tables and the norm behind them, as BERT's descendants name them too. unread: rows before position 0."""
    embeddings = {"tokens": "word_embeddings", "token_types": "token_type_embeddings"}
    out = both(embeddings, "", f"{prefix}embeddings.", bias=False)
    out.append(WeightMapping(f"{prefix}embeddings.position_embeddings.weight", ("places.weight",), ignored=unread))
    return out + both({"stack.embed_norm": "LayerNorm"}, "", f"{prefix}embeddings.", bias=True)


def layers(config: ModelConfig, prefix: str) -> list[WeightMapping]:
    """The blocks."""
    block = {
        "attention.q": "attention.self.query", "attention.k": "attention.self.key", "attention.v": "attention.self.value",
        "attention.o": "attention.output.dense", "attention_norm": "attention.output.LayerNorm",
        "mlp.up": "intermediate.dense", "mlp.down": "output.dense", "mlp_norm": "output.LayerNorm",
    }  # fmt: skip
    layer = f"{prefix}encoder.layer."
    return [e for i in range(config.num_layers) for e in both(block, f"stack.blocks.{i}.", f"{layer}{i}.", bias=True)]


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = tables("bert.") + layers(config, "bert.")
    if head:
        transform = {"dense": "transform.dense", "norm": "transform.LayerNorm"}
        out += both(transform, "heads.lm.", "cls.predictions.", bias=True)
        out.append(WeightMapping("cls.predictions.bias", ("heads.lm.bias",)))
        # Untied, their decoder has an offset of its own too, and that is the one which is used: it comes last.
        out += both({"": "decoder"}, "heads.lm", "cls.predictions.", bias=True) * (not config.tie_embeddings)
    return out


def pooler(config: ModelConfig, answers: int) -> nn.Module:
    return pooled(config.hidden_size, answers)


def plain(config: ModelConfig, answers: int) -> nn.Module:
    return linear(config.hidden_size, answers)


def tasks(
    name: str, text: dict[str, str], option: dict[str, str], make: Callable[[ModelConfig, int], nn.Module] = pooler
) -> tuple[HeadSpec, ...]:
    """The classes for tasks that a family of encoders has. text, option: modules of the head that reads a text, or an option
    of several -> theirs. With a single label theirs is a regression."""
    reader = f"{name}ForSequenceClassification"
    return (
        HeadSpec(reader, "score", make, text, num_outputs=1),
        HeadSpec(reader, "classes", make, text),
        HeadSpec(f"{name}ForMultipleChoice", "choice", make, option, num_outputs=1),
        HeadSpec(f"{name}ForTokenClassification", "tags", plain, {"": "classifier"}),
        HeadSpec(f"{name}ForQuestionAnswering", "span", plain, {"": "qa_outputs"}, num_outputs=2),
    )


POOLED = {"0": "bert.pooler.dense", "2": "classifier"}
NEXT = {"0": "bert.pooler.dense", "2": "cls.seq_relationship"}

FAMILY = Family(
    "bert", ("BertForMaskedLM", "BertModel"), config, shape, entries, "bert.",
    spare=r"position_ids$", tied=r"^cls\.predictions\.decoder\.",
    unused=r"^bert\.pooler\.|^cls\.|^classifier\.|^qa_outputs\.",
    renames=(("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")),
    heads=(
        HeadSpec("BertForPreTraining", "next", pooler, NEXT, num_outputs=2, lm=True),
        HeadSpec("BertForNextSentencePrediction", "next", pooler, NEXT, num_outputs=2),
        *tasks("Bert", POOLED, POOLED),
    ),
)  # fmt: skip
