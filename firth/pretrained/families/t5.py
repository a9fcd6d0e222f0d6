"""T5 (Raffel 2019), the default encoder-decoder: relative positions, RMSNorm, no biases.

`firth.pretrained.load_save` reads and writes the files of every family; here is what is T5's own.

v1.0 has ReLU and a tied LM head whose inputs are scaled by hidden_size ** -0.5; v1.1 has GeGLU and no scale.
`tie_word_embeddings` in config.json selects the scale: transformers 5 reads false as "do not scale" (and ties unless the
file has an LM head), transformers 4 as "do not scale, do not tie". An unscaled model is therefore written with false and
with its LM head stored, tied or not, so that both versions compute the same as firth.

In its task classes the decoder reads the input again, as BART's does. mT5 (Xue 2021) is v1.1 under another name and never
scales its LM head, whatever its config says.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from firth.model.config import ModelConfig
from firth.model.config_groups import AttentionConfig, EncoderConfig, LMHeadConfig, NormConfig, PositionConfig
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, module_mappings

ACTIVATIONS = {
    "relu": "relu",
    "gated-gelu": "geglu_tanh",
    "gated-silu": "swiglu",
    "gelu_new": "gelu_tanh",
    "silu": "silu",
}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    return {
        "vocab_size": config.vocab_size, "d_model": config.hidden_size, "d_kv": config.head_dim, "d_ff": config.intermediate_size,
        "num_layers": config.encoder.num_layers, "num_decoder_layers": config.num_layers, "num_heads": config.num_heads,
        "relative_attention_num_buckets": config.position.relative_buckets,
        "relative_attention_max_distance": config.position.relative_max_distance,
        "feed_forward_proj": theirs.get(config.activation, config.activation), "dropout_rate": config.dropout,
        "layer_norm_epsilon": config.norm.eps, "n_positions": config.max_positions, "is_encoder_decoder": True,
        "tie_word_embeddings": config.lm_head.scale != 1, "firth_tied": config.tie_embeddings,
    }  # fmt: skip


def to_config(hf: dict[str, Any]) -> ModelConfig:
    scaled = hf.get("scale_decoder_outputs", hf.get("tie_word_embeddings", True))
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["d_model"], head_dim=hf["d_kv"], intermediate_size=hf["d_ff"],
        encoder=EncoderConfig(num_layers=hf["num_layers"]), num_layers=hf.get("num_decoder_layers") or hf["num_layers"],
        num_heads=hf["num_heads"], max_positions=hf.get("n_positions", 512),
        norm=NormConfig("rms", bias=False, eps=hf.get("layer_norm_epsilon", 1e-6)),
        position=PositionConfig(
            "t5", relative_buckets=hf.get("relative_attention_num_buckets", 32),
            relative_max_distance=hf.get("relative_attention_max_distance", 128),
        ),
        bias=False, attention=AttentionConfig(scale_scores=False),
        activation=activation(hf.get("feed_forward_proj", "relu"), ACTIVATIONS, "feed_forward_proj"),  # type: ignore[arg-type]
        dropout=hf.get("dropout_rate", 0.1), tie_embeddings=hf.get("firth_tied", hf.get("tie_word_embeddings", True)),
        lm_head=LMHeadConfig(scale=hf["d_model"] ** -0.5 if scaled else 1.0),
    )  # fmt: skip


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = module_mappings({"tokens": "shared"}, "", "", bias=False)
    maps = {x: x for x in "qkvo"}
    up = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if config.gated else {"up": "wi", "down": "wo"}
    for ours, theirs, depth in (
        ("encoder.", "encoder.", config.encoder.num_layers),
        ("stack.", "decoder.", config.num_layers),
    ):
        out += module_mappings({"norm": "final_layer_norm"}, ours, theirs, bias=False)
        relative = f"{theirs}block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        out.append(WeightMapping(relative, (f"{ours}relative.weight",)))
        for i in range(depth):
            a, b = f"{ours}blocks.{i}.", f"{theirs}block.{i}.layer."
            last = 2 if ours == "stack." else 1
            out += module_mappings(maps, f"{a}attention.", f"{b}0.SelfAttention.", bias=False)
            if last == 2:
                out += module_mappings(maps, f"{a}cross.", f"{b}1.EncDecAttention.", bias=False)
                out += module_mappings({"cross_norm": "1.layer_norm"}, a, b, bias=False)
            out += module_mappings(up, f"{a}mlp.", f"{b}{last}.DenseReluDense.", bias=False)
            out += module_mappings(
                {"attention_norm": "0.layer_norm", "mlp_norm": f"{last}.layer_norm"}, a, b, bias=False
            )
    return out + [WeightMapping("lm_head.weight", ("heads.lm.weight",))] * (
        head and (not config.tie_embeddings or config.lm_head.scale == 1)
    )


FAMILY = Family(
    "t5", ("T5ForConditionalGeneration", "T5Model"), to_hf_config, to_config, weight_mappings, "",
    ignored_names=r"embed_tokens\.weight$|EncDecAttention\.relative_attention_bias\.weight$", tied_names=r"^lm_head\.weight$",
    unused_heads=r"^lm_head\.|^classification_head\.|^qa_outputs\.|^classifier\.",
    heads=(
        HeadSpec("T5ForSequenceClassification", "classes", bert.pooled_head,
               {"0": "classification_head.dense", "2": "classification_head.out_proj"}, prefix="transformer."),
        HeadSpec("T5ForQuestionAnswering", "span", bert.linear_head, {"": "qa_outputs"}, num_outputs=2),
    ),
)  # fmt: skip


def to_mt5_config(hf: dict[str, Any]) -> ModelConfig:
    return to_config(hf | {"scale_decoder_outputs": False})


MT5 = replace(FAMILY, name="mt5", to_config=to_mt5_config, classes=("MT5ForConditionalGeneration", "MT5Model"), heads=tuple(
    replace(spec, name=f"M{spec.name}") for spec in FAMILY.heads
))  # fmt: skip
