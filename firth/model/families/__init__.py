"""Published families of models: their config files and tensor names, to ours and back."""

from __future__ import annotations

from firth.model.families import bert, gpt2, llama, modernbert, mpnet, nanochat, t5, xlnet
from firth.model.families.family import Family
from firth.model.shape import Shape

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (bert, gpt2, llama, t5, nanochat, modernbert, xlnet, mpnet)
}
"""`model_type` of a config.json -> the family."""


def family_of(shape: Shape) -> Family | None:
    """The family that expresses a shape exactly, or None."""
    return next((family for family in FAMILIES.values() if family.expresses(shape)), None)
