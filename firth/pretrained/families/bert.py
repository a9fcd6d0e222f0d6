"""BERT and the encoders made from its layers: RoBERTa and XLM-RoBERTa, DistilBERT, ELECTRA, ALBERT.

BERT (Devlin 2018): post-norm, learned positions, two token types, GELU, a transform before the tied LM head.

SpanBERT (Joshi 2020) is published in this format too; transformers has no class for the head of its span boundary
objective, which is saved under firth's names. MiniLM and most sentence encoders are BERTs of other sizes.

RoBERTa (Liu 2019): BERT's layers with one token type, other names for the head, and positions that start at 2. The first
two rows of its position table belong to padding and are unused. Positions are counted over the tokens that are not padding
and start at pad_token_id + 1, which is 2; no other pad_token_id is supported. A model of this config whose tokenizer pads
with another id is written as a BERT with one token type, which computes the same. XLM-RoBERTa (Conneau 2020) differs by its
name and its tokenizer.

DistilBERT (Sanh 2019): BERT without token types, half as deep as its teacher, with ReLU in its classification head.

ELECTRA (Clark 2020): BERT's blocks, optionally with a smaller embedding size; a generator or a discriminator head. The
generator is an ElectraForMaskedLM, the discriminator an ElectraForPreTraining. The classification head has GELU where
BERT's has tanh.

ALBERT (Lan 2020): BERT with parameters shared across layers and factorized embeddings. Its second pretraining head predicts
sentence order instead of the next sentence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from firth.model.config import ModelConfig
from firth.model.config_groups import EmbeddingConfig, LMHeadConfig, NormConfig
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


ROBERTA_PAD = 1


def roberta_to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **to_hf_config(config),
        "max_position_embeddings": config.max_positions + ROBERTA_PAD + 1,
        "pad_token_id": ROBERTA_PAD,
    }


def roberta_to_config(hf: dict[str, Any]) -> ModelConfig:
    check_supported(hf, {"pad_token_id": ROBERTA_PAD})
    found = to_config(hf)
    activation(hf.get("hidden_act", "gelu"), {"gelu": "gelu"}, "hidden_act")  # its head always has GELU
    if found.embedding.type_vocab_size != 1:
        raise UserError(f"config.json has type_vocab_size={found.embedding.type_vocab_size}; a RoBERTa must have 1")
    return replace(found, max_positions=found.max_positions - ROBERTA_PAD - 1)


def roberta_weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = embedding_mappings("roberta.", ROBERTA_PAD + 1) + block_mappings(config, "roberta.")
    if head:
        out += module_mappings({"dense": "dense", "norm": "layer_norm"}, "heads.lm.", "lm_head.", bias=True)
        out.append(WeightMapping("lm_head.bias", ("heads.lm.bias",)))
        # An untied decoder has a bias of its own, which is the one that is used: it comes last.
        out += module_mappings({"": "decoder"}, "heads.lm", "lm_head.", bias=True) * (not config.tie_embeddings)
    return out


ROBERTA = Family(
    "roberta", ("RobertaForMaskedLM", "RobertaModel"), roberta_to_hf_config, roberta_to_config, roberta_weight_mappings, "roberta.",
    ignored_names=r"position_ids$", tied_names=r"^lm_head\.decoder\.",
    unused_heads=r"^roberta\.pooler\.|^lm_head\.|^classifier\.|^qa_outputs\.",
    heads=task_heads(
        "Roberta", {"0": "classifier.dense", "2": "classifier.out_proj"},
        {"0": "roberta.pooler.dense", "2": "classifier"},
    ),
    pad_token_id=ROBERTA_PAD,
)  # fmt: skip

XLM_ROBERTA = replace(ROBERTA, name="xlm-roberta", classes=("XLMRobertaForMaskedLM", "XLMRobertaModel"), heads=tuple(
    replace(spec, name=f"XLM{spec.name}") for spec in ROBERTA.heads
))  # fmt: skip


DISTILBERT_ACTIVATIONS = {"gelu": "gelu", "relu": "relu"}


def distilbert_to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size, "dim": config.hidden_size, "n_layers": config.num_layers, "n_heads": config.num_heads,
        "hidden_dim": config.intermediate_size, "activation": config.activation, "dropout": config.dropout,
        "attention_dropout": config.dropout, "max_position_embeddings": config.max_positions, "sinusoidal_pos_embds": False,
        "initializer_range": 0.02, "tie_word_embeddings": config.tie_embeddings,
    }  # fmt: skip


def distilbert_to_config(hf: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["dim"], num_layers=hf["n_layers"], num_heads=hf["n_heads"],
        intermediate_size=hf["hidden_dim"], max_positions=hf.get("max_position_embeddings", 512), causal=False,
        norm=NormConfig(placement="post", eps=1e-12, embedding=True), lm_head=LMHeadConfig("transform", bias=True),
        dropout=hf.get("dropout", 0.1),
        activation=activation(hf.get("activation", "gelu"), DISTILBERT_ACTIVATIONS, "activation"),  # type: ignore[arg-type]
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def distilbert_weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    tables = {"tokens": "word_embeddings", "places": "position_embeddings"}
    out = module_mappings(tables, "", "distilbert.embeddings.", bias=False)
    out += module_mappings({"stack.embed_norm": "LayerNorm"}, "", "distilbert.embeddings.", bias=True)
    block = {f"attention.{x}": f"attention.{x}_lin" for x in "qkv"} | {
        "attention.o": "attention.out_lin", "attention_norm": "sa_layer_norm", "mlp.up": "ffn.lin1",
        "mlp.down": "ffn.lin2", "mlp_norm": "output_layer_norm",
    }  # fmt: skip
    for i in range(config.num_layers):
        out += module_mappings(block, f"stack.blocks.{i}.", f"distilbert.transformer.layer.{i}.", bias=True)
    if head:
        out += module_mappings({"dense": "vocab_transform", "norm": "vocab_layer_norm"}, "heads.lm.", "", bias=True)
        out.append(WeightMapping("vocab_projector.bias", ("heads.lm.bias",)))
        out += [WeightMapping("vocab_projector.weight", ("heads.lm.weight",))] * (not config.tie_embeddings)
    return out


def relu_head(config: ModelConfig, num_outputs: int) -> nn.Module:
    """Return BERT's pooled head with ReLU in place of tanh."""
    return pooled(config.hidden_size, num_outputs, nn.ReLU)


DISTILBERT_CLASSIFIER = {"0": "pre_classifier", "2": "classifier"}

DISTILBERT = Family(
    "distilbert", ("DistilBertForMaskedLM", "DistilBertModel"),
    distilbert_to_hf_config, distilbert_to_config, distilbert_weight_mappings, "distilbert.",
    ignored_names=r"position_ids$", tied_names=r"^vocab_projector\.weight$",
    unused_heads=r"^vocab_|^pre_classifier\.|^classifier\.|^qa_outputs\.",
    heads=task_heads("DistilBert", DISTILBERT_CLASSIFIER, DISTILBERT_CLASSIFIER, relu_head),
)  # fmt: skip


ELECTRA_ACTIVATIONS = {"gelu": "gelu"}
"""transformers always applies GELU in the generator's head, so no other activation gives the same model."""


def electra_to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {**to_hf_config(config), "embedding_size": config.embedding_dim}


def electra_to_config(hf: dict[str, Any]) -> ModelConfig:
    activation(hf.get("hidden_act", "gelu"), ELECTRA_ACTIVATIONS, "hidden_act")
    embedding_size = hf["embedding_size"]
    found = to_config({"type_vocab_size": 2, "max_position_embeddings": 512} | hf)
    if embedding_size == found.hidden_size:
        return found
    return found.with_fields({"embedding.size": embedding_size})


def electra_weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = embedding_mappings("electra.") + block_mappings(config, "electra.")
    if config.embedding.size:
        out += module_mappings({"stack.project": "embeddings_project"}, "", "electra.", bias=True)
    if head:
        out += module_mappings(
            {"dense": "dense", "norm": "LayerNorm"}, "heads.lm.", "generator_predictions.", bias=True
        )
        out.append(WeightMapping("generator_lm_head.bias", ("heads.lm.bias",)))
        out += [WeightMapping("generator_lm_head.weight", ("heads.lm.weight",))] * (not config.tie_embeddings)
    return out


def gelu_head(config: ModelConfig, num_outputs: int) -> nn.Module:
    """Return BERT's pooled head with GELU in place of tanh."""
    return pooled(config.hidden_size, num_outputs, nn.GELU)


ELECTRA_SUMMARY = {"0": "sequence_summary.summary", "2": "classifier"}
REPLACED = {"0": "discriminator_predictions.dense", "2": "discriminator_predictions.dense_prediction"}

ELECTRA = Family(
    "electra", ("ElectraForMaskedLM", "ElectraModel"), electra_to_hf_config, electra_to_config, electra_weight_mappings, "electra.",
    ignored_names=r"position_ids$", tied_names=r"^generator_lm_head\.weight$",
    unused_heads=r"^generator_|^discriminator_|^sequence_summary\.|^classifier\.|^qa_outputs\.",
    heads=(
        HeadSpec("ElectraForPreTraining", "replaced", gelu_head, REPLACED, num_outputs=1),
        *task_heads("Electra", {"0": "classifier.dense", "2": "classifier.out_proj"}, ELECTRA_SUMMARY, gelu_head),
    ),
)  # fmt: skip


def albert_to_hf_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size, "embedding_size": config.embedding.size, "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers, "num_hidden_groups": config.num_layer_groups, "inner_group_num": 1,
        "num_attention_heads": config.num_heads, "intermediate_size": config.intermediate_size,
        "hidden_act": theirs.get(config.activation, config.activation), "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout, "classifier_dropout_prob": 0.0,
        "max_position_embeddings": config.max_positions, "type_vocab_size": config.embedding.type_vocab_size,
        "layer_norm_eps": config.norm.eps, "initializer_range": 0.02, "tie_word_embeddings": config.tie_embeddings,
    }  # fmt: skip


def albert_to_config(hf: dict[str, Any]) -> ModelConfig:
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
        activation=activation(hf.get("hidden_act", "gelu_new"), ACTIVATIONS, "hidden_act"),  # type: ignore[arg-type]
        dropout=hf.get("hidden_dropout_prob", 0.0), lm_head=LMHeadConfig("transform", bias=True),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def albert_weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = embedding_mappings("albert.")
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


ALBERT_POOLED = {"0": "albert.pooler", "2": "classifier"}
ALBERT_ORDER = {"0": "albert.pooler", "2": "sop_classifier.classifier"}

ALBERT = Family(
    "albert", ("AlbertForMaskedLM", "AlbertModel"), albert_to_hf_config, albert_to_config, albert_weight_mappings, "albert.",
    ignored_names=r"position_ids$", tied_names=r"^predictions\.decoder\.",
    unused_heads=r"^albert\.pooler\.|^predictions\.|^sop_classifier\.|^classifier\.|^qa_outputs\.",
    heads=(
        HeadSpec("AlbertForPreTraining", "order", pooled_head, ALBERT_ORDER, num_outputs=2, lm=True),
        *task_heads("Albert", ALBERT_POOLED, ALBERT_POOLED),
    ),
)  # fmt: skip
