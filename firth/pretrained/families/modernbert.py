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


def config(model_config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(ACTIVATIONS.items())}
    rope = {"rope_type": "default", "rope_theta": model_config.rope_theta}
    return {
        "vocab_size": model_config.vocab_size, "hidden_size": model_config.hidden_size, "num_hidden_layers": model_config.num_layers,
        "num_attention_heads": model_config.num_heads, "intermediate_size": model_config.intermediate_size,
        "hidden_activation": theirs.get(model_config.activation, model_config.activation),
        "classifier_activation": theirs.get(model_config.activation, model_config.activation),
        "max_position_embeddings": model_config.max_positions, "norm_eps": model_config.norm_eps, "norm_bias": model_config.norm_bias,
        "attention_bias": model_config.bias, "mlp_bias": model_config.bias, "classifier_bias": model_config.bias,
        "decoder_bias": model_config.lm_head_bias, "attention_dropout": model_config.dropout, "mlp_dropout": model_config.dropout,
        "embedding_dropout": model_config.dropout, "layer_types": ["full_attention"] * model_config.num_layers,
        "rope_parameters": {"full_attention": rope, "sliding_attention": rope},
        "global_rope_theta": model_config.rope_theta, "local_rope_theta": model_config.rope_theta,
        "global_attn_every_n_layers": 1, "local_attention": 128, "initializer_range": 0.02,
        "tie_word_embeddings": model_config.tie_embeddings,
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
        vocab_size=config["vocab_size"], hidden_size=config["hidden_size"], num_layers=depth, num_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"], max_positions=config["max_position_embeddings"], causal=False,
        norm_bias=config.get("norm_bias", False), norm_eps=config.get("norm_eps", 1e-5), embedding_norm=True,
        first_attention_norm=False, position="rotary", rope_theta=theta(old | config, 160000.0, "full_attention"),
        activation=act, bias=config.get("attention_bias", False),  # type: ignore[arg-type]
        dropout=config.get("mlp_dropout", 0.0), lm_head="transform", lm_head_bias=config.get("decoder_bias", True),
        tie_embeddings=config.get("tie_word_embeddings", True),
    )  # fmt: skip


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = both({"tokens": "embeddings.tok_embeddings"}, "", "model.", bias=False)
    out += both(
        {"stack.embed_norm": "embeddings.norm", "stack.norm": "final_norm"}, "", "model.", bias=config.norm_bias
    )
    for i in range(config.num_layers):
        ours, theirs = f"stack.blocks.{i}.", f"model.layers.{i}."
        norms = {"mlp_norm": "mlp_norm"} | ({"attention_norm": "attn_norm"} if i else {})
        out += both(norms, ours, theirs, bias=config.norm_bias)
        out += both({"attention.o": "attn.Wo", "mlp.down": "mlp.Wo"}, ours, theirs, bias=config.bias)
        for kind in ["weight", "bias"][: 1 + config.bias]:
            stacked = tuple(f"{ours}attention.{x}.{kind}" for x in "qkv")
            out.append(WeightMapping(f"{theirs}attn.Wqkv.{kind}", stacked, (config.num_heads * config.head_dim,) * 3))
            gated = (f"{ours}mlp.gate.{kind}", f"{ours}mlp.up.{kind}")
            out.append(WeightMapping(f"{theirs}mlp.Wi.{kind}", gated, (config.intermediate_size,) * 2))
    if head:
        out += both({"dense": "dense"}, "heads.lm.", "head.", bias=config.bias)
        out += both({"norm": "norm"}, "heads.lm.", "head.", bias=config.norm_bias)
        out += [WeightMapping("decoder.bias", ("heads.lm.bias",))] * config.lm_head_bias
        out += [WeightMapping("decoder.weight", ("heads.lm.weight",))] * (not config.tie_embeddings)
    return out


ACTS = {"geglu": nn.GELU(), "geglu_tanh": nn.GELU("tanh"), "swiglu": nn.SiLU()}
FIRST = (("classifier_pooling", "cls"),)
HEAD = {"0": "head.dense", "2": "head.norm", "3": "classifier"}


def predicted(config: ModelConfig, answers: int) -> nn.Module:
    """The head of all its classes: a dense layer, the activation, a norm, and a linear map."""
    first = linear(config.hidden_size, config.hidden_size, config.bias)
    return nn.Sequential(first, ACTS[config.activation], make_norm(config), linear(config.hidden_size, answers))


FAMILY = Family(
    "modernbert", ("ModernBertForMaskedLM", "ModernBertModel"), config, shape, entries, "model.",
    spare=r"inv_freq$", tied=r"^decoder\.weight$", unused=r"^head\.|^decoder\.|^classifier\.",
    heads=(
        HeadSpec("ModernBertForSequenceClassification", "score", predicted, HEAD, num_outputs=1, hf_labels=FIRST),
        HeadSpec("ModernBertForSequenceClassification", "classes", predicted, HEAD, hf_labels=FIRST),
        HeadSpec("ModernBertForMultipleChoice", "choice", predicted, HEAD, num_outputs=1, hf_labels=FIRST),
        HeadSpec("ModernBertForTokenClassification", "tags", predicted, HEAD),
        HeadSpec("ModernBertForQuestionAnswering", "span", predicted, HEAD, num_outputs=2),
    ),
)  # fmt: skip
