"""Marian (Junczys-Dowmunt 2018; the OPUS-MT translators): Vaswani's Transformer, a post-norm encoder-decoder.

BART's blocks with sinusoidal positions, which no file holds, in the place of learned ones, and without a norm on the
embeddings, which are scaled by the root of the width. One table serves both sides and the head; the decoder begins at the
padding token. The offset of its logits is a constant there; here it is a parameter.

The weights alone are read: OPUS-MT's tokenizers are two SentencePiece files with a dictionary, and no tokenizer.json.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import bart
from firth.pretrained.families.family import Family, WeightMapping, activation, check_supported
from firth.types import UserError

ACTIVATIONS = {"swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
PLAIN = {
    "share_encoder_decoder_embeddings": True, "tie_word_embeddings": True, "normalize_before": False,
    "normalize_embedding": False, "add_final_layer_norm": False, "static_position_embeddings": True,
}  # fmt: skip


def config(model_config: ModelConfig) -> dict[str, Any]:
    own = {
        "scale_embedding": model_config.embedding_scale != 1,
        "decoder_vocab_size": model_config.vocab_size,
        "forced_eos_token_id": None,
    }
    return bart.config(model_config) | own | PLAIN


def shape(config: dict[str, Any]) -> ModelConfig:
    check_supported(config, PLAIN)
    vocab, width = config["vocab_size"], config["d_model"]
    if (config.get("decoder_vocab_size") or vocab) != vocab:
        raise UserError("config.json has another vocabulary in its decoder; firth's two sides have the same")
    act = activation(config.get("activation_function", "gelu"), ACTIVATIONS, "activation_function")
    scaled = config.get("scale_embedding", False)
    body = bart.shape(config | {"scale_embedding": False, "activation_function": "gelu"})
    return replace(
        body, position="marian", embedding_norm=False, activation=act, decoder_start_token="pad",  # type: ignore[arg-type]
        embedding_scale=width**0.5 if scaled else 1.0,
    )  # fmt: skip


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    return [entry for entry in bart.entries(config, head) if not entry.hf_name.endswith(ABSENT)]


ABSENT = ("embed_positions.weight", "layernorm_embedding.weight", "layernorm_embedding.bias")
"""BART's tensors that Marian has not, or makes anew."""

FAMILY = Family(
    "marian", ("MarianMTModel", "MarianModel"), config, shape, entries, "model.",
    spare=r"embed_tokens\.weight$|embed_positions\.weight$|\.version$", tied=r"^lm_head\.weight$",
    unused=r"^final_logits_bias$",
)  # fmt: skip
