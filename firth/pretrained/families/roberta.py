"""RoBERTa (Liu 2019): BERT's layers with one segment, a head named otherwise, and positions that begin at 2.

Their table of positions has two rows in front that belong to padding, and nobody reads them. Positions are counted over
the tokens whose id is not the pad's, and begin behind it: 2 with their pad, 1, which is the only one that we read. A
model of this shape whose tokenizer pads with another id is written as a BERT with one segment, which computes the same.
XLM-RoBERTa (Conneau 2020) differs by its name and its tokenizer.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from firth.model.config import ModelConfig
from firth.pretrained.families import bert
from firth.pretrained.families.family import Family, WeightMapping, activation, both, check_supported
from firth.types import UserError

PAD = 1


def config(model_config: ModelConfig) -> dict[str, Any]:
    return {
        **bert.config(model_config),
        "max_position_embeddings": model_config.max_positions + PAD + 1,
        "pad_token_id": PAD,
    }


def shape(config: dict[str, Any]) -> ModelConfig:
    check_supported(config, {"pad_token_id": PAD})
    found = bert.shape(config)
    activation(config.get("hidden_act", "gelu"), {"gelu": "gelu"}, "hidden_act")  # their head has GELU whatever it says
    if found.type_vocab_size != 1:
        raise UserError(f"a RoBERTa has one segment, and config.json has type_vocab_size={found.type_vocab_size}")
    return replace(found, max_positions=found.max_positions - PAD - 1)


def entries(config: ModelConfig, head: bool) -> list[WeightMapping]:
    out = bert.tables("roberta.", PAD + 1) + bert.layers(config, "roberta.")
    if head:
        out += both({"dense": "dense", "norm": "layer_norm"}, "heads.lm.", "lm_head.", bias=True)
        out.append(WeightMapping("lm_head.bias", ("heads.lm.bias",)))
        # Untied, their decoder has an offset of its own too, and that is the one which is used: it comes last.
        out += both({"": "decoder"}, "heads.lm", "lm_head.", bias=True) * (not config.tie_embeddings)
    return out


FAMILY = Family(
    "roberta", ("RobertaForMaskedLM", "RobertaModel"), config, shape, entries, "roberta.",
    spare=r"position_ids$", tied=r"^lm_head\.decoder\.",
    unused=r"^roberta\.pooler\.|^lm_head\.|^classifier\.|^qa_outputs\.",
    heads=bert.tasks(
        "Roberta", {"0": "classifier.dense", "2": "classifier.out_proj"},
        {"0": "roberta.pooler.dense", "2": "classifier"},
    ),
    pad=PAD,
)  # fmt: skip

XLM = replace(FAMILY, name="xlm-roberta", classes=("XLMRobertaForMaskedLM", "XLMRobertaModel"), heads=tuple(
    replace(headed, name=f"XLM{headed.name}") for headed in FAMILY.heads
))  # fmt: skip
