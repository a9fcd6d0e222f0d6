"""Published families of models: their config files and tensor names, to ours and back."""

from __future__ import annotations

from firth.model.families import albert, bart, bert, electra, gpt2, llama, modernbert, mpnet, nanochat, t5, xlnet
from firth.model.families.family import Family
from firth.model.shape import Shape

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (bert, albert, electra, gpt2, llama, t5, bart, nanochat, modernbert, xlnet, mpnet)
}
"""`model_type` of a config.json -> the family."""


def families_of(shape: Shape) -> list[Family]:
    """The families that express a shape exactly: a body of BERT's is also one of ELECTRA's."""
    return [family for family in FAMILIES.values() if family.expresses(shape)]


def family_of(shape: Shape) -> Family | None:
    """The first of them, or None."""
    return next(iter(families_of(shape)), None)
