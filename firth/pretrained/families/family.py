"""Conversion between a published model family and firth: config fields and tensor names, in both directions.

A family supports a `ModelConfig` exactly when the config survives the round trip through the family's `config.json`, so
there is no second list of conditions to keep in sync. A tensor of the family is one firth tensor, or several stacked by
rows (GPT-2's `c_attn`, ModernBERT's `Wqkv` and `Wi`), possibly transposed (GPT-2's Conv1D).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from firth.model.config import ModelConfig
from firth.model.config_groups import RopeConfig
from firth.model.init import init_empty_weights
from firth.types import UserError


@dataclass(frozen=True)
class WeightMapping:
    """One tensor of a family and the firth tensors it is made of: hf = cat(ours, dim 0), optionally transposed.

    Args:
        hf_name: Name of the tensor in transformers.
        names: Names of the firth tensors, in the order of the rows.
        sizes: Rows of each firth tensor; needed only if there are several.
        transposed: Whether the family stores the transpose.
        unused_rows: Leading rows that the family's model never reads (position tables of BART and MPNet). They are
            written as zeros and dropped on load.
        shapes: Shape of the tensor in firth and in the family, where those differ.
    """

    hf_name: str
    names: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    transposed: bool = False
    unused_rows: int = 0
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


@dataclass(frozen=True, eq=False)
class HeadSpec:
    """A transformers class with a task head, with or without the LM head, such as BertForPreTraining.

    Args:
        name: Name of the class.
        head_name: Name that firth's objectives give the head.
        make: Function (ModelConfig, number of outputs) -> the head.
        module_names: Modules of the head -> modules of the class; "" if the head is a single module.
        num_outputs: Output size of the head; 0 for one output per label.
        lm: Whether the class has the LM head too.
        prefix: Prefix of the transformer stack's tensors in this class, if it is not the family's.
        required_config: Config fields with the only value that firth supports.
    """

    name: str
    head_name: str
    make: Callable[[ModelConfig, int], nn.Module]
    module_names: dict[str, str]
    num_outputs: int = 0
    lm: bool = False
    prefix: str | None = None
    required_config: tuple[tuple[str, Any], ...] = ()

    def weight_mappings(self, config: ModelConfig, num_outputs: int) -> list[WeightMapping]:
        """Return the mappings of the head's tensors; the last tensor has one row per output."""
        with init_empty_weights():
            names = list(self.make(config, num_outputs).state_dict())
        out = []
        for name in names:
            module, _, kind = name.rpartition(".")
            out.append(WeightMapping(f"{self.module_names[module]}.{kind}", (f"heads.{self.head_name}.{name}",)))
        return out


@dataclass(frozen=True, eq=False)
class Family:
    """A published model family.

    Args:
        name: `model_type` in config.json.
        classes: The transformers classes with and without the LM head.
        to_hf_config: ModelConfig -> config.json, without token ids.
        to_config: config.json -> ModelConfig. Raises UserError for settings that firth does not support.
        weight_mappings: Function (ModelConfig, with LM head) -> mappings of every tensor of the model.
        prefix: Prefix of the tensor names that files saved from the headless model lack.
        ignored_names: Pattern of tensor names without information, such as buffers.
        tied_names: Pattern of the second names of tied matrices.
        unused_heads: Pattern of head tensors that are skipped and reported if none of the family's classes here has
            them (BERT's pooler without next-sentence prediction).
        renames: Old spelling -> new spelling, applied to the names in a file.
        heads: The classes with task heads.
        pad_token_id: The id that the tokenizer's padding must have because the model derives positions from it (RoBERTa).
    """

    name: str
    classes: tuple[str, str]
    to_hf_config: Callable[[ModelConfig], dict[str, Any]]
    to_config: Callable[[dict[str, Any]], ModelConfig]
    weight_mappings: Callable[[ModelConfig, bool], list[WeightMapping]]
    prefix: str
    ignored_names: str = r"$^"
    tied_names: str = r"$^"
    unused_heads: str = r"$^"
    renames: tuple[tuple[str, str], ...] = ()
    heads: tuple[HeadSpec, ...] = ()
    pad_token_id: int | None = None

    def supports(self, config: ModelConfig) -> bool:
        """Return whether the family's config.json can express a config, ignoring weight initialization."""
        try:
            back = self.to_config(self.to_hf_config(config))
        except UserError:
            return False
        return back.with_fields({"init.std": config.init.std, "init.zero_output": config.init.zero_output}) == config


def to_hf(state: dict[str, Tensor], entries: Iterable[WeightMapping]) -> dict[str, Tensor]:
    """Convert a firth state dict to the family's tensor names and layouts."""
    out = {}
    for entry in entries:
        pieces = [state[name] for name in entry.names]
        whole = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        whole = whole.t() if entry.transposed else whole
        if entry.unused_rows:
            whole = torch.cat((whole.new_zeros(entry.unused_rows, *whole.shape[1:]), whole))
        out[entry.hf_name] = (whole.reshape(entry.shapes[1]) if entry.shapes[1] else whole).contiguous()
    return out


def without_prefix(family: Family, names: Iterable[str]) -> bool:
    """Return whether a file was saved from the headless model, whose tensor names lack the class's prefix."""
    prefixes = (family.prefix, *(spec.prefix for spec in family.heads if spec.prefix is not None))
    return not any(name.startswith(prefixes) for name in names)


def resolve_names(family: Family, names: Iterable[str], known: Container[str]) -> dict[str, str]:
    """Map the names in the family's weight mappings to the names in a file.

    Normalizes old spellings and the prefixes of other classes, and adds the family's prefix if the file has none, except
    to names outside of it, such as a head's.

    Args:
        family: The family of the file.
        names: Tensor names in the file.
        known: All names in the family's weight mappings.

    Raises:
        UserError: If two names in the file mean the same tensor.
    """
    found = list(names)
    others = [spec.prefix for spec in family.heads if spec.prefix is not None]
    headless = without_prefix(family, found)
    out: dict[str, str] = {}
    for name in found:
        new = name
        for old, spelling in family.renames:
            new = new.replace(old, spelling)
        for other in others:
            if new.startswith(other):
                new = family.prefix + new.removeprefix(other)
        new = family.prefix + new if headless and (family.prefix + new in known or new not in known) else new
        if new in out:
            raise UserError(f"a file holds {out[new]!r} and {name!r}, which are two names for one tensor")
        out[new] = name
    return out


def from_hf(state: Mapping[str, Tensor], entries: Iterable[WeightMapping]) -> dict[str, Tensor]:
    """Convert the family's tensors to firth names and layouts, as views of the same memory.

    Tensors that are missing from `state` are skipped; the others must have the expected sizes.
    """
    out: dict[str, Tensor] = {}
    for entry in entries:
        if entry.hf_name not in state:
            continue
        whole = state[entry.hf_name][entry.unused_rows :]
        whole = whole.reshape(entry.shapes[0]) if entry.shapes[0] else whole
        whole = whole.t() if entry.transposed else whole
        pieces = [whole] if len(entry.names) == 1 else whole.split(list(entry.sizes))
        out |= dict(zip(entry.names, pieces, strict=True))
    return out


def activation(given: str, names: dict[str, str], where: str) -> str:
    """Return firth's name of an activation; raise a UserError if there is none."""
    if given not in names:
        raise UserError(f"config.json has {where}={given!r}; firth supports {', '.join(names)}")
    return names[given]


def check_supported(config: dict[str, Any], supported: dict[str, Any]) -> None:
    """Raise a UserError if a config field has a value other than the only one supported; null is accepted."""
    for field, value in supported.items():
        if config.get(field, value) != value and config[field] is not None:
            raise UserError(f"config.json has {field}={config[field]!r}; firth supports {field}={value!r} only")


def rope(config: dict[str, Any], default: float, layers: str = "") -> RopeConfig:
    """Read the rotary settings of a config.json.

    Args:
        config: The config, as transformers 5 writes it (`rope_parameters`, possibly by layer type) or transformers 4 did.
        default: `rope_theta` where the config has none.
        layers: Layer type to look up in `rope_parameters`.

    Raises:
        UserError: If the scaling type is not supported.
    """
    fields = config.get("rope_parameters") or config.get("rope_scaling") or {}
    fields = fields.get(layers) or fields
    kind = fields.get("rope_type", fields.get("type", "default"))
    theta = float(fields.get("rope_theta", config.get("rope_theta", default)))
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, scaling="linear", factor=float(fields["factor"]))
    if kind == "llama3":
        low, high = float(fields["low_freq_factor"]), float(fields["high_freq_factor"])
        return RopeConfig(
            theta,
            scaling="llama3",
            factor=float(fields["factor"]),
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_positions=fields["original_max_position_embeddings"],
        )
    raise UserError(
        f"config.json has rotary positions of type {kind!r}; firth supports the types default, linear and llama3"
    )


def theta(config: dict[str, Any], default: float, layers: str = "") -> float:
    """Read the rotary base for a family without RoPE scaling."""
    found = rope(config, default, layers)
    if found.scaling != "none":
        raise UserError(f"config.json has rotary positions of type {found.scaling!r}; this family has default only")
    return found.theta


def rope_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the rotary fields of config.json, for both transformers 5 and 4."""
    rope = config.position.rope
    fields: dict[str, Any] = {"rope_type": "default" if rope.scaling == "none" else rope.scaling}
    if rope.scaling != "none":
        fields["factor"] = rope.factor
    if rope.scaling == "llama3":
        fields |= {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
        fields["original_max_position_embeddings"] = rope.original_max_positions
    old = {"rope_scaling": fields} if rope.scaling != "none" else {}
    return {"rope_parameters": fields | {"rope_theta": rope.theta}, "rope_theta": rope.theta} | old


def module_mappings(
    pairs: dict[str, str], ours: str, theirs: str, bias: bool, weight: bool = True
) -> list[WeightMapping]:
    """Return the mappings of modules that correspond one to one.

    Args:
        pairs: Module names in firth -> in the family.
        ours: Prefix of the firth names.
        theirs: Prefix of the family's names.
        bias: Whether the modules have a bias.
        weight: Whether to include the weight.
    """
    kinds = ["weight"] * weight + ["bias"] * bias
    return [WeightMapping(f"{theirs}{b}.{kind}", (f"{ours}{a}.{kind}",)) for a, b in pairs.items() for kind in kinds]
