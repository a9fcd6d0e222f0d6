"""T5 (Raffel 2019): an encoder-decoder with relative positions, RMSNorm and no biases. v1.0 has ReLU and a tied head
whose states are scaled by width ** -0.5; v1.1 has GeGLU and no scale. Our default encoder-decoder.

`tie_word_embeddings` is how a config says which: version 5 of transformers reads false as "do not scale" (and ties
unless the file holds a head of its own), version 4 as "do not scale, do not tie". So an unscaled model is written
with false and its head stored, tied or not: both versions then compute what we compute.

Its classes for tasks have the decoder read the text once more, as BART's do. mT5 (Xue 2021) is v1.1 under another name, and
never scales its head whatever its config says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, both

ACTIVATIONS = {
    "relu": "relu",
    "gated-gelu": "geglu_tanh",
    "gated-silu": "swiglu",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
}


def config(model_config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": model_config.vocab_size, "d_model": model_config.hidden_size, "d_kv": model_config.head_dim, "d_ff": model_config.intermediate_size,
        "num_layers": model_config.num_encoder_layers, "num_decoder_layers": model_config.num_layers, "num_heads": model_config.num_heads,
        "relative_attention_num_buckets": model_config.relative_buckets, "relative_attention_max_distance": model_config.relative_max_distance,
        "feed_forward_proj": theirs.get(model_config.activation, model_config.activation), "dropout_rate": model_config.dropout,
        "layer_norm_epsilon": model_config.norm_eps, "n_positions": model_config.max_positions, "is_encoder_decoder": True,
        "tie_word_embeddings": model_config.lm_head_scale != 1, "firth_tied": model_config.tie_embeddings,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    scaled = config.get("scale_decoder_outputs", config.get("tie_word_embeddings", True))
    return ModelConfig(
        vocab_size=config["vocab_size"], hidden_size=config["d_model"], head_dim=config["d_kv"], intermediate_size=config["d_ff"],
        num_encoder_layers=config["num_layers"], num_layers=config.get("num_decoder_layers") or config["num_layers"],
        num_heads=config["num_heads"], max_positions=config.get("n_positions", 512), norm="rms", norm_bias=False,
        norm_eps=config.get("layer_norm_epsilon", 1e-6), position="t5",
        relative_buckets=config.get("relative_attention_num_buckets", 32),
        relative_max_distance=config.get("relative_attention_max_distance", 128), bias=False, scale_attention=False,
        activation=activation(config.get("feed_forward_proj", "relu"), ACTIVATIONS, "feed_forward_proj"),  # type: ignore[arg-type]
        dropout=config.get("dropout_rate", 0.1), tie_embeddings=config.get("firth_tied", config.get("tie_word_embeddings", True)),
        lm_head_scale=config["d_model"] ** -0.5 if scaled else 1.0,
    )  # fmt: skip


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = both({"tokens": "shared"}, "", "", bias=False)
    maps = {x: x for x in "qkvo"}
    up = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if config.gated else {"up": "wi", "down": "wo"}
    for ours, theirs, depth in (
        ("encoder.", "encoder.", config.num_encoder_layers),
        ("stack.", "decoder.", config.num_layers),
    ):
        out += both({"norm": "final_layer_norm"}, ours, theirs, bias=False)
        relative = f"{theirs}block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        out.append(WeightMapping(relative, (f"{ours}relative.weight",)))
        for i in range(depth):
            a, b = f"{ours}blocks.{i}.", f"{theirs}block.{i}.layer."
            last = 2 if ours == "stack." else 1
            out += both(maps, f"{a}attention.", f"{b}0.SelfAttention.", bias=False)
            if last == 2:
                out += both(maps, f"{a}cross.", f"{b}1.EncDecAttention.", bias=False)
                out += both({"cross_norm": "1.layer_norm"}, a, b, bias=False)
            out += both(up, f"{a}mlp.", f"{b}{last}.DenseReluDense.", bias=False)
            out += both({"attention_norm": "0.layer_norm", "mlp_norm": f"{last}.layer_norm"}, a, b, bias=False)
    return out + [WeightMapping("lm_head.weight", ("heads.lm.weight",))] * (
        head and (not config.tie_embeddings or config.lm_head_scale == 1)
    )


FAMILY = Family(
    "t5", ("T5ForConditionalGeneration", "T5Model"), config, shape, entries, "",
    spare=r"embed_tokens\.weight$|EncDecAttention\.relative_attention_bias\.weight$", tied=r"^lm_head\.weight$",
    unused=r"^lm_head\.|^classification_head\.|^qa_outputs\.|^classifier\.",
    heads=(
        HeadSpec("T5ForSequenceClassification", "classes", bert.pooler,
               {"0": "classification_head.dense", "2": "classification_head.out_proj"}, prefix="transformer."),
        HeadSpec("T5ForQuestionAnswering", "span", bert.plain, {"": "qa_outputs"}, num_outputs=2),
    ),
)  # fmt: skip


def never_scaled(config: dict[str, Any]) -> ModelConfig:
    return shape(config | {"scale_decoder_outputs": False})


MT5 = replace(FAMILY, name="mt5", to_config=never_scaled, classes=("MT5ForConditionalGeneration", "MT5Model"), heads=tuple(
    replace(headed, name=f"M{headed.name}") for headed in FAMILY.heads
))  # fmt: skip
