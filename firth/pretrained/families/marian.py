"""Marian (Junczys-Dowmunt 2018; the OPUS-MT translators): Vaswani's Transformer, a post-norm encoder-decoder.

BART's blocks with sinusoidal positions (not stored in files) in place of learned ones, and embeddings without a norm that
are scaled by sqrt(hidden_size). Encoder, decoder and LM head share one table; the decoder starts with the padding token.
The bias of its logits is a constant buffer in transformers and a parameter here.

Only the weights are read: OPUS-MT's tokenizers are two SentencePiece files with a vocabulary, without a tokenizer.json.
"""

from __future__ import annotations

from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import bart
from firth.pretrained.families.family import Family, WeightMapping, activation, check_supported
from firth.types import UserError

ACTIVATIONS = {"swish": "silu", "silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}
SUPPORTED = {
    "share_encoder_decoder_embeddings": True, "tie_word_embeddings": True, "normalize_before": False,
    "normalize_embedding": False, "add_final_layer_norm": False, "static_position_embeddings": True,
}  # fmt: skip


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    own = {
        "scale_embedding": config.embedding.scale != 1,
        "decoder_vocab_size": config.vocab_size,
        "forced_eos_token_id": None,
    }
    return bart.to_hf_config(config) | own | SUPPORTED


def to_config(hf: dict[str, Any]) -> ModelConfig:
    check_supported(hf, SUPPORTED)
    vocab, width = hf["vocab_size"], hf["d_model"]
    if (hf.get("decoder_vocab_size") or vocab) != vocab:
        raise UserError("config.json has a different vocabulary in its decoder; firth supports a shared one only")
    act = activation(hf.get("activation_function", "gelu"), ACTIVATIONS, "activation_function")
    scaled = hf.get("scale_embedding", False)
    body = bart.to_config(hf | {"scale_embedding": False, "activation_function": "gelu"})
    return body.with_fields(
        {
            "position.type": "marian",
            "norm.embedding": False,
            "activation": act,
            "encoder.decoder_start_token": "pad",
            "embedding.scale": width**0.5 if scaled else 1.0,
        }
    )


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    return [entry for entry in bart.weight_mappings(config, head) if not entry.hf_name.endswith(ABSENT)]


ABSENT = ("embed_positions.weight", "layernorm_embedding.weight", "layernorm_embedding.bias")
"""BART's tensors that Marian lacks or computes."""

FAMILY = Family(
    "marian", ("MarianMTModel", "MarianModel"), to_hf_config, to_config, weight_mappings, "model.",
    ignored_names=r"embed_tokens\.weight$|embed_positions\.weight$|\.version$", tied_names=r"^lm_head\.weight$",
    unused_heads=r"^final_logits_bias$",
)  # fmt: skip
