"""The tensors of a file, under our names: all of them or an error that names the first that is amiss.

    {"bert.pooler.dense.weight": ..., ...}   ->   Found(shape, {"tokens.weight": ...}, {"lm": ...}, ["bert.pooler.dense.weight"])

Every tensor of the file's class must be there, of the size that its config says, and every tensor of the file must be
one of them. What a family knows and our class has no place for is left out and told (`Family.unused`); what says nothing
is left out (`Family.spare`, `Family.tied`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from firth.model.config import ModelConfig
from firth.model.empty_weights import init_empty_weights
from firth.model.head_descriptions import Description, describe_head
from firth.model.model import LM
from firth.pretrained.families.family import Family, from_hf, resolve_names, to_hf, without_prefix
from firth.pretrained.families.heads import ExportForm, copied, known, of_file, of_model, untied
from firth.types import UserError


@dataclass(frozen=True, eq=False)
class LoadedState:
    """A model in a file: its shape, its tensors by our names, its parts described, and the file's tensors left out."""

    config: ModelConfig
    state: dict[str, Tensor]
    parts: dict[str, Description]
    left_out: list[str]


def read_own(
    family: Family, config: ModelConfig, state: Mapping[str, Tensor], parts: dict[str, Description], where: str
) -> LoadedState:
    """What we wrote as a class of a family: what that has no name for stands under ours, `heads.*`."""
    ours = {name: tensor for name, tensor in state.items() if name.startswith("heads.")}
    names = resolve_names(family, state.keys() - ours.keys(), known(family, config))
    form = of_model([family], config, parts)
    if form is None:
        raise UserError(f"{where}/firth.json says {family.name}, which its shape is not: copy the directory again")
    found, left = _mapped(form, config, {name: state[stored] for name, stored in names.items()}, names, ours, where)
    return LoadedState(config, found | ours, parts, left)


def read_hf(
    family: Family, model_config: ModelConfig, state: Mapping[str, Tensor], config: Mapping[str, Any], where: str
) -> LoadedState:
    """What others wrote. Raises UserError for what is missing, unknown or of another size than its config says."""
    names = resolve_names(family, state, known(family, model_config))
    theirs = {name: state[stored] for name, stored in names.items()}
    table = next(
        entry.hf_name for entry in family.weight_mappings(model_config, False) if "tokens.weight" in entry.name
    )
    head = untied(family, model_config, theirs)
    if head is not None and table in theirs and not torch.equal(theirs[head], theirs[table]):
        # Version 5 of transformers says of an untied T5 that it is tied, and goes by what the file holds.
        model_config = replace(model_config, tie_embeddings=False)
    sizes = {name: tensor.shape for name, tensor in theirs.items()}
    form = of_file(family, model_config, sizes, config, without_prefix(family, state), where)
    found, left = _mapped(form, model_config, theirs, names, {}, where)
    return LoadedState(
        model_config, found, {name: describe_head(part) for name, part in form.parts(model_config).items()}, left
    )


def _mapped(
    form: ExportForm,
    config: ModelConfig,
    theirs: Mapping[str, Tensor],
    names: Mapping[str, str],
    ours: Mapping[str, Tensor],
    where: str,
) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, and the names of those left out. names: as the family spells them -> as the file does."""
    family, entries = form.family, form.entries(config)
    unread = theirs.keys() - {entry.hf_name for entry in entries}
    for name in sorted(unread):
        if not re.search(f"{family.spare}|{family.tied}|{family.unused}", name):
            raise UserError(f"{where} holds {names[name]!r}, which is no tensor of a {form.name} of this shape")
    with init_empty_weights():
        wanted = to_hf(LM(config, form.parts(config)).state_dict(), entries)
    for entry in entries:
        have, want = theirs.get(entry.hf_name), tuple(wanted[entry.hf_name].shape)
        if have is not None and tuple(have.shape) != want:
            size, stored = tuple(have.shape), names[entry.hf_name]
            raise UserError(f"{where}: tensor {stored!r} is {size}, and its config expects {want}")
    found = from_hf(theirs, entries)
    for entry in entries:
        # Old versions saved some parts under our names; a second name of what is there already may be left out.
        if not found.keys() | ours.keys() >= set(entry.name) and not copied(entry, config):
            raise UserError(f"{where} lacks tensor {entry.hf_name!r} of a {form.name}")
    if config.tie_embeddings and form.lm:
        found["heads.lm.weight"] = found["tokens.weight"]
    nothing = f"{family.spare}|{family.tied}" if config.tie_embeddings else family.spare
    return found, sorted(names[name] for name in unread if not re.search(nothing, name))
