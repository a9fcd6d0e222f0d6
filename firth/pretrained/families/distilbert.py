"""DistilBERT (Sanh 2019): BERT without segments, half as deep as its teacher. Its classes are read through ReLU."""

from __future__ import annotations

from typing import Any

from torch import nn

from firth.model.config import ModelConfig
from firth.model.heads import pooled
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, WeightMapping, activation, both

ACTIVATIONS = {"gelu": "gelu", "relu": "relu"}


def config(model_config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": model_config.vocab_size, "dim": model_config.hidden_size, "n_layers": model_config.num_layers, "n_heads": model_config.num_heads,
        "hidden_dim": model_config.intermediate_size, "activation": model_config.activation, "dropout": model_config.dropout,
        "attention_dropout": model_config.dropout, "max_position_embeddings": model_config.max_positions, "sinusoidal_pos_embds": False,
        "initializer_range": 0.02, "tie_word_embeddings": model_config.tie_embeddings,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab_size=config["vocab_size"], hidden_size=config["dim"], num_layers=config["n_layers"], num_heads=config["n_heads"],
        intermediate_size=config["hidden_dim"], max_positions=config.get("max_position_embeddings", 512), causal=False, norm_placement="post",
        norm_eps=1e-12, embedding_norm=True, lm_head="transform", lm_head_bias=True, dropout=config.get("dropout", 0.1),
        activation=activation(config.get("activation", "gelu"), ACTIVATIONS, "activation"),  # type: ignore[arg-type]
        tie_embeddings=config.get("tie_word_embeddings", True),
    )  # fmt: skip


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    tables = {"tokens": "word_embeddings", "places": "position_embeddings"}
    out = both(tables, "", "distilbert.embeddings.", bias=False)
    out += both({"stack.embed_norm": "LayerNorm"}, "", "distilbert.embeddings.", bias=True)
    block = {f"attention.{x}": f"attention.{x}_lin" for x in "qkv"} | {
        "attention.o": "attention.out_lin", "attention_norm": "sa_layer_norm", "mlp.up": "ffn.lin1",
        "mlp.down": "ffn.lin2", "mlp_norm": "output_layer_norm",
    }  # fmt: skip
    for i in range(config.num_layers):
        out += both(block, f"stack.blocks.{i}.", f"distilbert.transformer.layer.{i}.", bias=True)
    if head:
        out += both({"dense": "vocab_transform", "norm": "vocab_layer_norm"}, "heads.lm.", "", bias=True)
        out.append(WeightMapping("vocab_projector.bias", ("heads.lm.bias",)))
        out += [WeightMapping("vocab_projector.weight", ("heads.lm.weight",))] * (not config.tie_embeddings)
    return out


def through_relu(config: ModelConfig, answers: int) -> nn.Module:
    return pooled(config.hidden_size, answers, nn.ReLU)


READ = {"0": "pre_classifier", "2": "classifier"}

FAMILY = Family(
    "distilbert", ("DistilBertForMaskedLM", "DistilBertModel"), config, shape, entries, "distilbert.",
    spare=r"position_ids$", tied=r"^vocab_projector\.weight$",
    unused=r"^vocab_|^pre_classifier\.|^classifier\.|^qa_outputs\.",
    heads=bert.tasks("DistilBert", READ, READ, through_relu),
)  # fmt: skip
