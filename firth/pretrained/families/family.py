"""What a published family is: its `config.json` to a `Shape` and back, and its tensor names to ours and back.

A family expresses a shape exactly when the shape survives the way there and back, so no second list of conditions
can drift from the first. Tensors: each of theirs is one of ours, or several of ours stacked by rows (GPT-2's
`c_attn`, ModernBERT's `Wqkv` and `Wi`), perhaps transposed (GPT-2's Conv1D).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from firth.model.config import ModelConfig
from firth.model.empty_weights import init_empty_weights
from firth.types import UserError

Scaling = Literal["none", "linear", "llama3"]


@dataclass(frozen=True)
class WeightMapping:
    """theirs = cat(ours, dim 0), transposed if so. `sizes`: rows of each of ours, needed only where several are stacked.

    unread: rows in front of theirs that their model never reads (BART's and MPNet's positions): written as zeros, left out
    when read. folded: the shape that the result has with us, and the one it has with them, where those differ.
    """

    hf_name: str
    name: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    transposed: bool = False
    ignored: int = 0
    merged: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


@dataclass(frozen=True, eq=False)
class HeadSpec:
    """One of transformers' classes with a head besides, or in place of, the vocabulary's: BertForPreTraining.

    name: of the class. part: the name that our objectives give the head. make: (Shape, answers) -> the head.
    maps: modules of the head -> theirs; "" is a head that is one module. answers: how many numbers it gives, 0 for one
    per label. lm: whether the class has the vocabulary head too. prefix: what stands in front of the trunk's names in
    this class, where that is not the family's prefix. says: what its config must say, field by field.
    """

    name: str
    part: str
    make: Callable[[ModelConfig, int], nn.Module]
    weights: dict[str, str]
    num_outputs: int = 0
    lm: bool = False
    prefix: str | None = None
    hf_labels: tuple[tuple[str, Any], ...] = ()

    def entries(self, config: ModelConfig, answers: int) -> list[WeightMapping]:
        """The head's tensors; the last has a row for each answer."""
        with init_empty_weights():
            names = list(self.make(config, answers).state_dict())
        out = []
        for name in names:
            module, _, kind = name.rpartition(".")
            out.append(WeightMapping(f"{self.weights[module]}.{kind}", (f"heads.{self.part}.{name}",)))
        return out


@dataclass(frozen=True, eq=False)
class Family:
    """name: `model_type` of the config. classes: transformers' class with and without the vocabulary head.

    config: Shape -> config.json without token ids. shape: config.json -> Shape (UserError if it asks for what a Shape
    cannot say). entries: every tensor of the model. prefix: what files saved from the bare model leave out.
    spare: pattern of names that a file may hold and that say nothing (buffers). tied: those of a tied matrix's second name.
    unused: pattern of names of heads that a file may hold and that are left out, and told, where no class of ours has them
    (BERT's pooler without the question it was trained for).
    renames: old spelling -> new, applied to a file's names. headed: its classes that have further heads.
    pad: the id that a tokenizer's padding must have, because their model counts positions by it (RoBERTa).
    """

    name: str
    classes: tuple[str, str]
    to_hf_config: Callable[[ModelConfig], dict[str, Any]]
    to_config: Callable[[dict[str, Any]], ModelConfig]
    weight_mappings: Callable[[ModelConfig, bool], list[WeightMapping]]
    prefix: str
    spare: str = r"$^"
    tied: str = r"$^"
    unused: str = r"$^"
    renames: tuple[tuple[str, str], ...] = ()
    heads: tuple[HeadSpec, ...] = ()
    pad: int | None = None

    def supports(self, config: ModelConfig) -> bool:
        """Whether this family's config says all that the shape says (how weights are initialised aside)."""
        try:
            back = self.to_config(self.to_hf_config(config))
        except UserError:
            return False
        return replace(back, init_std=config.init_std, zero_init=config.zero_init) == config


def to_hf(state: dict[str, Tensor], entries: Iterable[WeightMapping]) -> dict[str, Tensor]:
    """Our tensors under the family's names."""
    out = {}
    for entry in entries:
        parts = [state[name] for name in entry.name]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        whole = whole.t() if entry.transposed else whole
        if entry.ignored:
            whole = torch.cat((whole.new_zeros(entry.ignored, *whole.shape[1:]), whole))
        out[entry.hf_name] = (whole.reshape(entry.merged[1]) if entry.merged[1] else whole).contiguous()
    return out


def without_prefix(family: Family, names: Iterable[str]) -> bool:
    """Whether a file was saved from the trunk alone, without what its classes put in front of its names."""
    prefixes = (family.prefix, *(headed.prefix for headed in family.heads if headed.prefix is not None))
    return not any(name.startswith(prefixes) for name in names)


def resolve_names(family: Family, names: Iterable[str], known: Container[str]) -> dict[str, str]:
    """A file's names as the family's entries spell them -> as they stand in the file. known: all that entries speak of.

    Mends old spellings, puts the family's prefix where a class has another, and in front of all where a file has none:
    but not where that would hide what stands outside of it, such as a head.
    """
    found = list(names)
    others = [headed.prefix for headed in family.heads if headed.prefix is not None]
    alone = without_prefix(family, found)
    out: dict[str, str] = {}
    for name in found:
        new = name
        for old, spelling in family.renames:
            new = new.replace(old, spelling)
        for other in others:
            if new.startswith(other):
                new = family.prefix + new.removeprefix(other)
        new = family.prefix + new if alone and (family.prefix + new in known or new not in known) else new
        if new in out:
            raise UserError(f"a file holds {out[new]!r} and {name!r}, which are two names for one tensor")
        out[new] = name
    return out


def from_hf(state: Mapping[str, Tensor], entries: Iterable[WeightMapping]) -> dict[str, Tensor]:
    """Tensors by their names, as the entries spell them, under our names. Those that are not there are left out.

    They must be of the sizes that the entries expect, and are views of the file's own memory.
    """
    out: dict[str, Tensor] = {}
    for entry in entries:
        if entry.hf_name not in state:
            continue
        whole = state[entry.hf_name][entry.ignored :]
        whole = whole.reshape(entry.merged[0]) if entry.merged[0] else whole
        whole = whole.t() if entry.transposed else whole
        pieces = [whole] if len(entry.name) == 1 else whole.split(list(entry.sizes))
        out |= dict(zip(entry.name, pieces, strict=True))
    return out


def activation(given: str, names: dict[str, str], where: str) -> str:
    """Our name of an activation of theirs."""
    if given not in names:
        raise UserError(f"config.json asks for {where}={given!r}; firth has {', '.join(names)}")
    return names[given]


def check_supported(config: dict[str, Any], plain: dict[str, Any]) -> None:
    """Raise a UserError for a field of a config that asks for what ours does not compute; null says nothing."""
    for field, value in plain.items():
        if config.get(field, value) != value and config[field] is not None:
            raise UserError(f"config.json asks for {field}={config[field]!r}; firth has {field}={value!r} only")


@dataclass(frozen=True)
class RopeConfig:
    """The rotary fields of a `Shape`, as a config says them."""

    theta: float
    scaling: Scaling = "none"
    factor: float = 1.0
    low: float = 1.0
    high: float = 4.0
    original: int = 8192


def rope(config: dict[str, Any], default: float, layers: str = "") -> RopeConfig:
    """The rotary fields, as version 5 writes them (`rope_parameters`, perhaps by kind of layer) or version 4 did."""
    said = config.get("rope_parameters") or config.get("rope_scaling") or {}
    said = said.get(layers) or said
    kind = said.get("rope_type", said.get("type", "default"))
    theta = float(said.get("rope_theta", config.get("rope_theta", default)))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, "linear", float(said["factor"]))
    if kind == "llama3":
        low, high = float(said["low_freq_factor"]), float(said["high_freq_factor"])
        return RopeConfig(theta, "llama3", float(said["factor"]), low, high, said["original_max_position_embeddings"])
    raise UserError(
        f"config.json asks for rotary positions of type {kind!r}; firth has the types default, linear and llama3"
    )


def theta(config: dict[str, Any], default: float, layers: str = "") -> float:
    """The rotary base, in families whose positions are not stretched."""
    found = rope(config, default, layers)
    if found.scaling != "none":
        raise UserError(
            f"config.json asks for rotary positions of type {found.scaling!r}; this family has default only"
        )
    return found.theta


def ropes(config: ModelConfig) -> dict[str, Any]:
    """The rotary fields for versions 5 and 4."""
    said: dict[str, Any] = {"rope_type": "default" if config.rope_scaling == "none" else config.rope_scaling}
    if config.rope_scaling != "none":
        said["factor"] = config.rope_factor
    if config.rope_scaling == "llama3":
        said |= {"low_freq_factor": config.rope_low_freq_factor, "high_freq_factor": config.rope_high_freq_factor}
        said["original_max_position_embeddings"] = config.rope_original_max_positions
    old = {"rope_scaling": said} if config.rope_scaling != "none" else {}
    return {"rope_parameters": said | {"rope_theta": config.rope_theta}, "rope_theta": config.rope_theta} | old


def both(pairs: dict[str, str], ours: str, theirs: str, bias: bool, weight: bool = True) -> list[WeightMapping]:
    """Entries for modules that correspond one to one: their weight, and their bias where there is one."""
    kinds = ["weight"] * weight + ["bias"] * bias
    return [WeightMapping(f"{theirs}{b}.{kind}", (f"{ours}{a}.{kind}",)) for a, b in pairs.items() for kind in kinds]
