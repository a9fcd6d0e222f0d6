"""ModernBERT (Warner 2024) with full attention in every layer. The default encoder.

LayerNorm without bias, a norm on the embeddings in place of the first block's, rotary positions, GeGLU, and no biases
except in the LM head.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from firth.model.block import make_norm
from firth.model.config import ModelConfig
from firth.model.config_groups import LMHeadConfig, NormConfig, PositionConfig, RopeConfig
from firth.model.heads import linear
from firth.pretrained.families.family import (
    Family,
    HeadSpec,
    WeightMapping,
    activation,
    check_supported,
    module_mappings,
    theta,
)
from firth.types import UserError

ACTIVATIONS = {"gelu": "geglu", "gelu_new": "geglu_tanh", "gelu_pytorch_tanh": "geglu_tanh", "silu": "swiglu"}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    rope = {"rope_type": "default", "rope_theta": config.position.rope.theta}
    return {
        "vocab_size": config.vocab_size, "hidden_size": config.hidden_size, "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads, "intermediate_size": config.intermediate_size,
        "hidden_activation": theirs.get(config.activation, config.activation),
        "classifier_activation": theirs.get(config.activation, config.activation),
        "max_position_embeddings": config.max_positions, "norm_eps": config.norm.eps, "norm_bias": config.norm.bias,
        "attention_bias": config.bias, "mlp_bias": config.bias, "classifier_bias": config.bias,
        "decoder_bias": config.lm_head.bias, "attention_dropout": config.dropout, "mlp_dropout": config.dropout,
        "embedding_dropout": config.dropout, "layer_types": ["full_attention"] * config.num_layers,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        "global_rope_theta": config.position.rope.theta, "local_rope_theta": config.position.rope.theta,
        "global_attn_every_n_layers": 1, "local_attention": 128, "initializer_range": 0.02,
        "tie_word_embeddings": config.tie_embeddings,
    }  # fmt: skip


def to_config(hf: dict[str, Any]) -> ModelConfig:
    depth, every = hf["num_hidden_layers"], hf.get("global_attn_every_n_layers", 3)
    kinds = hf.get("layer_types") or ["sliding" if i % every else "full_attention" for i in range(depth)]
    if set(kinds) != {"full_attention"}:
        raise UserError(
            "config.json has sliding-window layers; firth supports ModernBERT with full attention in every layer only"
        )
    given, bias = hf.get("hidden_activation", "gelu"), hf.get("attention_bias", False)
    check_supported(hf, {"classifier_activation": given, "mlp_bias": bias, "classifier_bias": bias})
    old = {"rope_theta": hf.get("global_rope_theta", 160000.0)}  # transformers 4
    act = activation(hf.get("hidden_activation", "gelu"), ACTIVATIONS, "hidden_activation")
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["hidden_size"], num_layers=depth, num_heads=hf["num_attention_heads"],
        intermediate_size=hf["intermediate_size"], max_positions=hf["max_position_embeddings"], causal=False,
        norm=NormConfig(
            bias=hf.get("norm_bias", False), eps=hf.get("norm_eps", 1e-5), embedding=True, first_attention=False
        ),
        position=PositionConfig("rotary", RopeConfig(theta(old | hf, 160000.0, "full_attention"))),
        activation=act, bias=hf.get("attention_bias", False),  # type: ignore[arg-type]
        dropout=hf.get("mlp_dropout", 0.0), lm_head=LMHeadConfig("transform", bias=hf.get("decoder_bias", True)),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = module_mappings({"tokens": "embeddings.tok_embeddings"}, "", "model.", bias=False)
    out += module_mappings(
        {"stack.embed_norm": "embeddings.norm", "stack.norm": "final_norm"}, "", "model.", bias=config.norm.bias
    )
    for i in range(config.num_layers):
        ours, theirs = f"stack.blocks.{i}.", f"model.layers.{i}."
        norms = {"mlp_norm": "mlp_norm"} | ({"attention_norm": "attn_norm"} if i else {})
        out += module_mappings(norms, ours, theirs, bias=config.norm.bias)
        out += module_mappings({"attention.o": "attn.Wo", "mlp.down": "mlp.Wo"}, ours, theirs, bias=config.bias)
        for kind in ["weight", "bias"][: 1 + config.bias]:
            stacked = tuple(f"{ours}attention.{x}.{kind}" for x in "qkv")
            out.append(WeightMapping(f"{theirs}attn.Wqkv.{kind}", stacked, (config.num_heads * config.head_dim,) * 3))
            gated = (f"{ours}mlp.gate.{kind}", f"{ours}mlp.up.{kind}")
            out.append(WeightMapping(f"{theirs}mlp.Wi.{kind}", gated, (config.intermediate_size,) * 2))
    if head:
        out += module_mappings({"dense": "dense"}, "heads.lm.", "head.", bias=config.bias)
        out += module_mappings({"norm": "norm"}, "heads.lm.", "head.", bias=config.norm.bias)
        out += [WeightMapping("decoder.bias", ("heads.lm.bias",))] * config.lm_head.bias
        out += [WeightMapping("decoder.weight", ("heads.lm.weight",))] * (not config.tie_embeddings)
    return out


ACTS = {"geglu": nn.GELU(), "geglu_tanh": nn.GELU("tanh"), "swiglu": nn.SiLU()}
FIRST = (("classifier_pooling", "cls"),)
HEAD = {"0": "head.dense", "2": "head.norm", "3": "classifier"}


def prediction_head(config: ModelConfig, num_outputs: int) -> nn.Module:
    """Return the head of all its classes: a dense layer, the activation, a norm and a linear layer."""
    first = linear(config.hidden_size, config.hidden_size, config.bias)
    return nn.Sequential(first, ACTS[config.activation], make_norm(config), linear(config.hidden_size, num_outputs))


FAMILY = Family(
    "modernbert", ("ModernBertForMaskedLM", "ModernBertModel"), to_hf_config, to_config, weight_mappings, "model.",
    ignored_names=r"inv_freq$", tied_names=r"^decoder\.weight$", unused_heads=r"^head\.|^decoder\.|^classifier\.",
    heads=(
        HeadSpec("ModernBertForSequenceClassification", "score", prediction_head, HEAD, num_outputs=1, required_config=FIRST),
        HeadSpec("ModernBertForSequenceClassification", "classes", prediction_head, HEAD, required_config=FIRST),
        HeadSpec("ModernBertForMultipleChoice", "choice", prediction_head, HEAD, num_outputs=1, required_config=FIRST),
        HeadSpec("ModernBertForTokenClassification", "tags", prediction_head, HEAD),
        HeadSpec("ModernBertForQuestionAnswering", "span", prediction_head, HEAD, num_outputs=2),
    ),
)  # fmt: skip
