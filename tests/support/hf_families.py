"""A small model of each published family, in firth and in transformers, with random weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from firth.model.config import ModelConfig, decoder_config, encoder_config
from firth.model.config_groups import (
    AttentionConfig,
    EmbeddingConfig,
    EncoderConfig,
    LMHeadConfig,
    NormConfig,
    PositionConfig,
)

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "max_positions": 40,
    "intermediate_size": 48,
}
BERT = ModelConfig(
    **SIZES,
    causal=False,
    norm=NormConfig(placement="post", eps=1e-12, embedding=True),
    embedding=EmbeddingConfig(type_vocab_size=2),
    activation="gelu",
    lm_head=LMHeadConfig("transform", bias=True),
)
LLAMA = ModelConfig(
    **SIZES, num_kv_heads=2, norm=NormConfig("rms", bias=False, eps=1e-6), position=PositionConfig("rotary"),
    activation="swiglu", bias=False, tie_embeddings=False,
)  # fmt: skip
T5 = ModelConfig(
    **SIZES | {"max_positions": 512}, encoder=EncoderConfig(num_layers=3), head_dim=6, norm=NormConfig("rms", bias=False, eps=1e-6),
    position=PositionConfig("t5", relative_max_distance=16, relative_buckets=8), activation="relu", bias=False,
    attention=AttentionConfig(scale_scores=False), lm_head=LMHeadConfig(scale=32**-0.5),
)  # fmt: skip
BART = ModelConfig(
    **SIZES, encoder=EncoderConfig(num_layers=3, decoder_start_token="eos"), norm=NormConfig(placement="post", embedding=True),
    activation="gelu", lm_head=LMHeadConfig(bias=True),
)  # fmt: skip
MARIAN = BART.with_fields(
    {
        "position.type": "marian",
        "norm.embedding": False,
        "embedding.scale": 32**0.5,
        "encoder.decoder_start_token": "pad",
    }
)
XLNET = ModelConfig(
    **SIZES, causal=False, norm=NormConfig(placement="post", eps=1e-12), position=PositionConfig("xlnet"),
    embedding=EmbeddingConfig(mask=True, type_vocab_size=2), activation="gelu", lm_head=LMHeadConfig(bias=True),
)  # fmt: skip
MPNET = BERT.with_fields({"embedding.type_vocab_size": 0, "position.type": "mpnet"})
CONFIGS = {
    "xlnet": XLNET,
    "xlnet-untied": XLNET.with_fields({"tie_embeddings": False, "attention.memory_length": 7, "activation": "relu"}),
    "mpnet": MPNET,
    "mpnet-untied": replace(MPNET, tie_embeddings=False),
    "bert": BERT,
    "bert-untied": replace(BERT, tie_embeddings=False),
    "albert": BERT.with_fields({"embedding.size": 12, "num_layer_groups": 1, "num_layers": 3}),
    "albert-two-groups": BERT.with_fields(
        {"embedding.size": 32, "num_layer_groups": 2, "num_layers": 5, "activation": "gelu_tanh", "tie_embeddings": False}
    ),
    "electra": BERT.with_fields({"embedding.size": 12}),
    "bart": BART,
    "marian": MARIAN,
    "marian-swish": MARIAN.with_fields({"embedding.scale": 1.0, "activation": "silu"}),
    "gpt2": ModelConfig(**SIZES),
    "llama": LLAMA,
    "llama-tied": LLAMA.with_fields({"tie_embeddings": True, "bias": True, "head_dim": 10, "position.rope.theta": 5000.0}),
    "t5-v1.0": T5,
    "t5-v1.1": T5.with_fields({"activation": "geglu_tanh", "lm_head.scale": 1.0, "tie_embeddings": False}),
    "t5-v1.1-tied": T5.with_fields({"activation": "geglu_tanh", "lm_head.scale": 1.0}),
    "nanochat": decoder_config(61, 32, 2, num_heads=4, max_positions=40).with_fields({"num_kv_heads": 2, "init.zero_output": False}),
    "modernbert": encoder_config(61, 32, 2, num_heads=4, max_positions=40).with_fields({"init.zero_output": False}),
    "modernbert-silu": encoder_config(61, 32, 2, num_heads=4, max_positions=40).with_fields(
        {"init.zero_output": False, "activation": "swiglu"}
    ),
}  # fmt: skip
MARIAN_IDS = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "forced_eos_token_id": 2}
AUTO_CLASSES = {
    "xlnet": "AutoModelForCausalLM", "mpnet": "AutoModelForMaskedLM",
    "albert": "AutoModelForMaskedLM", "electra": "AutoModelForMaskedLM",
    "bert": "AutoModelForMaskedLM", "modernbert": "AutoModelForMaskedLM", "gpt2": "AutoModelForCausalLM",
    "llama": "AutoModelForCausalLM", "nanochat": "AutoModelForCausalLM", "t5": "AutoModelForSeq2SeqLM",
    "bart": "AutoModelForSeq2SeqLM", "marian": "AutoModelForSeq2SeqLM",
}  # fmt: skip


def random_hf_model(name: str) -> torch.nn.Module:
    t = transformers
    torch.manual_seed(3)
    usual = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 50,
    }
    five = {"vocab_size": 61, "d_model": 32, "d_kv": 6, "d_ff": 50, "num_layers": 2, "num_heads": 4}
    two = {
        "vocab_size": 61,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    six = {"vocab_size": 61, "d_model": 32, "max_position_embeddings": 40}
    for side, depth in (("encoder", 2), ("decoder", 3)):
        six |= {f"{side}_layers": depth, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 50}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    gated = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    full = {"layer_types": ["full_attention"] * 2}
    nine = {"vocab_size": 61, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 50}
    configs = {
        "xlnet": lambda: t.XLNetLMHeadModel(t.XLNetConfig(**nine)),
        "mpnet": lambda: t.MPNetForMaskedLM(t.MPNetConfig(**usual, max_position_embeddings=42)),
        "bert": lambda: t.BertForMaskedLM(t.BertConfig(**usual, max_position_embeddings=40)),
        "albert": lambda: t.AlbertForMaskedLM(t.AlbertConfig(**usual, embedding_size=12, num_hidden_groups=2)),
        "electra": lambda: t.ElectraForMaskedLM(t.ElectraConfig(**usual, embedding_size=12)),
        "electra-wide": lambda: t.ElectraForMaskedLM(t.ElectraConfig(**usual, embedding_size=32)),
        "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**six, **ids)),
        "marian": lambda: t.MarianMTModel(t.MarianConfig(**six, **MARIAN_IDS, scale_embedding=True)),
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**two)),
        "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**usual, num_key_value_heads=2)),
        "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(**five, num_decoder_layers=3)),
        "t5-gated": lambda: t.T5ForConditionalGeneration(t.T5Config(**five, **gated)),
        "nanochat": lambda: t.NanoChatForCausalLM(t.NanoChatConfig(**usual)),
        "modernbert": lambda: t.ModernBertForMaskedLM(t.ModernBertConfig(**usual, **ids, **full)),
    }
    model = configs[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # Marian's sinusoidal positions do not, and no file has them
                parameter.add_(torch.randn_like(parameter) * 0.15)
        if name in ("bart", "marian"):  # a buffer of zeros: other values show that it is read
            model.final_logits_bias.normal_()
    return model.eval()
