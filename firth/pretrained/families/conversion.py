"""Convert models and files: the transformers class that a model or a file has by its heads, and the tensors of a file by firth's names.

    BertModel                         the transformer stack
    BertForMaskedLM                   with heads {"lm"}
    BertForPreTraining                with heads {"lm", "next"}
    BertForSequenceClassification     with heads {"classes"}, if it is BERT's: a pooler, tanh, a linear layer

A model is exported as the class that covers most of its heads; the remaining heads are saved as `heads.*`, which other
libraries ignore. A file has the class that its config names, or one with more heads if all of their tensors are present
(released BERTs name BertForMaskedLM and contain the other head too). Without a named class, the tensors decide.

>>> from firth.pretrained.families.bert import FAMILY
>>> from firth.model.presets import PRESETS
>>> linear = {"kind": "linear", "in": 768, "out": 9, "bias": True}
>>> form_of_model([FAMILY], PRESETS["bert-base"], {"tags": linear}).name
'BertForTokenClassification'

The tensors of a file are converted strictly: an error names the first tensor that does not fit.

    {"bert.pooler.dense.weight": ..., ...}   ->   LoadedState(config, {"tokens.weight": ...}, {"lm": ...}, ["bert.pooler.dense.weight"])

Every tensor of the file's class must be present with the size that its config implies, and every tensor of the file must be
one of them. Tensors of heads that the class lacks are skipped and reported (`Family.unused_heads`); tensors without
information are skipped (`Family.ignored_names`, `Family.tied_names`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from firth.io.safetensors import Read
from firth.model.config import ModelConfig
from firth.model.heads import Description, LMHead, describe_head, num_outputs
from firth.model.init import init_empty_weights
from firth.model.model import LM
from firth.pretrained.families.family import (
    Family,
    HeadSpec,
    WeightMapping,
    from_hf,
    resolve_names,
    to_hf,
    without_prefix,
)
from firth.types import UserError


def head_of(families: Iterable[Family], head_name: str, config: ModelConfig, num_outputs: int) -> nn.Module | None:
    """Return the head of the transformers class for a task, or None if no family has such a class.

    Args:
        families: The families that support the config.
        head_name: firth's name of the head.
        config: Config of the model.
        num_outputs: Number of outputs, unless the class fixes it.
    """
    found = (spec for family in families for spec in family.heads if spec.head_name == head_name)
    spec = next(found, None)
    return None if spec is None else spec.make(config, spec.num_outputs or num_outputs)


@dataclass(frozen=True)
class ExportForm:
    """A transformers class of a family, with the size of its head.

    Args:
        family: The family.
        lm: Whether the class has the LM head.
        head_spec: Its task head, if any.
        num_outputs: Output size of the task head.
    """

    family: Family
    lm: bool
    head_spec: HeadSpec | None = None
    num_outputs: int = 0

    @property
    def name(self) -> str:
        """Name of the class."""
        return self.head_spec.name if self.head_spec else self.family.classes[0 if self.lm else 1]

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        """Return its heads by firth's names, as modules on the meta device."""
        with init_empty_weights():
            heads: dict[str, nn.Module] = {"lm": LMHead(config)} if self.lm else {}
            return heads | (
                {self.head_spec.head_name: self.head_spec.make(config, self.num_outputs)} if self.head_spec else {}
            )

    @property
    def head_names(self) -> set[str]:
        """firth's names of its heads."""
        return ({"lm"} if self.lm else set()) | ({self.head_spec.head_name} if self.head_spec else set())

    def head_mappings(self, config: ModelConfig) -> list[WeightMapping]:
        """Return the mappings of its heads' tensors, without tied ones."""
        stack = {entry.hf_name for entry in self.family.weight_mappings(config, False)}
        lm = [
            e
            for e in self.family.weight_mappings(config, self.lm)
            if e.hf_name not in stack and not is_tied_copy(e, config)
        ]
        return lm + (self.head_spec.weight_mappings(config, self.num_outputs) if self.head_spec else [])

    def weight_mappings(self, config: ModelConfig) -> list[WeightMapping]:
        """Return the mappings of all tensors, with the family's prefix."""
        return self.family.weight_mappings(config, self.lm) + (
            self.head_spec.weight_mappings(config, self.num_outputs) if self.head_spec else []
        )

    def export_mappings(self, config: ModelConfig) -> list[WeightMapping]:
        """Return the mappings of all tensors, with this class's own prefix."""
        if self.head_spec is None or self.head_spec.prefix is None:
            return self.weight_mappings(config)
        ours, theirs = self.family.prefix, self.head_spec.prefix
        stack = [e for e in self.family.weight_mappings(config, self.lm) if e.hf_name.startswith(ours)]
        renamed = {e: replace(e, hf_name=theirs + e.hf_name.removeprefix(ours)) for e in stack}
        return [renamed.get(entry, entry) for entry in self.weight_mappings(config)]

    def config_fields(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the config.json fields of this class in addition to the family's.

        Args:
            names: Names of the labels; ignored if their number is not `num_outputs`.
        """
        if self.head_spec is None:
            return {}
        fields = dict(self.head_spec.required_config)
        if not self.head_spec.num_outputs or self.num_outputs == 1:
            labels = names if len(names) == self.num_outputs else [f"{UNNAMED}{i}" for i in range(self.num_outputs)]
            fields["id2label"] = {str(i): name for i, name in enumerate(labels)}
            fields["label2id"] = {name: i for i, name in enumerate(labels)}
        return fields


UNNAMED = "LABEL_"
"""Prefix of the label names that transformers makes up, before the number."""


def label_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the label names in a config.json in the order of the head's rows; empty if the labels are only numbered."""
    labels = config.get("id2label")
    if type(labels) is not dict or not all(str(key).isdigit() for key in labels):
        return ()
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    return () if all(name == f"{UNNAMED}{i}" for i, name in enumerate(names)) else names


def form_of_model(
    families: Iterable[Family], config: ModelConfig, heads: Mapping[str, Description]
) -> ExportForm | None:
    """Return the class that covers most of a model's heads, the first of equals; None without families.

    Args:
        families: The families that support the config.
        config: Config of the model.
        heads: Descriptions of the model's heads by name.
    """
    best: ExportForm | None = None
    lm, task_heads = "lm" in heads, heads.keys() - {"lm"}
    for family in families:
        for form in (ExportForm(family, lm), *_head_forms(family, config, heads)):
            if best is None or (form.head_spec is not None) > (best.head_spec is not None):
                best = form
        if best is not None and (best.head_spec is not None or not task_heads):
            break
    return best


def _head_forms(family: Family, config: ModelConfig, heads: Mapping[str, Description]) -> list[ExportForm]:
    out = []
    for spec in family.heads:
        outputs = num_outputs(heads.get(spec.head_name, {}))
        form = ExportForm(family, spec.lm, spec, outputs)
        fits = spec.lm == ("lm" in heads) and outputs and spec.num_outputs in (0, outputs)
        if fits and describe_head(form.heads(config)[spec.head_name]) == heads[spec.head_name]:
            out.append(form)
    return out


def is_tied_copy(entry: WeightMapping, config: ModelConfig) -> bool:
    """Return whether a tensor is the second name of a tied matrix, which a file may omit (T5 v1.1's LM head)."""
    return config.tie_embeddings and entry.names == (LM_HEAD_WEIGHT,)


def untied_head(family: Family, config: ModelConfig, names: Iterable[str]) -> str | None:
    """Return the name of a separate LM head in a file whose config ties it, or None if the file has none."""
    entries = family.weight_mappings(replace(config, tie_embeddings=False), True) if config.tie_embeddings else []
    return next(
        (entry.hf_name for entry in entries if entry.names == (LM_HEAD_WEIGHT,) and entry.hf_name in names), None
    )


LM_HEAD_WEIGHT = "heads.lm.weight"


def known_names(family: Family, config: ModelConfig) -> set[str]:
    """Return the tensor names of all classes of a family."""
    forms = [ExportForm(family, True), *(ExportForm(family, h.lm, h, h.num_outputs or 1) for h in family.heads)]
    return {entry.hf_name for form in forms for entry in form.weight_mappings(config)}


def form_of_file(
    family: Family,
    model_config: ModelConfig,
    sizes: Mapping[str, Sequence[int]],
    config: Mapping[str, Any],
    headless: bool,
    where: str,
) -> ExportForm:
    """Return the class of a file. An incomplete file gets the class that its config names.

    Args:
        family: The family of the file.
        model_config: Config of the model.
        sizes: Shapes of its tensors, by the names in the family's weight mappings.
        config: Its config.json.
        headless: Whether it was saved from the headless model. The head that the config names may then be missing
            (sentence encoders name the class they were made from).
        where: Directory, for messages.

    Raises:
        UserError: If the config has a setting of the head that firth does not support.
    """
    forms = [ExportForm(family, True), ExportForm(family, False)]
    for spec in family.heads:
        rows = next(iter(sizes.get(spec.weight_mappings(model_config, 1)[-1].hf_name, ())), spec.num_outputs or 2)
        if spec.num_outputs in (0, rows):
            forms.append(ExportForm(family, spec.lm, spec, rows))
    own = {form: {entry.hf_name for entry in form.head_mappings(model_config)} for form in forms}
    present = {form: len(own[form] & sizes.keys()) for form in forms}
    classes = config.get("architectures")
    classes = classes if type(classes) is list else []
    named = [form for form in forms if form.name in classes]
    if headless and named and own[named[0]] and not present[named[0]]:
        named = forms[1:2]
    elif classes and not named:
        forms = forms[:2]  # an unsupported class: its heads are skipped and reported
    if named:
        forms = named[:1] + [form for form in forms if form.head_names > named[0].head_names]
    complete = [form for form in forms if present[form] == len(own[form])]
    if forms[0] not in complete and (named or (present[forms[0]] and not any(present[form] for form in complete))):
        # Named, or an LM head that is incomplete and fits no other class: the caller reports the missing tensors.
        form = forms[0]
    else:
        form = max(complete, key=lambda form: present[form])
    for field, value in () if form.head_spec is None else form.head_spec.required_config:
        if config.get(field, value) != value:
            raise UserError(f"{where}/config.json has {field}={config[field]!r}; firth supports {value!r} only")
    return form


@dataclass(frozen=True, eq=False)
class LoadedState:
    """The model in a file.

    Args:
        config: Config of the model.
        state: Its tensors by firth's names.
        heads: Descriptions of its heads by name.
        left_out: Names of the tensors in the file that were skipped.
        read: Returns a tensor of `state`, which has only shapes then; None if `state` has the data.
    """

    config: ModelConfig
    state: dict[str, Tensor]
    heads: dict[str, Description]
    left_out: list[str]
    read: Read | None = None


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
