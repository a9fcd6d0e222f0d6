"""ModernBERT (Warner 2024) with full attention in every layer: LayerNorm without offset, a norm on the embeddings
in place of the first block's, rotary positions, GeGLU, no biases but the head's. Our default encoder."""

from __future__ import annotations

from typing import Any

from torch import nn

from firth.model.config import ModelConfig
from firth.model.heads import linear
from firth.model.norm import make_norm
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, both, check_supported, theta
from firth.types import UserError

ACTIVATIONS = {"gelu": "geglu", "gelu_new": "geglu_tanh", "gelu_pytorch_tanh": "geglu_tanh", "silu": "swiglu"}


def config(shape: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    rope = {"rope_type": "default", "rope_theta": shape.rotary_theta}
    return {
        "vocab_size": shape.vocab, "hidden_size": shape.width, "num_hidden_layers": shape.depth,
        "num_attention_heads": shape.heads, "intermediate_size": shape.hidden,
        "hidden_activation": theirs.get(shape.activation, shape.activation),
        "classifier_activation": theirs.get(shape.activation, shape.activation),
        "max_position_embeddings": shape.context, "norm_eps": shape.norm_eps, "norm_bias": shape.norm_bias,
        "attention_bias": shape.bias, "mlp_bias": shape.bias, "classifier_bias": shape.bias,
        "decoder_bias": shape.head_bias, "attention_dropout": shape.dropout, "mlp_dropout": shape.dropout,
        "embedding_dropout": shape.dropout, "layer_types": ["full_attention"] * shape.depth,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        "global_rope_theta": shape.rotary_theta, "local_rope_theta": shape.rotary_theta,
        "global_attn_every_n_layers": 1, "local_attention": 128, "initializer_range": 0.02,
        "tie_word_embeddings": shape.tied,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    depth, every = config["num_hidden_layers"], config.get("global_attn_every_n_layers", 3)
    kinds = config.get("layer_types") or ["sliding" if i % every else "full_attention" for i in range(depth)]
    if set(kinds) != {"full_attention"}:
        raise UserError(
            "config.json asks for sliding-window layers; firth's ModernBERT has full attention in every layer"
        )
    given, bias = config.get("hidden_activation", "gelu"), config.get("attention_bias", False)
    check_supported(config, {"classifier_activation": given, "mlp_bias": bias, "classifier_bias": bias})
    old = {"rope_theta": config.get("global_rope_theta", 160000.0)}  # as version 4 says it
    act = activation(config.get("hidden_activation", "gelu"), ACTIVATIONS, "hidden_activation")
    return ModelConfig(
        vocab=config["vocab_size"], width=config["hidden_size"], depth=depth, heads=config["num_attention_heads"],
        hidden=config["intermediate_size"], context=config["max_position_embeddings"], causal=False,
        norm_bias=config.get("norm_bias", False), norm_eps=config.get("norm_eps", 1e-5), embed_norm=True,
        first_norm=False, position="rotary", rotary_theta=theta(old | config, 160000.0, "full_attention"),
        activation=act, bias=config.get("attention_bias", False),  # type: ignore[arg-type]
        dropout=config.get("mlp_dropout", 0.0), head="transform", head_bias=config.get("decoder_bias", True),
        tied=config.get("tie_word_embeddings", True),
    )  # fmt: skip


def entries(shape: ModelConfig, head: bool) -> list[WeightMapping]:
    out = both({"tokens": "embeddings.tok_embeddings"}, "", "model.", bias=False)
    out += both({"trunk.embed_norm": "embeddings.norm", "trunk.norm": "final_norm"}, "", "model.", bias=shape.norm_bias)
    for i in range(shape.depth):
        ours, theirs = f"trunk.blocks.{i}.", f"model.layers.{i}."
        norms = {"mlp_norm": "mlp_norm"} | ({"attention_norm": "attn_norm"} if i else {})
        out += both(norms, ours, theirs, bias=shape.norm_bias)
        out += both({"attention.o": "attn.Wo", "mlp.down": "mlp.Wo"}, ours, theirs, bias=shape.bias)
        for kind in ["weight", "bias"][: 1 + shape.bias]:
            stacked = tuple(f"{ours}attention.{x}.{kind}" for x in "qkv")
            out.append(WeightMapping(f"{theirs}attn.Wqkv.{kind}", stacked, (shape.heads * shape.head_width,) * 3))
            gated = (f"{ours}mlp.gate.{kind}", f"{ours}mlp.up.{kind}")
            out.append(WeightMapping(f"{theirs}mlp.Wi.{kind}", gated, (shape.hidden,) * 2))
    if head:
        out += both({"dense": "dense"}, "parts.lm.", "head.", bias=shape.bias)
        out += both({"norm": "norm"}, "parts.lm.", "head.", bias=shape.norm_bias)
        out += [WeightMapping("decoder.bias", ("parts.lm.bias",))] * shape.head_bias
        out += [WeightMapping("decoder.weight", ("parts.lm.weight",))] * (not shape.tied)
    return out


ACTS = {"geglu": nn.GELU(), "geglu_tanh": nn.GELU("tanh"), "swiglu": nn.SiLU()}
FIRST = (("classifier_pooling", "cls"),)
HEAD = {"0": "head.dense", "2": "head.norm", "3": "classifier"}


def predicted(shape: ModelConfig, answers: int) -> nn.Module:
    """The head of all its classes: a dense layer, the activation, a norm, and a linear map."""
    first = linear(shape.width, shape.width, shape.bias)
    return nn.Sequential(first, ACTS[shape.activation], make_norm(shape), linear(shape.width, answers))


FAMILY = Family(
    "modernbert", ("ModernBertForMaskedLM", "ModernBertModel"), config, shape, entries, "model.",
    spare=r"inv_freq$", tied=r"^decoder\.weight$", unused=r"^head\.|^decoder\.|^classifier\.",
    headed=(
        HeadSpec("ModernBertForSequenceClassification", "score", predicted, HEAD, answers=1, says=FIRST),
        HeadSpec("ModernBertForSequenceClassification", "classes", predicted, HEAD, says=FIRST),
        HeadSpec("ModernBertForMultipleChoice", "choice", predicted, HEAD, answers=1, says=FIRST),
        HeadSpec("ModernBertForTokenClassification", "tags", predicted, HEAD),
        HeadSpec("ModernBertForQuestionAnswering", "span", predicted, HEAD, answers=2),
    ),
)  # fmt: skip
