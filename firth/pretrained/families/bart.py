"""BART, and Marian, which has its blocks.

BART (Lewis 2019): a post-norm encoder-decoder with learned positions, GELU and one tied embedding table.

The first two rows of its position tables are unused (an offset left over from padding), and its decoder starts with the
end-of-text token. The bias of its logits is a constant buffer in transformers and a parameter here.

For tasks the decoder reads the whole input again: the head `classes` reads the last end-of-text token, the head `span`
reads every position.

Marian (Junczys-Dowmunt 2018; the OPUS-MT translators): Vaswani's Transformer, a post-norm encoder-decoder. BART's blocks
with sinusoidal positions (not stored in files) in place of learned ones, and embeddings without a norm that are scaled by
sqrt(hidden_size). Encoder, decoder and LM head share one table; the decoder starts with the padding token. The bias of its
logits is a constant buffer in transformers and a parameter here.

Only the weights are read: OPUS-MT's tokenizers are two SentencePiece files with a vocabulary, without a tokenizer.json.
"""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.model.config_groups import EncoderConfig, LMHeadConfig, NormConfig
from firth.pretrained.families import bert
from firth.pretrained.families.family import (
    Family,
    HeadSpec,
    WeightMapping,
    activation,
    check_supported,
    module_mappings,
)
from firth.types import UserError

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}
UNUSED_ROWS = 2
"""Unused leading rows of a position table."""


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    theirs = {ours: name for name, ours in ACTIVATIONS.items()}
    sides = {"encoder": config.encoder.num_layers, "decoder": config.num_layers}
    return {
        "vocab_size": config.vocab_size, "d_model": config.hidden_size, "max_position_embeddings": config.max_positions,
        **{f"{side}_layers": depth for side, depth in sides.items()},
        **{f"{side}_attention_heads": config.num_heads for side in sides},
        **{f"{side}_ffn_dim": config.intermediate_size for side in sides},
        "activation_function": theirs.get(config.activation, config.activation), "dropout": config.dropout,
        "attention_dropout": config.dropout, "activation_dropout": 0.0, "scale_embedding": False, "init_std": 0.02,
        "is_encoder_decoder": True, "tie_word_embeddings": config.tie_embeddings,
        "forced_eos_token_id": None, "forced_bos_token_id": None,
    }  # fmt: skip


def to_config(hf: dict[str, Any]) -> ModelConfig:
    for name in ("attention_heads", "ffn_dim"):
        if hf[f"encoder_{name}"] != hf[f"decoder_{name}"]:
            raise UserError(f"config.json has different {name} in encoder and decoder; firth supports equal ones only")
    if hf.get("scale_embedding") or not hf.get("tie_word_embeddings", True):
        raise UserError("config.json has scaled or untied embeddings, which firth does not support for BART")
    act = activation(hf.get("activation_function", "gelu"), ACTIVATIONS, "activation_function")
    return ModelConfig(
        vocab_size=hf["vocab_size"], hidden_size=hf["d_model"],
        encoder=EncoderConfig(num_layers=hf["encoder_layers"], decoder_start_token="eos"),
        num_layers=hf["decoder_layers"], num_heads=hf["encoder_attention_heads"], intermediate_size=hf["encoder_ffn_dim"],
        max_positions=hf["max_position_embeddings"], norm=NormConfig(placement="post", embedding=True), activation=act,  # type: ignore[arg-type]
        dropout=hf.get("dropout", 0.1), lm_head=LMHeadConfig(bias=True),
    )  # fmt: skip


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = module_mappings({"tokens": "shared"}, "", "model.", bias=False)
    for ours, theirs, places, depth in (
        ("encoder.", "model.encoder.", "source_places", config.encoder.num_layers),
        ("stack.", "model.decoder.", "places", config.num_layers),
    ):
        out.append(WeightMapping(f"{theirs}embed_positions.weight", (f"{places}.weight",), unused_rows=UNUSED_ROWS))
        out += module_mappings({"embed_norm": "layernorm_embedding"}, ours, theirs, bias=True)
        block = {f"attention.{x}": f"self_attn.{y}" for x, y in PROJECTIONS.items()} | {
            "attention_norm": "self_attn_layer_norm", "mlp.up": "fc1", "mlp.down": "fc2", "mlp_norm": "final_layer_norm",
        }  # fmt: skip
        if ours == "stack.":
            block |= {f"cross.{x}": f"encoder_attn.{y}" for x, y in PROJECTIONS.items()}
            block["cross_norm"] = "encoder_attn_layer_norm"
        for i in range(depth):
            out += module_mappings(block, f"{ours}blocks.{i}.", f"{theirs}layers.{i}.", bias=True)
    return (
        out
        + [
            WeightMapping(
                "final_logits_bias", ("heads.lm.bias",), shapes=((config.vocab_size,), (1, config.vocab_size))
            )
        ]
        * head
    )


PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "out_proj"}

FAMILY = Family(
    "bart", ("BartForConditionalGeneration", "BartModel"), to_hf_config, to_config, weight_mappings, "model.",
    ignored_names=r"embed_tokens\.weight$|\.version$", tied_names=r"^lm_head\.weight$",
    unused_heads=r"^classification_head\.|^qa_outputs\.|^final_logits_bias$",
    heads=(
        HeadSpec("BartForSequenceClassification", "classes", bert.pooled_head,
               {"0": "classification_head.dense", "2": "classification_head.out_proj"}),
        HeadSpec("BartForQuestionAnswering", "span", bert.linear_head, {"": "qa_outputs"}, num_outputs=2),
    ),
)  # fmt: skip


MARIAN_ACTIVATIONS = {"swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
MARIAN_SUPPORTED = {
    "share_encoder_decoder_embeddings": True, "tie_word_embeddings": True, "normalize_before": False,
    "normalize_embedding": False, "add_final_layer_norm": False, "static_position_embeddings": True,
}  # fmt: skip


def marian_to_hf_config(config: ModelConfig) -> dict[str, Any]:
    own = {
        "scale_embedding": config.embedding.scale != 1,
        "decoder_vocab_size": config.vocab_size,
        "forced_eos_token_id": None,
    }
    return to_hf_config(config) | own | MARIAN_SUPPORTED


def marian_to_config(hf: dict[str, Any]) -> ModelConfig:
    check_supported(hf, MARIAN_SUPPORTED)
    vocab, width = hf["vocab_size"], hf["d_model"]
    if (hf.get("decoder_vocab_size") or vocab) != vocab:
        raise UserError("config.json has a different vocabulary in its decoder; firth supports a shared one only")
    act = activation(hf.get("activation_function", "gelu"), MARIAN_ACTIVATIONS, "activation_function")
    scaled = hf.get("scale_embedding", False)
    body = to_config(hf | {"scale_embedding": False, "activation_function": "gelu"})
    return body.with_fields(
        {
            "position.type": "marian",
            "norm.embedding": False,
            "activation": act,
            "encoder.decoder_start_token": "pad",
            "embedding.scale": width**0.5 if scaled else 1.0,
        }
    )


def marian_weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    return [entry for entry in weight_mappings(config, head) if not entry.hf_name.endswith(MARIAN_ABSENT)]


MARIAN_ABSENT = ("embed_positions.weight", "layernorm_embedding.weight", "layernorm_embedding.bias")
"""BART's tensors that Marian lacks or computes."""

MARIAN = Family(
    "marian", ("MarianMTModel", "MarianModel"), marian_to_hf_config, marian_to_config, marian_weight_mappings, "model.",
    ignored_names=r"embed_tokens\.weight$|embed_positions\.weight$|\.version$", tied_names=r"^lm_head\.weight$",
    unused_heads=r"^final_logits_bias$",
)  # fmt: skip
