"""GPT-2 (Radford 2019): pre-norm, learned positions, GELU (tanh form), a tied head."""

from __future__ import annotations

from typing import Any

from torch import nn

from firth.model.config import ModelConfig
from firth.model.heads import linear
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, both, check_supported

ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu": "gelu", "relu": "relu", "silu": "silu"}


def config(model_config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": model_config.vocab_size, "n_embd": model_config.hidden_size, "n_layer": model_config.num_layers, "n_head": model_config.num_heads,
        "n_inner": model_config.intermediate_size, "n_positions": model_config.max_positions, "n_ctx": model_config.max_positions,
        "activation_function": theirs.get(model_config.activation, model_config.activation), "resid_pdrop": model_config.dropout,
        "embd_pdrop": model_config.dropout, "attn_pdrop": model_config.dropout, "layer_norm_epsilon": model_config.norm_eps,
        "initializer_range": 0.02, "tie_word_embeddings": model_config.tie_embeddings,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    plain = {"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False, "scale_attn_weights": True}
    check_supported(config, plain)
    act = activation(config.get("activation_function", "gelu_new"), ACTIVATIONS, "activation_function")
    return ModelConfig(
        vocab_size=config["vocab_size"], hidden_size=config["n_embd"], num_layers=config["n_layer"], num_heads=config["n_head"],
        intermediate_size=config.get("n_inner") or 0, max_positions=config["n_positions"], activation=act,  # type: ignore[arg-type]
        norm_eps=config.get("layer_norm_epsilon", 1e-5), dropout=config.get("resid_pdrop", 0.1),
        tie_embeddings=config.get("tie_word_embeddings", True),
    )  # fmt: skip


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = both({"tokens": "wte", "places": "wpe"}, "", "transformer.", bias=False)
    out += both({"stack.norm": "ln_f"}, "", "transformer.", bias=True)
    return (
        out
        + blocks(config)
        + [WeightMapping("lm_head.weight", ("heads.lm.weight",))] * (head and not config.tie_embeddings)
    )


def blocks(config: ModelConfig) -> list[WeightMapping]:
    """The blocks, as GPT names them too."""
    out: list[WeightMapping] = []
    for i in range(config.num_layers):
        ours, theirs = f"stack.blocks.{i}.", f"transformer.h.{i}."
        out += both({"attention_norm": "ln_1", "mlp_norm": "ln_2"}, ours, theirs, bias=True)
        for kind in ("weight", "bias"):
            turned = kind == "weight"  # Conv1D stores (in, out)
            stacked = tuple(f"{ours}attention.{x}.{kind}" for x in "qkv")
            out.append(WeightMapping(f"{theirs}attn.c_attn.{kind}", stacked, (config.hidden_size,) * 3, turned))
            for a, b in (("attention.o", "attn.c_proj"), ("mlp.up", "mlp.c_fc"), ("mlp.down", "mlp.c_proj")):
                out.append(WeightMapping(f"{theirs}{b}.{kind}", (f"{ours}{a}.{kind}",), transposed=turned))
    return out


def score(config: ModelConfig, answers: int) -> nn.Module:
    return linear(config.hidden_size, answers, bias=False)


def scored(name: str) -> tuple[HeadSpec, ...]:
    """The class of a decoder that judges a text at its last token: by one number a reward, by several the classes."""
    judge = f"{name}ForSequenceClassification"
    return (
        HeadSpec(judge, "reward", score, {"": "score"}, num_outputs=1),
        HeadSpec(judge, "classes", score, {"": "score"}),
    )


FAMILY = Family(
    "gpt2", ("GPT2LMHeadModel", "GPT2Model"), config, shape, entries, "transformer.",
    spare=r"attn\.bias$|attn\.masked_bias$", tied=r"^lm_head\.weight$",
    unused=r"^lm_head\.|^score\.|^classifier\.|^qa_outputs\.|^multiple_choice_head\.",
    heads=(
        *scored("GPT2"),
        HeadSpec("GPT2ForTokenClassification", "tags", bert.plain, {"": "classifier"}),
        HeadSpec("GPT2ForQuestionAnswering", "span", bert.plain, {"": "qa_outputs"}, num_outputs=2),
    ),
)  # fmt: skip
