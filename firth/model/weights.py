"""Models on disk: directories that `transformers` loads, and the directories that `transformers` wrote.

    config.json  generation_config.json  model.safetensors  tokenizer.json ...     the family's own format
    firth.json                                                                     the Shape, the parts, the facts

Parts other than the vocabulary head lie in the same file as `parts.NAME.*`, which others ignore. A shape that no
published family expresses is saved with our own names and firth.json alone. Nothing pickled is ever read.

    print(save_model(model, tokenizer, Path("runs/mine/model")))     # transformers loads it as NanoChatForCausalLM
    model = load_model(Path("runs/mine/model"))
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from firth.model.families import FAMILIES, families_of
from firth.model.families.classes import labels, of_model
from firth.model.families.family import Family, to_theirs
from firth.model.families.reading import Found, foreign, own
from firth.model.hollow import hollow
from firth.model.lm import LM
from firth.model.parts import described, rebuilt
from firth.model.shape import Shape
from firth.types import UserError

if TYPE_CHECKING:
    from firth.text.tokenizer import Tokenizer


def save_model(model: LM, tokenizer: Tokenizer | None, directory: Path, facts: Mapping[str, Any] | None = None) -> str:
    """Write a model directory; return one sentence that says what others can load it as.

    facts: anything worth keeping beside the weights (steps, loss, recipe hash), as JSON.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    parts, head = {name: described(part) for name, part in model.parts.items()}, "lm" in model.parts
    form = of_model(_families(model.shape, tokenizer), model.shape, parts)
    record = {"shape": asdict(model.shape), "parts": parts, "family": None if form is None else form.family.name}
    if form is None:
        written = {name: tensor.contiguous() for name, tensor in state.items() if name not in model.shared()}
        (directory / "config.json").unlink(missing_ok=True)
        (directory / "generation_config.json").unlink(missing_ok=True)
        said = "no family of transformers expresses this shape, so only firth loads it"
    else:
        entries = form.written(model.shape)
        written = to_theirs(state, entries)
        theirs = {ours for entry in entries for ours in entry.ours} | model.shared().keys()
        written |= {name: tensor.contiguous() for name, tensor in state.items() if name not in theirs}
        dtype = str(model.tokens.weight.dtype).removeprefix("torch.")
        ids = token_ids(tokenizer, model.shape)
        common = {
            "architectures": [form.name],
            "model_type": form.family.name,
            "dtype": dtype,
            "torch_dtype": dtype,
        } | ids
        classes = [str(name) for name in (facts or {}).get("classes", ())]
        _write(directory / "config.json", common | form.family.config(model.shape) | form.config(classes))
        if head and model.shape.causal:
            known = {name: id for name, id in ids.items() if id is not None}
            stops = [] if tokenizer is None else tokenizer.stops
            # A chat's answer ends with its turn, which is not the end of the text: generate() must know both.
            _write(directory / "generation_config.json", known | ({"eos_token_id": stops} if len(stops) > 1 else {}))
        beside = [name for name in ("prefix", "prompt") if name in parts]
        said = f"transformers loads it as {form.name}"
        said += "".join(f", without its {name}, which peft adds" for name in beside)
    _save(written, directory / "model.safetensors")
    _write(directory / "firth.json", record | {"facts": dict(facts or {})})
    if tokenizer is not None:
        tokenizer.save(directory)
    return said


def _families(shape: Shape, tokenizer: Tokenizer | None) -> list[Family]:
    """The families that express a shape, and whose positions a tokenizer's padding does not upset."""
    pad = None if tokenizer is None else tokenizer.vocab.roles.get("pad")
    return [family for family in families_of(shape) if tokenizer is None or family.pad in (None, pad)]


def token_ids(tokenizer: Tokenizer | None, shape: Shape) -> dict[str, Any]:
    """The ids a config states. Explicit nulls: a family's own defaults may lie outside a small vocabulary."""
    roles: Mapping[str, int] = {} if tokenizer is None else tokenizer.vocab.roles
    ids: dict[str, Any] = {f"{role}_token_id": roles.get(role) for role in ("pad", "bos", "eos", "cls", "sep")}
    if shape.encoder:
        ids["pad_token_id"] = roles.get("pad", 0)
        ids["decoder_start_token_id"] = roles.get(shape.decoder_start, 0)
    return ids


def load_model(directory: Path, parts: Mapping[str, nn.Module] | None = None) -> LM:
    """The model of a directory that firth or transformers wrote, in evaluation mode.

    parts: modules to fill in place of those that firth.json describes; needed only for kinds it cannot rebuild.
    Raises UserError if the directory holds no model, or tensors that do not fit.
    """
    found = _read(directory)
    if parts is None:
        with hollow():
            model = LM(found.shape, {name: rebuilt(description, name) for name, description in found.parts.items()})
        model = model.to_empty(device="cpu")
        model.tie()
    else:
        model = LM(found.shape, parts)
    _fill(model, found.state, f"{directory}")
    return model.eval()


def start_from(model: LM, directory: Path) -> tuple[list[str], list[str]]:
    """Begin from the weights of a directory: strict on the trunk. Returns the parts dropped and the parts added.

    A part of the same name but of other sizes is both dropped and added. Raises UserError if the trunks differ.
    """
    found = _read(directory)
    shape, shared = found.shape, model.shared()
    state = {name: tensor for name, tensor in found.state.items() if name not in shared}
    mine = {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
    for name, tensor in mine.items():
        if not name.startswith("parts.") and (name not in state or state[name].shape != tensor.shape):
            raise UserError(f"cannot start from {directory}: {_difference(model.shape, shape)}; use the same shape")
    there, here = _by_part(state), _by_part(mine)
    kept = [
        p for p in here if p in there and {n: state[n].shape for n in there[p]} == {n: mine[n].shape for n in here[p]}
    ]
    fill = {n: t for n, t in state.items() if not n.startswith("parts.")} | {n: state[n] for p in kept for n in here[p]}
    _fill(model, {n: fill.get(n, t) for n, t in mine.items()}, f"{directory}")
    return sorted(there.keys() - set(kept)), sorted(here.keys() - set(kept))


def _by_part(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for name in state:
        if name.startswith("parts."):
            parts.setdefault(name.split(".")[1], []).append(name)
    return parts


def _difference(mine: Shape, theirs: Shape) -> str:
    """The first field in which two shapes differ, in words."""
    for field in fields(Shape):
        here, there = getattr(mine, field.name), getattr(theirs, field.name)
        if here != there:
            return f"shape.{field.name} is {there!r} there and {here!r} here"
    return "its tensors do not fit its shape"


def _fill(model: LM, state: Mapping[str, Tensor], where: str) -> None:
    """Copy every tensor in; one missing, left over or of another size is a UserError."""
    state = dict(state) | {name: state[first] for name, first in model.shared().items() if first in state}
    mine = model.state_dict()
    for name in sorted(mine.keys() ^ state.keys()):
        raise UserError(f"{where} {'lacks' if name in mine else 'holds an unexpected'} tensor {name!r}")
    for name, tensor in mine.items():
        if tensor.shape != state[name].shape:
            raise UserError(f"{where}: tensor {name!r} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(state[name])


def left_out(directory: Path) -> list[str]:
    """The tensors of a directory, by name, that no model of ours has a place for, and that `load_model` leaves out."""
    return _read(directory).left_out


def class_names(directory: Path) -> tuple[str, ...]:
    """The names of the classes of a directory's head, in the order of its rows; none where nothing names them."""
    told = _json(directory / "firth.json").get("facts", {}).get("classes")
    return labels(_json(directory / "config.json")) if told is None else tuple(str(name) for name in told)


def _read(directory: Path) -> Found:
    """What a directory holds, by our names."""
    config, ours = _json(directory / "config.json"), _json(directory / "firth.json")
    if not config and (directory / "adapter_config.json").is_file():
        raise UserError(f"{directory} holds an adapter and no model: start from its base, with adapt.start={directory}")
    if not config and not ours:
        raise UserError(f"{directory} holds no model: neither firth.json nor config.json is there")
    state = _tensors(directory)
    kind = ours.get("family") if ours else config.get("model_type")
    if kind is None:
        shape = _shape(ours, directory)
        if shape.tied and "lm" in ours["parts"]:
            state["parts.lm.weight"] = state["tokens.weight"]
        return Found(shape, state, ours["parts"], [])
    if kind not in FAMILIES:
        raise UserError(f"{directory}/config.json is of family {kind!r}; firth reads {', '.join(FAMILIES)}")
    family = FAMILIES[kind]
    if ours:
        return own(family, _shape(ours, directory), state, ours["parts"], f"{directory}")
    return foreign(family, _guarded(family, config, directory), state, config, f"{directory}")


def _guarded(family: Family, config: dict[str, Any], directory: Path) -> Shape:
    try:
        return family.shape(config)
    except KeyError as missing:
        raise UserError(f"{directory}/config.json lacks the field {missing}") from missing


def _shape(ours: Mapping[str, Any], directory: Path) -> Shape:
    known = {field.name for field in fields(Shape)}
    unknown = sorted(ours["shape"].keys() - known)
    if unknown:
        raise UserError(f"{directory}/firth.json has the unknown shape field {unknown[0]!r}: it is of a newer version")
    return Shape(**ours["shape"])


def _tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a directory, from one file or several."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        files = [single]
    elif index.exists():
        names = sorted(set(_json(index).get("weight_map", {}).values()))
        if any(Path(name).name != name for name in names):
            raise UserError(f"{index} names a file outside of its directory")
        files = [directory / name for name in names]
    elif list(directory.glob("*.bin")) or list(directory.glob("*.pt")):
        raise UserError(
            f"{directory} holds pickled weights, which can run code and are never read: save as safetensors"
        )
    else:
        raise UserError(f"{directory} holds no model.safetensors")
    state: dict[str, Tensor] = {}
    for file in files:
        try:
            state |= load_file(file)
        except (SafetensorError, FileNotFoundError) as fault:
            raise UserError(f"{file} cannot be read as safetensors ({fault}): copy it again") from fault
    return state


def _json(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as fault:
        raise UserError(f"{file} is not JSON ({fault})") from fault
    if type(found) is not dict:
        raise UserError(f"{file} is not a JSON object")
    return found


def _write(file: Path, value: Mapping[str, Any]) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, file)


def _save(state: dict[str, Tensor], file: Path) -> None:
    partial = file.with_name(file.name + ".partial")
    seen: set[int] = set()
    for name, tensor in state.items():  # safetensors refuses two names for one memory (T5's stored tied head)
        state[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    save_file(state, partial, metadata={"format": "pt"})
    os.replace(partial, file)
