"""DistilBERT (Sanh 2019): BERT without token types, half as deep as its teacher, with ReLU in its classification head."""

from __future__ import annotations

from typing import Any

from torch import nn

from firth.model.config import LMHeadConfig, ModelConfig, NormConfig
from firth.model.heads import pooled
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, WeightMapping, activation, module_mappings

ACTIVATIONS = {"gelu": "gelu", "relu": "relu"}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": config.vocab_size, "dim": config.hidden_size, "n_layers": config.num_layers, "n_heads": config.num_heads,
        "hidden_dim": config.intermediate_size, "activation": config.activation, "dropout": config.dropout,
        "attention_dropout": config.dropout, "max_position_embeddings": config.max_positions, "sinusoidal_pos_embds": False,
        "initializer_range": 0.02, "tie_word_embeddings": config.tie_embeddings,
    }  # fmt: skip


def to_config(hf: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["dim"], num_layers=hf["n_layers"], num_heads=hf["n_heads"],
        intermediate_size=hf["hidden_dim"], max_positions=hf.get("max_position_embeddings", 512), causal=False,
        norm=NormConfig(placement="post", eps=1e-12, embedding=True), lm_head=LMHeadConfig("transform", bias=True),
        dropout=hf.get("dropout", 0.1),
        activation=activation(hf.get("activation", "gelu"), ACTIVATIONS, "activation"),  # type: ignore[arg-type]
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
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


CLASSIFIER = {"0": "pre_classifier", "2": "classifier"}

FAMILY = Family(
    "distilbert", ("DistilBertForMaskedLM", "DistilBertModel"), to_hf_config, to_config, weight_mappings, "distilbert.",
    ignored_names=r"position_ids$", tied_names=r"^vocab_projector\.weight$",
    unused_heads=r"^vocab_|^pre_classifier\.|^classifier\.|^qa_outputs\.",
    heads=bert.task_heads("DistilBert", CLASSIFIER, CLASSIFIER, relu_head),
)  # fmt: skip
