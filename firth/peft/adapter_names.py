"""Names of a model's modules in its transformers class, as peft's files use them, and the task head that they hold.

>>> from firth.model.presets import llama
>>> names = AdapterNames.of(LM(llama(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8), {}))
>>> names.from_file(["layers.0.self_attn.q_proj"])
{'layers.0.self_attn.q_proj': 'model.layers.0.self_attn.q_proj'}
>>> names.entries["model.layers.0.self_attn.q_proj"].names
('stack.blocks.0.attention.q.weight',)

Fine-tuning with peft often starts from a class with a new head (`AutoModelForSequenceClassification` of a headless BERT),
and peft saves its trained modules (`modules_to_save`) with the adapter. The adapter's task type or its `auto_mapping` names
the class; tensors of the head that the adapter lacks (BERT's pooler) are taken from the base.

    {"classifier.weight": (3, 384), "classifier.bias": (3,)} on MiniLM  ->  heads {"classes": pooler, tanh, linear layer}
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from firth.io.safetensors import read_json, read_tensors
from firth.model.heads import describe_head
from firth.model.init import init_empty_weights
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS
from firth.peft import lora
from firth.pretrained import families
from firth.pretrained.families import families_of
from firth.pretrained.families.conversion import ExportForm, form_of_model, known_names
from firth.pretrained.families.family import Family, HeadSpec, WeightMapping, from_hf, resolve_names
from firth.types import UserError


@dataclass(frozen=True)
class AdapterNames:
    """Names of a base's modules and tensors in transformers.

    Args:
        form: The model's transformers class; None if no family supports the model, which then keeps firth's names.
        entries: Weight mappings by module name in transformers.
        tensors: firth's tensor name -> name in transformers, for tensors that correspond one to one.
        prefix: Prefix of the transformer stack's names in the base's class; empty for a headless model.
    """

    form: ExportForm | None
    entries: Mapping[str, WeightMapping]
    tensors: Mapping[str, str]
    prefix: str = ""

    @staticmethod
    def of(model: LM, base: Path | None = None, needed: Collection[str] = ()) -> AdapterNames:
        """Return the names for a model.

        Args:
            model: The model.
            base: Directory of the base, whose config.json names its class.
            needed: Modules that must have a name; if one has none, all keep firth's names.
        """
        heads = {n: describe_head(p) for n, p in model.heads.items() if n not in PREFIX_HEADS}
        form = form_of_model(families_of(model.config), model.config, heads)
        entries = [] if form is None else form.weight_mappings(model.config)
        by_module = {_module(e.hf_name): e for e in entries if e.hf_name.endswith(".weight") and not e.shapes[0]}
        if form is None or not set(needed) <= {ours for e in by_module.values() for ours in modules(e)}:
            return AdapterNames.firth(model)
        single = (e for e in entries if len(e.names) == 1 and not (e.transposed or e.unused_rows or e.shapes[0]))
        config = base / "config.json" if base else Path()
        classes = json.loads(config.read_text("utf-8")).get("architectures") if config.is_file() else []
        headless = bool({family.classes[1] for family in families_of(model.config)} & {*(classes or [])})
        return AdapterNames(
            form, by_module, {e.names[0]: e.hf_name for e in single}, "" if headless else form.family.prefix
        )

    @staticmethod
    def firth(model: LM) -> AdapterNames:
        """Return firth's own names."""
        return AdapterNames(
            None,
            {name: WeightMapping(f"{name}.weight", (f"{name}.weight",)) for name in lora.adaptable_modules(model)},
            {},
        )

    def with_head(self) -> AdapterNames:
        """Return the names in the class with the model's heads, whatever the base's class."""
        if self.form is None:
            return self
        spec = self.form.head_spec
        return replace(self, prefix=self.form.family.prefix if spec is None or spec.prefix is None else spec.prefix)

    def to_file(self, name: str) -> str:
        """Return the name of a module or tensor in the base's class."""
        prefix = "" if self.form is None else self.form.family.prefix
        return self.prefix + name.removeprefix(prefix) if name.startswith(prefix) else name

    def from_file(self, names: Iterable[str]) -> dict[str, str]:
        """Map names in a file, of any class of the family, to the names in `entries` and `tensors`."""
        if self.form is None:
            return {name: name for name in names}
        family, known = self.form.family, {*self.entries, *self.tensors.values()}
        return {theirs: ours for ours, theirs in resolve_names(family, names, known).items()}


def modules(entry: WeightMapping) -> list[str]:
    """Return the firth modules of a mapping, in the order of the rows."""
    return [_module(ours) for ours in entry.names]


def _module(name: str) -> str:
    return name.removesuffix(".weight")


TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS"}
"""Suffix of a class name -> peft's task type."""


def add_task_head(model: LM, config: Mapping[str, Any], full: Mapping[str, Tensor], base: Path, where: Path) -> None:
    """Replace the heads of a model by an adapter's task head, unless the model already has that head.

    Args:
        model: The base, changed in place.
        config: adapter_config.json.
        full: Tensors that were trained in full, by their names in the class.
        base: Directory of the base.
        where: File of the adapter, for messages.

    Raises:
        UserError: If a tensor of the head is in neither the adapter nor the base.
    """
    base_config = read_json(base / "config.json")
    family = families.find(str(base_config.get("model_type")))
    if family is None or not full:
        return
    names = resolve_names(family, full, known_names(family, model.config))
    theirs = {name: full[stored] for name, stored in names.items()}
    found = _find_class(family, model, config, theirs)
    if found is None or _has_head(model, found[0], found[1]):
        return
    spec, num_outputs = found
    for setting, value in spec.required_config:
        if base_config.get(setting, value) != value:
            raise UserError(f"{base}/config.json has {setting}={base_config[setting]!r}; firth supports {value!r} only")
    stored = read_tensors(base)
    own = {
        name: stored[stored_name]
        for name, stored_name in resolve_names(family, stored, known_names(family, model.config)).items()
    }
    entries = spec.weight_mappings(model.config, num_outputs)
    state = own | theirs
    for entry in entries:
        if entry.hf_name not in state:
            raise UserError(
                f"{where}: its head is that of a {spec.name}, but neither the adapter nor its base {base} has "
                f"{entry.hf_name!r}, which was initialized at random and not saved: add it to peft's modules_to_save and "
                "train again"
            )
    for name in [name for name in model.heads if name not in PREFIX_HEADS]:
        del model.heads[name]  # the class has its task head only
    model.heads[spec.head_name] = _load_head(spec.make(model.config, num_outputs), spec, entries, state, where)


def _find_class(
    family: Family, model: LM, config: Mapping[str, Any], full: Mapping[str, Tensor]
) -> tuple[HeadSpec, int] | None:
    """Return the class that the adapter was trained in and its number of outputs, or None for an unsupported class."""
    named = (config.get("auto_mapping") or {}).get("base_model_class")
    ends = [end for end, task in TASKS.items() if task == config.get("task_type")]
    for spec in family.heads:
        if spec.name != named and spec.name.rpartition("For")[2] not in ends:
            continue
        last = spec.weight_mappings(model.config, 1)[-1].hf_name
        if last in full and spec.num_outputs in (0, len(full[last])):
            return spec, len(full[last])
    return None


def _has_head(model: LM, spec: HeadSpec, num_outputs: int) -> bool:
    """Return whether the model has a class's head with this number of outputs."""
    if spec.head_name not in model.heads:
        return False
    with init_empty_weights():
        expected = spec.make(model.config, num_outputs).state_dict()
    mine = model.heads[spec.head_name].state_dict()
    return {n: t.shape for n, t in mine.items()} == {n: t.shape for n, t in expected.items()}


def _load_head(
    module: nn.Module, spec: HeadSpec, entries: list[WeightMapping], tensors: Mapping[str, Tensor], where: Path
) -> nn.Module:
    prefix = f"heads.{spec.head_name}."
    state = {name.removeprefix(prefix): tensor for name, tensor in from_hf(tensors, entries).items()}
    try:
        module.load_state_dict(state)
    except RuntimeError as fault:  # torch lists every tensor that does not fit
        raise UserError(f"{where}: its head of a {spec.name} does not fit the base") from fault
    return module
