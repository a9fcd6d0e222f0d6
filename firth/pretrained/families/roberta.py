"""RoBERTa (Liu 2019): BERT's layers with one token type, other names for the head, and positions that start at 2.

The first two rows of its position table belong to padding and are unused. Positions are counted over the tokens that are
not padding and start at pad_token_id + 1, which is 2; no other pad_token_id is supported. A model of this config whose
tokenizer pads with another id is written as a BERT with one token type, which computes the same. XLM-RoBERTa (Conneau
2020) differs by its name and its tokenizer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, WeightMapping, activation, check_supported, module_mappings
from firth.types import UserError

PAD = 1


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    return {
        **bert.to_hf_config(config),
        "max_position_embeddings": config.max_positions + PAD + 1,
        "pad_token_id": PAD,
    }


def to_config(hf: dict[str, Any]) -> ModelConfig:
    check_supported(hf, {"pad_token_id": PAD})
    found = bert.to_config(hf)
    activation(hf.get("hidden_act", "gelu"), {"gelu": "gelu"}, "hidden_act")  # its head always has GELU
    if found.embedding.type_vocab_size != 1:
        raise UserError(f"config.json has type_vocab_size={found.embedding.type_vocab_size}; a RoBERTa must have 1")
    return replace(found, max_positions=found.max_positions - PAD - 1)


def weight_mappings(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = bert.embedding_mappings("roberta.", PAD + 1) + bert.block_mappings(config, "roberta.")
    if head:
        out += module_mappings({"dense": "dense", "norm": "layer_norm"}, "heads.lm.", "lm_head.", bias=True)
        out.append(WeightMapping("lm_head.bias", ("heads.lm.bias",)))
        # An untied decoder has a bias of its own, which is the one that is used: it comes last.
        out += module_mappings({"": "decoder"}, "heads.lm", "lm_head.", bias=True) * (not config.tie_embeddings)
    return out


FAMILY = Family(
    "roberta", ("RobertaForMaskedLM", "RobertaModel"), to_hf_config, to_config, weight_mappings, "roberta.",
    ignored_names=r"position_ids$", tied_names=r"^lm_head\.decoder\.",
    unused_heads=r"^roberta\.pooler\.|^lm_head\.|^classifier\.|^qa_outputs\.",
    heads=bert.task_heads(
        "Roberta", {"0": "classifier.dense", "2": "classifier.out_proj"},
        {"0": "roberta.pooler.dense", "2": "classifier"},
    ),
    pad_token_id=PAD,
)  # fmt: skip

XLM = replace(FAMILY, name="xlm-roberta", classes=("XLMRobertaForMaskedLM", "XLMRobertaModel"), heads=tuple(
    replace(spec, name=f"XLM{spec.name}") for spec in FAMILY.heads
))  # fmt: skip
