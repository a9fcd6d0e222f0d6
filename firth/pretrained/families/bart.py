"""BART (Lewis 2019): a post-norm encoder-decoder with learned positions for each side, GELU and one tied table.

Its position tables begin with two rows that are never read (an offset left over from padding), and its decoder begins
at the stop token. The offset of its logits is a constant row of zeros there; here it is a parameter.

For a task its decoder reads the whole text once more: a class is read at the stop token's last place there (part
`classes`), the ends of an answer at every place (`span`).
"""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, activation, both
from firth.types import UserError

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}
UNREAD = 2
"""Rows in front of a table of positions."""


def config(model_config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    sides = {"encoder": model_config.num_encoder_layers, "decoder": model_config.num_layers}
    return {
        "vocab_size": model_config.vocab_size, "d_model": model_config.hidden_size, "max_position_embeddings": model_config.max_positions,
        **{f"{side}_layers": depth for side, depth in sides.items()},
        **{f"{side}_attention_heads": model_config.num_heads for side in sides},
        **{f"{side}_ffn_dim": model_config.intermediate_size for side in sides},
        "activation_function": theirs.get(model_config.activation, model_config.activation), "dropout": model_config.dropout,
        "attention_dropout": model_config.dropout, "activation_dropout": 0.0, "scale_embedding": False, "init_std": 0.02,
        "is_encoder_decoder": True, "tie_word_embeddings": model_config.tie_embeddings,
        "forced_eos_token_id": None, "forced_bos_token_id": None,
    }  # fmt: skip


def shape(config: dict[str, Any]) -> ModelConfig:
    for name in ("attention_heads", "ffn_dim"):
        if config[f"encoder_{name}"] != config[f"decoder_{name}"]:
            raise UserError(f"config.json has another {name} in its decoder; firth's two sides have the same")
    if config.get("scale_embedding") or not config.get("tie_word_embeddings", True):
        raise UserError("config.json asks for scaled or untied embeddings, which firth's BART does not have")
    act = activation(config.get("activation_function", "gelu"), ACTIVATIONS, "activation_function")
    return ModelConfig(
        vocab_size=config["vocab_size"], hidden_size=config["d_model"], num_encoder_layers=config["encoder_layers"],
        num_layers=config["decoder_layers"], num_heads=config["encoder_attention_heads"], intermediate_size=config["encoder_ffn_dim"],
        max_positions=config["max_position_embeddings"], norm_placement="post", embedding_norm=True, activation=act,  # type: ignore[arg-type]
        dropout=config.get("dropout", 0.1), lm_head_bias=True, decoder_start_token="eos",
    )  # fmt: skip


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = both({"tokens": "shared"}, "", "model.", bias=False)
    for ours, theirs, places, depth in (
        ("encoder.", "model.encoder.", "source_places", config.num_encoder_layers),
        ("stack.", "model.decoder.", "places", config.num_layers),
    ):
        out.append(WeightMapping(f"{theirs}embed_positions.weight", (f"{places}.weight",), ignored=UNREAD))
        out += both({"embed_norm": "layernorm_embedding"}, ours, theirs, bias=True)
        block = {f"attention.{x}": f"self_attn.{y}" for x, y in MAPS.items()} | {
            "attention_norm": "self_attn_layer_norm", "mlp.up": "fc1", "mlp.down": "fc2", "mlp_norm": "final_layer_norm",
        }  # fmt: skip
        if ours == "stack.":
            block |= {f"cross.{x}": f"encoder_attn.{y}" for x, y in MAPS.items()}
            block["cross_norm"] = "encoder_attn_layer_norm"
        for i in range(depth):
            out += both(block, f"{ours}blocks.{i}.", f"{theirs}layers.{i}.", bias=True)
    return (
        out
        + [
            WeightMapping(
                "final_logits_bias", ("heads.lm.bias",), merged=((config.vocab_size,), (1, config.vocab_size))
            )
        ]
        * head
    )


MAPS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}

FAMILY = Family(
    "bart", ("BartForConditionalGeneration", "BartModel"), config, shape, entries, "model.",
    spare=r"embed_tokens\.weight$|\.version$", tied=r"^lm_head\.weight$",
    unused=r"^classification_head\.|^qa_outputs\.|^final_logits_bias$",
    heads=(
        HeadSpec("BartForSequenceClassification", "classes", bert.pooler,
               {"0": "classification_head.dense", "2": "classification_head.out_proj"}),
        HeadSpec("BartForQuestionAnswering", "span", bert.plain, {"": "qa_outputs"}, num_outputs=2),
    ),
)  # fmt: skip
