"""Convert the tensors of a file to firth's names, strictly: an error names the first tensor that does not fit.

    {"bert.pooler.dense.weight": ..., ...}   ->   LoadedState(config, {"tokens.weight": ...}, {"lm": ...}, ["bert.pooler.dense.weight"])

Every tensor of the file's class must be present with the size that its config implies, and every tensor of the file must
be one of them. Tensors of heads that the class lacks are skipped and reported (`Family.unused_heads`); tensors without
information are skipped (`Family.ignored_names`, `Family.tied_names`).
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
from firth.model.heads import Description, describe_head
from firth.model.model import LM
from firth.pretrained.families.family import Family, from_hf, resolve_names, to_hf, without_prefix
from firth.pretrained.families.heads import (
    ExportForm,
    form_of_file,
    form_of_model,
    is_tied_copy,
    known_names,
    untied_head,
)
from firth.types import UserError


@dataclass(frozen=True, eq=False)
class LoadedState:
    """The model in a file.

    Args:
        config: Config of the model.
        state: Its tensors by firth's names.
        heads: Descriptions of its heads by name.
        left_out: Names of the tensors in the file that were skipped.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    heads: dict[str, Description]
    left_out: list[str]


def read_own(
    family: Family, config: ModelConfig, state: Mapping[str, Tensor], heads: dict[str, Description], where: str
) -> LoadedState:
    """Convert a state that firth wrote as a class of a family; heads that the class lacks are named `heads.*`."""
    ours = {name: tensor for name, tensor in state.items() if name.startswith("heads.")}
    names = resolve_names(family, state.keys() - ours.keys(), known_names(family, config))
    form = form_of_model([family], config, heads)
    if form is None:
        raise UserError(
            f"{where}/firth.json has the family {family.name}, which does not support its config: copy the directory again"
        )
    found, left = _mapped(form, config, {name: state[stored] for name, stored in names.items()}, names, ours, where)
    return LoadedState(config, found | ours, heads, left)


def read_hf(
    family: Family, model_config: ModelConfig, state: Mapping[str, Tensor], config: Mapping[str, Any], where: str
) -> LoadedState:
    """Convert a state that transformers wrote.

    Raises:
        UserError: If a tensor is missing, unknown, or of another size than the config implies.
    """
    names = resolve_names(family, state, known_names(family, model_config))
    theirs = {name: state[stored] for name, stored in names.items()}
    table = next(
        entry.hf_name for entry in family.weight_mappings(model_config, False) if "tokens.weight" in entry.names
    )
    head = untied_head(family, model_config, theirs)
    if head is not None and table in theirs and not torch.equal(theirs[head], theirs[table]):
        # transformers 5 writes tie_word_embeddings=true for an untied T5 and goes by the tensors in the file.
        model_config = replace(model_config, tie_embeddings=False)
    sizes = {name: tensor.shape for name, tensor in theirs.items()}
    form = form_of_file(family, model_config, sizes, config, without_prefix(family, state), where)
    found, left = _mapped(form, model_config, theirs, names, {}, where)
    return LoadedState(
        model_config, found, {name: describe_head(head) for name, head in form.heads(model_config).items()}, left
    )


def _mapped(
    form: ExportForm,
    config: ModelConfig,
    theirs: Mapping[str, Tensor],
    names: Mapping[str, str],
    ours: Mapping[str, Tensor],
    where: str,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors by firth's names, and the names of those skipped.

    Args:
        form: The class of the file.
        config: Config of the model.
        theirs: Tensors by the names in the family's weight mappings.
        names: Those names -> names in the file.
        ours: Tensors in the file under firth's names.
        where: Directory, for messages.
    """
    family, entries = form.family, form.weight_mappings(config)
    unread = theirs.keys() - {entry.hf_name for entry in entries}
    for name in sorted(unread):
        if not re.search(f"{family.ignored_names}|{family.tied_names}|{family.unused_heads}", name):
            raise UserError(f"{where} holds {names[name]!r}, which is no tensor of a {form.name} with this config")
    with init_empty_weights():
        expected = to_hf(LM(config, form.heads(config)).state_dict(), entries)
    for entry in entries:
        have, want = theirs.get(entry.hf_name), tuple(expected[entry.hf_name].shape)
        if have is not None and tuple(have.shape) != want:
            size, stored = tuple(have.shape), names[entry.hf_name]
            raise UserError(f"{where}: tensor {stored!r} is {size}, and its config expects {want}")
    found = from_hf(theirs, entries)
    for entry in entries:
        # Old versions saved some heads under firth's names; the second name of a tied matrix may be absent.
        if not found.keys() | ours.keys() >= set(entry.names) and not is_tied_copy(entry, config):
            raise UserError(f"{where} lacks tensor {entry.hf_name!r} of a {form.name}")
    if config.tie_embeddings and form.lm:
        found["heads.lm.weight"] = found["tokens.weight"]
    silent = f"{family.ignored_names}|{family.tied_names}" if config.tie_embeddings else family.ignored_names
    return found, sorted(names[name] for name in unread if not re.search(silent, name))
