"""Published families of models: their config files and tensor names, to ours and back."""

from __future__ import annotations

from firth.model.config import ModelConfig
from firth.pretrained.families import (
    albert,
    bart,
    bert,
    distilbert,
    electra,
    gpt,
    gpt2,
    llama,
    marian,
    mistral,
    modernbert,
    mpnet,
    nanochat,
    qwen,
    roberta,
    t5,
    xlnet,
)
from firth.pretrained.families.family import Family

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        roberta.FAMILY, roberta.XLM, bert.FAMILY, distilbert.FAMILY, albert.FAMILY, electra.FAMILY, gpt.FAMILY,
        gpt2.FAMILY, llama.FAMILY, mistral.FAMILY, qwen.QWEN2, qwen.QWEN3, t5.FAMILY, t5.MT5, bart.FAMILY,
        nanochat.FAMILY, modernbert.FAMILY, xlnet.FAMILY, mpnet.FAMILY, marian.FAMILY,
    )
}  # fmt: skip
"""`model_type` of a config.json -> the family."""


def families_of(config: ModelConfig) -> list[Family]:
    """The families that express a shape exactly: a body of BERT's is also one of ELECTRA's."""
    return [family for family in FAMILIES.values() if family.supports(config)]


def family_of(config: ModelConfig) -> Family | None:
    """The first of them, or None."""
    return next(iter(families_of(config)), None)
