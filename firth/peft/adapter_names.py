"""What the modules of a model are called in its family's own class, where peft's files look for them.

>>> from firth.model.presets import llama
>>> names = AdapterNames.of(LM(llama(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, intermediate_size=8), {}))
>>> names.inside(["layers.0.self_attn.q_proj"])
{'layers.0.self_attn.q_proj': 'model.layers.0.self_attn.q_proj'}
>>> names.entries["model.layers.0.self_attn.q_proj"].name
('stack.blocks.0.attention.q.weight',)
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from firth.model.head_descriptions import describe_head
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS
from firth.peft import lora
from firth.pretrained.families import families_of
from firth.pretrained.families.family import WeightMapping, resolve_names
from firth.pretrained.families.heads import ExportForm, of_model


@dataclass(frozen=True)
class AdapterNames:
    """What the modules and tensors of a base are called outside. entries: by their module. tensors: ours -> theirs, those
    that are one to one.

    form: the model's class there; None where no family has names for it, which then go by ours. front: what the base's
    class puts in front of the trunk's names, where others put the family's prefix: a bare model's nothing.
    """

    form: ExportForm | None
    entries: Mapping[str, WeightMapping]
    tensors: Mapping[str, str]
    front: str = ""

    @staticmethod
    def of(model: LM, base: Path | None = None, needed: Collection[str] = ()) -> AdapterNames:
        """needed: modules of ours that must have a name; where one has none, all go by our own."""
        told = {n: describe_head(p) for n, p in model.heads.items() if n not in PREFIX_HEADS}
        form = of_model(families_of(model.config), model.config, told)
        entries = [] if form is None else form.entries(model.config)
        by_module = {_module(e.hf_name): e for e in entries if e.hf_name.endswith(".weight") and not e.merged[0]}
        if form is None or not set(needed) <= {ours for e in by_module.values() for ours in modules(e)}:
            return AdapterNames.own(model)
        single = (e for e in entries if len(e.name) == 1 and not (e.transposed or e.ignored or e.merged[0]))
        config = base / "config.json" if base else Path()
        kinds = json.loads(config.read_text("utf-8")).get("architectures") if config.is_file() else []
        bare = bool({family.classes[1] for family in families_of(model.config)} & {*(kinds or [])})
        return AdapterNames(form, by_module, {e.name[0]: e.hf_name for e in single}, "" if bare else form.family.prefix)

    @staticmethod
    def own(model: LM) -> AdapterNames:
        """Ours."""
        return AdapterNames(
            None, {name: WeightMapping(f"{name}.weight", (f"{name}.weight",)) for name in lora.adaptable(model)}, {}
        )

    def headed(self) -> AdapterNames:
        """As the class with the model's heads calls them, whatever the base's."""
        if self.form is None:
            return self
        of = self.form.headed
        return replace(self, front=self.form.family.prefix if of is None or of.prefix is None else of.prefix)

    def outside(self, name: str) -> str:
        """As the base's own class calls a module or a tensor."""
        skip = "" if self.form is None else self.form.family.prefix
        return self.front + name.removeprefix(skip) if name.startswith(skip) else name

    def inside(self, names: Iterable[str]) -> dict[str, str]:
        """A file's modules or tensors, whichever class they were named in -> as `entries` and `tensors` spell them."""
        if self.form is None:
            return {name: name for name in names}
        family, known = self.form.family, {*self.entries, *self.tensors.values()}
        return {theirs: ours for ours, theirs in resolve_names(family, names, known).items()}


def modules(entry: WeightMapping) -> list[str]:
    """Our modules that one of theirs is, in the order of its rows."""
    return [_module(ours) for ours in entry.name]


def _module(name: str) -> str:
    return name.removesuffix(".weight")
