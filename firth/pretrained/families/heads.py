"""Which of transformers' classes a model or a file is of: its trunk, with the vocabulary head, with a task's head.

    BertModel                         the trunk
    BertForMaskedLM                   and parts {"lm"}
    BertForPreTraining                and parts {"lm", "next"}
    BertForSequenceClassification     and parts {"classes"}, of BERT's own form: a pooler, tanh, a linear map

A model is of the class that says most of its parts; what that leaves is saved as `heads.*`, which others ignore. A file
is of the class that its config names, or of one with more parts whose tensors are all there (released BERTs call
themselves BertForMaskedLM and hold the other head too). A file that names no class is judged by its tensors.

>>> from firth.pretrained.families.bert import FAMILY
>>> from firth.model.presets import PRESETS
>>> linear = {"kind": "linear", "in": 768, "out": 9, "bias": True}
>>> of_model([FAMILY], PRESETS["bert-base"], {"tags": linear}).name
'BertForTokenClassification'
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from firth.model.config import ModelConfig
from firth.model.empty_weights import init_empty_weights
from firth.model.head_descriptions import Description, describe_head, num_outputs
from firth.model.heads import LMHead
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping
from firth.types import UserError


def head_of(families: Iterable[Family], part: str, config: ModelConfig, answers: int) -> nn.Module | None:
    """The head by which transformers' class for a task reads a trunk of this shape; None where no family has such a class."""
    found = (headed for family in families for headed in family.heads if headed.part == part)
    headed = next(found, None)
    return None if headed is None else headed.make(config, headed.num_outputs or answers)


@dataclass(frozen=True)
class ExportForm:
    """A class of a family: with the vocabulary head or without, with another head that gives so many answers or without."""

    family: Family
    lm: bool
    headed: HeadSpec | None = None
    answers: int = 0

    @property
    def name(self) -> str:
        return self.headed.name if self.headed else self.family.classes[0 if self.lm else 1]

    def parts(self, config: ModelConfig) -> dict[str, nn.Module]:
        """Its heads by our names, as modules that hold nothing."""
        with init_empty_weights():
            parts: dict[str, nn.Module] = {"lm": LMHead(config)} if self.lm else {}
            return parts | ({self.headed.part: self.headed.make(config, self.answers)} if self.headed else {})

    @property
    def named(self) -> set[str]:
        """Its heads, by our names."""
        return ({"lm"} if self.lm else set()) | ({self.headed.part} if self.headed else set())

    def own(self, config: ModelConfig) -> list[WeightMapping]:
        """The tensors of its heads; a tied matrix is none."""
        trunk = {entry.hf_name for entry in self.family.weight_mappings(config, False)}
        lm = [
            e for e in self.family.weight_mappings(config, self.lm) if e.hf_name not in trunk and not copied(e, config)
        ]
        return lm + (self.headed.entries(config, self.answers) if self.headed else [])

    def entries(self, config: ModelConfig) -> list[WeightMapping]:
        """All of its tensors, with the family's prefix."""
        return self.family.weight_mappings(config, self.lm) + (
            self.headed.entries(config, self.answers) if self.headed else []
        )

    def written(self, config: ModelConfig) -> list[WeightMapping]:
        """All of its tensors as this class spells them."""
        if self.headed is None or self.headed.prefix is None:
            return self.entries(config)
        ours, theirs = self.family.prefix, self.headed.prefix
        trunk = [e for e in self.family.weight_mappings(config, self.lm) if e.hf_name.startswith(ours)]
        turned = {e: replace(e, hf_name=theirs + e.hf_name.removeprefix(ours)) for e in trunk}
        return [turned.get(entry, entry) for entry in self.entries(config)]

    def config(self, names: Sequence[str]) -> dict[str, Any]:
        """What its config says besides the family's. names: of the classes, as many as there are answers, or none."""
        if self.headed is None:
            return {}
        said = dict(self.headed.hf_labels)
        if not self.headed.num_outputs or self.answers == 1:
            known = names if len(names) == self.answers else [f"{UNNAMED}{i}" for i in range(self.answers)]
            said["id2label"] = {str(i): name for i, name in enumerate(known)}
            said["label2id"] = {name: i for i, name in enumerate(known)}
        return said


UNNAMED = "LABEL_"
"""What transformers calls a class that has no name, before its number."""


def labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes in a config.json, in the order of the head's rows; none where they are only numbered."""
    said = config.get("id2label")
    if type(said) is not dict or not all(str(key).isdigit() for key in said):
        return ()
    names = tuple(str(said[key]) for key in sorted(said, key=int))
    return () if all(name == f"{UNNAMED}{i}" for i, name in enumerate(names)) else names


def of_model(families: Iterable[Family], config: ModelConfig, parts: Mapping[str, Description]) -> ExportForm | None:
    """The class that says the most of a model's parts; the first of those that say as much. None where no family is."""
    best: ExportForm | None = None
    lm = "lm" in parts
    for family in families:
        for form in (ExportForm(family, lm), *_headed(family, config, parts)):
            if best is None or (form.headed is not None) > (best.headed is not None):
                best = form
    return best


def _headed(family: Family, config: ModelConfig, parts: Mapping[str, Description]) -> list[ExportForm]:
    out = []
    for headed in family.heads:
        answers = num_outputs(parts.get(headed.part, {}))
        form = ExportForm(family, headed.lm, headed, answers)
        fits = headed.lm == ("lm" in parts) and answers and headed.num_outputs in (0, answers)
        if fits and describe_head(form.parts(config)[headed.part]) == parts[headed.part]:
            out.append(form)
    return out


def copied(entry: WeightMapping, config: ModelConfig) -> bool:
    """Whether a tensor is the tied matrix by its second name, which a file may hold or not (T5 v1.1's head)."""
    return config.tie_embeddings and entry.name == (HEAD,)


def untied(family: Family, config: ModelConfig, names: Iterable[str]) -> str | None:
    """The tensor by which a file says that its head is not tied after all: it differs from the table. None without one."""
    entries = family.weight_mappings(replace(config, tie_embeddings=False), True) if config.tie_embeddings else []
    return next((entry.hf_name for entry in entries if entry.name == (HEAD,) and entry.hf_name in names), None)


HEAD = "heads.lm.weight"


def known(family: Family, config: ModelConfig) -> set[str]:
    """Every name that a class of this family has."""
    forms = [ExportForm(family, True), *(ExportForm(family, h.lm, h, h.num_outputs or 1) for h in family.heads)]
    return {entry.hf_name for form in forms for entry in form.entries(config)}


def of_file(
    family: Family,
    model_config: ModelConfig,
    sizes: Mapping[str, Sequence[int]],
    config: Mapping[str, Any],
    alone: bool,
    where: str,
) -> ExportForm:
    """The class of a file. sizes: its tensors, by their names as the family spells them. alone: saved from the trunk alone,
    and then a head that the config names may be missing as a whole (encoders of sentences name their ancestor's class).

    Raises UserError where the config asks for a head that ours does not compute. That all of a class's tensors are there is
    not looked after here: a file that is not whole is of the class that it says, and lacks something.
    """
    forms = [ExportForm(family, True), ExportForm(family, False)]
    for headed in family.heads:
        rows = next(iter(sizes.get(headed.entries(model_config, 1)[-1].hf_name, ())), headed.num_outputs or 2)
        if headed.num_outputs in (0, rows):
            forms.append(ExportForm(family, headed.lm, headed, rows))
    own = {form: {entry.hf_name for entry in form.own(model_config)} for form in forms}
    there = {form: len(own[form] & sizes.keys()) for form in forms}
    said = config.get("architectures")
    said = said if type(said) is list else []
    named = [form for form in forms if form.name in said]
    if alone and named and own[named[0]] and not there[named[0]]:
        named = forms[1:2]
    elif said and not named:
        forms = forms[:2]  # a class that we do not have: its trunk, and what else it holds is told
    if named:
        forms = named[:1] + [form for form in forms if form.named > named[0].named]
    whole = [form for form in forms if there[form] == len(own[form])]
    if forms[0] not in whole and (named or (there[forms[0]] and not any(there[form] for form in whole))):
        # Named, or a vocabulary head of which some is there and which no other explains: what it lacks is to be told.
        form = forms[0]
    else:
        form = max(whole, key=lambda form: there[form])
    for field, value in () if form.headed is None else form.headed.hf_labels:
        if config.get(field, value) != value:
            raise UserError(f"{where}/config.json asks for {field}={config[field]!r}; firth has {value!r} only")
    return form
