"""Published model families: conversion of their config files and tensor names to firth's and back."""

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
"""`model_type` in config.json -> family."""


def families_of(config: ModelConfig) -> list[Family]:
    """Return the families that support a config exactly; there may be several, such as BERT and ELECTRA."""
    return [family for family in FAMILIES.values() if family.supports(config)]


def family_of(config: ModelConfig) -> Family | None:
    """Return the first family that supports a config, or None."""
    return next(iter(families_of(config)), None)
