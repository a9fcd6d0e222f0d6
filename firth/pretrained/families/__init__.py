"""Published model families: conversion of their config files and tensor names to firth's and back."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator

from firth.io import user_code
from firth.model.config import ModelConfig
from firth.pretrained.families import bart, bert, gpt2, llama, modernbert, mpnet, nanochat, t5, xlnet
from firth.pretrained.families.family import Family
from firth.types import UserError

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        nanochat.FAMILY, gpt2.GPT, gpt2.FAMILY, llama.FAMILY, llama.MISTRAL, llama.QWEN2, llama.QWEN3,
        bert.ROBERTA, bert.XLM_ROBERTA, bert.FAMILY, bert.DISTILBERT, bert.ALBERT, bert.ELECTRA, modernbert.FAMILY,
        xlnet.FAMILY, mpnet.FAMILY, t5.FAMILY, t5.MT5, bart.FAMILY, bart.MARIAN,
    )
}  # fmt: skip
"""`model_type` in config.json -> family. Of families that support the same config, an export takes the first."""


def find(name: str) -> Family | None:
    """Return the family of a `model_type`, or None."""
    return FAMILIES.get(name) or _user_families(os.environ.get(USER_FAMILIES, "")).get(name)


def names() -> list[str]:
    """Return the `model_type` of every known family."""
    return [*FAMILIES, *_user_families(os.environ.get(USER_FAMILIES, ""))]


def families_of(config: ModelConfig) -> Iterator[Family]:
    """Yield the families that support a config exactly, the user's first; there may be several, such as BERT and ELECTRA."""
    known = [*_user_families(os.environ.get(USER_FAMILIES, "")).values(), *FAMILIES.values()]
    return (family for family in known if family.supports(config))


def family_of(config: ModelConfig) -> Family | None:
    """Return the first family that supports a config, or None."""
    return next(families_of(config), None)


USER_FAMILIES = "FIRTH_FAMILIES"
"""Environment variable with the user's families: `module:attribute`, separated by commas. A model directory cannot name one."""


@functools.cache
def _user_families(named: str) -> dict[str, Family]:
    """Return the families in a value of `USER_FAMILIES` by `model_type`.

    Raises:
        UserError: A name is not a family, or its `model_type` is taken.
    """
    found: dict[str, Family] = {}
    for name in filter(None, (one.strip() for one in named.split(","))):
        family = user_code.find(name, "family")
        if not isinstance(family, Family):
            raise UserError(f"{USER_FAMILIES}: {name!r} is a {type(family).__name__} and no Family")
        if family.name in {**FAMILIES, **found}:
            raise UserError(f"{USER_FAMILIES}: {name!r} has model_type {family.name!r}, which another family has")
        found[family.name] = family
    return found
