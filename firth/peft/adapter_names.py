"""Names of a model's modules in its transformers class, as peft's files use them.

>>> from firth.model.presets import llama
>>> names = AdapterNames.of(LM(llama(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8), {}))
>>> names.from_file(["layers.0.self_attn.q_proj"])
{'layers.0.self_attn.q_proj': 'model.layers.0.self_attn.q_proj'}
>>> names.entries["model.layers.0.self_attn.q_proj"].names
('stack.blocks.0.attention.q.weight',)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from firth.model.heads import describe_head
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS
from firth.peft import lora
from firth.pretrained.families import families_of
from firth.pretrained.families.conversion import ExportForm, form_of_model
from firth.pretrained.families.family import WeightMapping, resolve_names


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
