"""GPT-2, and GPT, which has its blocks.

GPT-2 (Radford 2019): pre-norm, learned positions, GELU (tanh approximation), a tied LM head.

GPT (Radford 2018): GPT-2's blocks, post-norm and without a final norm. Embeddings are always tied.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from firth.model.config import ModelConfig
from firth.model.config_groups import NormConfig
from firth.model.heads import linear
from firth.pretrained.families import bert
from firth.pretrained.families.family import (
    Family,
    HeadSpec,
    WeightMapping,
    activation,
    check_supported,
    module_mappings,
)

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size, "n_embd": config.hidden_size, "n_layer": config.num_layers, "n_head": config.num_heads,
        "n_inner": config.intermediate_size, "n_positions": config.max_positions, "n_ctx": config.max_positions,
        "activation_function": theirs.get(config.activation, config.activation), "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout, "attn_pdrop": config.dropout, "layer_norm_epsilon": config.norm.eps,
        "initializer_range": 0.02, "tie_word_embeddings": config.tie_embeddings,
    }  # fmt: skip


def to_config(hf: dict[str, Any]) -> ModelConfig:
    supported = {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "scale_attn_weights": True}
    check_supported(hf, supported)
    act = activation(hf.get("activation_function", "gelu_new"), ACTIVATIONS, "activation_function")
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["n_embd"], num_layers=hf["n_layer"], num_heads=hf["n_head"],
        intermediate_size=hf.get("n_inner") or 0, max_positions=hf["n_positions"], activation=act,  # type: ignore[arg-type]
        norm=NormConfig(eps=hf.get("layer_norm_epsilon", 1e-5)), dropout=hf.get("resid_pdrop", 0.1),
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )  # fmt: skip


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = module_mappings({"tokens": "wte", "places": "wpe"}, "", "transformer.", bias=False)
    out += module_mappings({"stack.norm": "ln_f"}, "", "transformer.", bias=True)
    return (
        out
        + block_mappings(config)
        + [WeightMapping("lm_head.weight", ("heads.lm.weight",))] * (head and not config.tie_embeddings)
    )


def block_mappings(config: ModelConfig) -> list[WeightMapping]:
    """Return the mappings of the blocks, which GPT shares."""
    out: list[WeightMapping] = []
    for i in range(config.num_layers):
        ours, theirs = f"stack.blocks.{i}.", f"transformer.h.{i}."
        out += module_mappings({"attention_norm": "ln_1", "mlp_norm": "ln_2"}, ours, theirs, bias=True)
        for kind in ("weight", "bias"):
            transposed = kind == "weight"  # Conv1D stores (in, out)
            stacked = tuple(f"{ours}attention.{x}.{kind}" for x in "qkv")
            out.append(WeightMapping(f"{theirs}attn.c_attn.{kind}", stacked, (config.hidden_size,) * 3, transposed))
            for a, b in (("attention.o", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
                out.append(WeightMapping(f"{theirs}{b}.{kind}", (f"{ours}{a}.{kind}",), transposed=transposed))
    return out


def score_head(config: ModelConfig, num_outputs: int) -> nn.Module:
    """Return a linear layer without bias."""
    return linear(config.hidden_size, num_outputs, bias=False)


def sequence_heads(name: str) -> tuple[HeadSpec, ...]:
    """Return a decoder's sequence classification class, which reads the last token: a reward (one output) or classes."""
    class_name = f"{name}ForSequenceClassification"
    return (
        HeadSpec(class_name, "reward", score_head, {"": "score"}, num_outputs=1),
        HeadSpec(class_name, "classes", score_head, {"": "score"}),
    )


FAMILY = Family(
    "gpt2", ("GPT2LMHeadModel", "GPT2Model"), to_hf_config, to_config, weight_mappings, "transformer.",
    ignored_names=r"attn\.bias$|attn\.masked_bias$", tied_names=r"^lm_head\.weight$",
    unused_heads=r"^lm_head\.|^score\.|^classifier\.|^qa_outputs\.|^multiple_choice_head\.",
    heads=(
        *sequence_heads("GPT2"),
        HeadSpec("GPT2ForTokenClassification", "tags", bert.linear_head, {"": "classifier"}),
        HeadSpec("GPT2ForQuestionAnswering", "span", bert.linear_head, {"": "qa_outputs"}, num_outputs=2),
    ),
)  # fmt: skip


GPT_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}
"""Its `gelu` is the tanh approximation."""


def gpt_to_hf_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in reversed(GPT_ACTIVATIONS.items())}
    return {
        "vocab_size": config.vocab_size, "n_embd": config.hidden_size, "n_layer": config.num_layers, "n_head": config.num_heads,
        "n_positions": config.max_positions, "n_ctx": config.max_positions, "afn": theirs.get(config.activation, config.activation),
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm.eps, "initializer_range": 0.02, "tie_word_embeddings": True,
    }  # fmt: skip


def gpt_to_config(hf: dict[str, Any]) -> ModelConfig:
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["n_embd"], num_layers=hf["n_layer"], num_heads=hf["n_head"],
        max_positions=hf["n_positions"], norm=NormConfig(placement="post", eps=hf.get("layer_norm_epsilon", 1e-5)),
        activation=activation(hf.get("afn", "gelu"), GPT_ACTIVATIONS, "afn"),  # type: ignore[arg-type]
        dropout=hf.get("resid_pdrop", 0.1),
    )  # fmt: skip


def gpt_weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    tables = {"tokens": "tokens_embed", "places": "positions_embed"}
    return module_mappings(tables, "", "transformer.", bias=False) + block_mappings(config)


GPT = Family(
    "openai-gpt", ("OpenAIGPTLMHeadModel", "OpenAIGPTModel"), gpt_to_hf_config, gpt_to_config, gpt_weight_mappings, "transformer.",
    ignored_names=r"attn\.bias$|position_ids$", tied_names=r"^lm_head\.weight$", unused_heads=r"^score\.|^multiple_choice_head\.",
    heads=sequence_heads("OpenAIGPT"),
)  # fmt: skip
