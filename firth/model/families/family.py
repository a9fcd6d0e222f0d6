"""What a published family is: its `config.json` to a `Shape` and back, and its tensor names to ours and back.

A family expresses a shape exactly when the shape survives the way there and back, so no second list of conditions
can drift from the first. Tensors: each of theirs is one of ours, or several of ours stacked by rows (GPT-2's
`c_attn`, ModernBERT's `Wqkv` and `Wi`), perhaps transposed (GPT-2's Conv1D).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from firth.model.shape import Shape
from firth.types import UserError


@dataclass(frozen=True)
class Entry:
    """theirs = cat(ours, dim 0), transposed if so. `sizes`: rows of each of ours, needed only where several are stacked.

    unread: rows in front of theirs that their model never reads (BART's and MPNet's positions): written as zeros, left out
    when read. folded: the shape that the result has with us, and the one it has with them, where those differ.
    """

    theirs: str
    ours: tuple[str, ...]
    sizes: tuple[int, ...] = ()
    transposed: bool = False
    unread: int = 0
    folded: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())


@dataclass(frozen=True)
class Headed:
    """One of transformers' classes with other heads than the vocabulary's alone: BertForPreTraining.

    name: of the class. lm: whether it has the vocabulary head too. parts: Shape -> the other heads by the names that our
    objectives give them; a model or a file is of this class where it has all of them. entries: their tensors.
    """

    name: str
    lm: bool
    parts: Callable[[Shape], dict[str, nn.Module]]
    entries: Callable[[Shape], list[Entry]]


@dataclass(frozen=True)
class Family:
    """name: `model_type` of the config. classes: transformers' class with and without the vocabulary head.

    config: Shape -> config.json without token ids. shape: config.json -> Shape (UserError if it asks for what a Shape
    cannot say). entries: every tensor of the model. prefix: what files saved from the bare model leave out.
    spare: pattern of names that a file may hold and that are no weights of ours (buffers, BERT's pooler).
    renames: old spelling -> new, applied to a file's names. headed: its classes that have further heads.
    """

    name: str
    classes: tuple[str, str]
    config: Callable[[Shape], dict[str, Any]]
    shape: Callable[[dict[str, Any]], Shape]
    entries: Callable[[Shape, bool], list[Entry]]
    prefix: str
    spare: str = r"$^"
    renames: tuple[tuple[str, str], ...] = ()
    headed: tuple[Headed, ...] = ()

    def expresses(self, shape: Shape) -> bool:
        """Whether this family's config says all that the shape says (how weights are initialised aside)."""
        try:
            back = self.shape(self.config(shape))
        except UserError:
            return False
        return replace(back, init=shape.init, zero_init=shape.zero_init) == shape


def to_theirs(state: dict[str, Tensor], entries: Iterable[Entry]) -> dict[str, Tensor]:
    """Our tensors under the family's names."""
    out = {}
    for entry in entries:
        parts = [state[name] for name in entry.ours]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        whole = whole.t() if entry.transposed else whole
        if entry.unread:
            whole = torch.cat((whole.new_zeros(entry.unread, *whole.shape[1:]), whole))
        out[entry.theirs] = (whole.reshape(entry.folded[1]) if entry.folded[1] else whole).contiguous()
    return out


def to_ours(
    family: Family, state: dict[str, Tensor], entries: Iterable[Entry], where: str
) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors under our names, and the names of those that are no weights of ours (`Family.spare`).

    Tensors that neither explains are an error, missing ones are left out. They are views of the file's own memory.
    """
    names: dict[str, str] = {}
    bare = not any(name.startswith(family.prefix) for name in state)
    for name in state:
        new = name
        for old, spelling in family.renames:
            new = new.replace(old, spelling)
        names[family.prefix + new if bare else new] = name
    out: dict[str, Tensor] = {}
    for entry in entries:
        # A bare prefix must not hide what stands outside it, such as the head of a file that has no prefix at all.
        source = names.pop(entry.theirs, None)
        if source is None and bare:
            source = names.pop(family.prefix + entry.theirs, None)
        if source is None:
            continue
        try:
            whole = state[source][entry.unread :]
            whole = whole.reshape(entry.folded[0]) if entry.folded[0] else whole
            whole = whole.t() if entry.transposed else whole
            pieces = [whole] if len(entry.ours) == 1 else whole.split(list(entry.sizes))
        except (RuntimeError, IndexError):
            size = tuple(state[source].shape)
            raise UserError(f"{where}: tensor {source!r} is {size}, which does not fit config.json") from None
        out |= dict(zip(entry.ours, pieces, strict=True))
    unknown = [n for new, n in names.items() if not re.search(family.spare, new)]
    if unknown:
        raise UserError(f"{where} holds {unknown[0]!r}, which is no tensor of a {family.name} model of this shape")
    return out, sorted(names.values())


def activation(given: str, names: dict[str, str], where: str) -> str:
    """Our name of an activation of theirs."""
    if given not in names:
        raise UserError(f"config.json asks for {where}={given!r}; firth has {', '.join(names)}")
    return names[given]


def theta(config: dict[str, Any], default: float, layers: str = "") -> float:
    """The rotary base, as version 5 writes it (`rope_parameters`, perhaps by kind of layer) or version 4 did."""
    ropes = config.get("rope_parameters") or config.get("rope_scaling") or {}
    ropes = ropes.get(layers) or ropes
    kind = ropes.get("rope_type", ropes.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json asks for rotary positions of type {kind!r}; firth has the default type only")
    return float(ropes.get("rope_theta", config.get("rope_theta", default)))


def ropes(base: float) -> dict[str, Any]:
    """The rotary base for versions 5 and 4."""
    return {"rope_parameters": {"rope_type": "default", "rope_theta": base}, "rope_theta": base}


def both(pairs: dict[str, str], ours: str, theirs: str, bias: bool, weight: bool = True) -> list[Entry]:
    """Entries for modules that correspond one to one: their weight, and their bias where there is one."""
    kinds = ["weight"] * weight + ["bias"] * bias
    return [Entry(f"{theirs}{b}.{kind}", (f"{ours}{a}.{kind}",)) for a, b in pairs.items() for kind in kinds]
