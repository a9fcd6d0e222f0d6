"""Models on disk: directories that `transformers` loads, and the directories that `transformers` wrote.

    config.json  generation_config.json  model.safetensors  tokenizer.json ...     the family's own format
    firth.json                                                                     the Shape, the parts, the facts

Parts other than the vocabulary head lie in the same file as `parts.NAME.*`, which others ignore. A shape that no
published family expresses is saved with our own names and firth.json alone. Nothing pickled is ever read.

    print(save_model(model, tokenizer, Path("runs/mine/model")))     # transformers loads it as NanoChatForCausalLM
    model = load_model(Path("runs/mine/model"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from firth.gguf import find
from firth.model import gguf
from firth.model.families import FAMILIES, families_of
from firth.model.families.family import Entry, Family, Headed, to_ours, to_theirs
from firth.model.files import (
    AS_IT_IS,
    Storage,
    read_json,
    read_tensors,
    refuse_foreign,
    refuse_numbers,
    write_json,
    write_tensors,
)
from firth.model.heads import Vocabulary
from firth.model.lm import LM
from firth.model.parts import Description, described, rebuilt
from firth.model.shape import Shape
from firth.types import UserError

if TYPE_CHECKING:
    from firth.text.tokenizer import Tokenizer


def save_model(
    model: LM,
    tokenizer: Tokenizer | None,
    directory: Path,
    facts: Mapping[str, Any] | None = None,
    storage: Storage = AS_IT_IS,
) -> str:
    """Write a model directory; return one sentence that says what others can load it as.

    facts: anything worth keeping beside the weights (steps, loss, recipe hash), as JSON. storage: the numbers' type, and how
    they are divided among files. The tokenizer is written so that others too frame a text as this model reads one.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    parts, head = {name: described(part) for name, part in model.parts.items()}, "lm" in model.parts
    family, headed = _class(families_of(model.shape), model.shape, parts)
    record = {"shape": asdict(model.shape), "parts": parts, "family": None if family is None else family.name}
    if family is None:
        written = {name: tensor.contiguous() for name, tensor in state.items() if name not in model.shared()}
        (directory / "config.json").unlink(missing_ok=True)
        (directory / "generation_config.json").unlink(missing_ok=True)
        said = "no family of transformers expresses this shape, so only firth loads it"
    else:
        entries = _entries(family, model.shape, head, headed)
        written = to_theirs(state, entries)
        theirs = {ours for entry in entries for ours in entry.ours} | model.shared().keys()
        written |= {name: tensor.contiguous() for name, tensor in state.items() if name not in theirs}
        dtype = str(storage.dtype or model.tokens.weight.dtype).removeprefix("torch.")
        ids = token_ids(tokenizer, model.shape)
        kind = headed.name if headed else family.classes[0 if head else 1]
        common = {"architectures": [kind], "model_type": family.name, "dtype": dtype, "torch_dtype": dtype} | ids
        write_json(directory / "config.json", common | family.config(model.shape))
        if head and model.shape.causal:
            known = {name: id for name, id in ids.items() if id is not None}
            stops = [] if tokenizer is None else tokenizer.stops
            # A chat's answer ends with its turn, which is not the end of the text: generate() must know both.
            write_json(
                directory / "generation_config.json", known | ({"eos_token_id": stops} if len(stops) > 1 else {})
            )
        said = f"transformers loads it as {kind}"
    write_tensors(written, directory, storage)
    write_json(directory / "firth.json", record | {"facts": dict(facts or {})})
    if tokenizer is not None:
        reads: Literal["source", "left", "both"] = "left" if model.shape.causal else "both"
        tokenizer.framed("source" if model.shape.encoder else reads).save(directory, segments=model.shape.segments > 0)
    return said


def _class(
    families: Sequence[Family], shape: Shape, parts: Mapping[str, Description]
) -> tuple[Family | None, Headed | None]:
    """The family, and the class of it, that says the most of a model's parts; the first of those that say as much."""
    best: tuple[Family | None, Headed | None] = (None, None)
    most = -1
    for family in families:
        for headed in (None, *family.headed):
            heads = {} if headed is None else _heads(headed, shape)
            lm = "lm" in parts and (headed is None or headed.lm)
            whole = headed is None or headed.lm == ("lm" in parts)
            if whole and heads.items() <= parts.items() and len(heads) + lm > most:
                best, most = (family, headed), len(heads) + lm
    return best


def _heads(headed: Headed, shape: Shape) -> dict[str, Description]:
    """The heads that a class has besides the vocabulary's, described."""
    with torch.device("meta"):
        return {name: described(part) for name, part in headed.parts(shape).items()}


def _entries(family: Family, shape: Shape, head: bool, headed: Headed | None) -> list[Entry]:
    return family.entries(shape, head) + ([] if headed is None else headed.entries(shape))


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
    shape, state, names, _ = _read(directory)
    if parts is None:
        with torch.device("meta"):
            model = LM(shape, _rebuilt(names, directory))
        _compare(model, state, directory)  # before memory is taken for what a stranger's file says there is
        model = model.to_empty(device="cpu")
        model.tie()
    else:
        model = LM(shape, parts)
    _fill(model, state, directory)
    return model.eval()


def left_out(directory: Path) -> list[str]:
    """The tensors in a directory's files that are no weights of the model that is read of it, such as BERT's pooler."""
    return _read(directory)[3]


def refuse_larger(tokenizer: Tokenizer, shape: Shape, where: str) -> None:
    """UserError if a tokenizer has ids that a model has no vector for. One with fewer is common: tables are padded."""
    if tokenizer.vocab.size > shape.vocab:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab.size:,} ids and the model {shape.vocab:,} vectors, so they do not "
            "belong together: take the tokenizer that the model was trained with"
        )


def start_from(model: LM, directory: Path) -> tuple[list[str], list[str]]:
    """Begin from the weights of a directory: strict on the trunk. Returns the parts dropped and the parts added.

    A part of the same name but of other sizes is both dropped and added. Raises UserError if the trunks differ.
    """
    shape, state, _, _ = _read(directory)
    shared = model.shared()
    state = {name: tensor for name, tensor in state.items() if name not in shared}
    mine = {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
    for name, tensor in mine.items():
        if not name.startswith("parts.") and (name not in state or state[name].shape != tensor.shape):
            raise UserError(f"cannot start from {directory}: {_difference(model.shape, shape)}; use the same shape")
    there, here = _by_part(state), _by_part(mine)
    kept = [
        p for p in here if p in there and {n: state[n].shape for n in there[p]} == {n: mine[n].shape for n in here[p]}
    ]
    fill = {n: t for n, t in state.items() if not n.startswith("parts.")} | {n: state[n] for p in kept for n in here[p]}
    _fill(model, {n: fill.get(n, t) for n, t in mine.items()}, directory)
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


def _compare(model: LM, state: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors for every name of the model; one missing, left over, of another size or kind is a UserError."""
    state = dict(state) | {name: state[first] for name, first in model.shared().items() if first in state}
    mine = model.state_dict()
    for name in sorted(mine.keys() ^ state.keys()):
        raise UserError(f"{where} {'lacks' if name in mine else 'holds an unexpected'} tensor {name!r}")
    for name, tensor in mine.items():
        if tensor.shape != state[name].shape:
            raise UserError(f"{where}: tensor {name!r} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
    refuse_numbers(state, where)
    return state


def _fill(model: LM, state: Mapping[str, Tensor], where: Path) -> None:
    """Copy every tensor in."""
    state = _compare(model, state, where)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(state[name])


def _read(directory: Path) -> tuple[Shape, dict[str, Tensor], dict[str, dict[str, Any]], list[str]]:
    """The shape, the tensors by our names, the descriptions of the parts, and the tensors that are none of ours."""
    config, ours = read_json(directory / "config.json"), read_json(directory / "firth.json")
    file = find(directory)
    if file is not None:
        config, ours = gguf.config(file), {}
    elif not config and not ours:
        raise UserError(f"{directory} holds no model: neither firth.json nor config.json is there")
    refuse_foreign(config, directory / "config.json")
    kind = ours.get("family") if ours else config.get("model_type")
    if not (ours and kind is None) and (type(kind) is not str or kind not in FAMILIES):
        raise UserError(f"{directory}/config.json is of family {kind!r:.40}; firth reads {', '.join(FAMILIES)}")
    state = read_tensors(directory) if file is None else gguf.tensors(file)
    if ours:
        shape = checked(lambda: _shape(ours), state, directory / "firth.json")
    else:
        shape = checked(lambda: FAMILIES[str(kind)].shape(config), state, file or directory / "config.json")
    if kind is None:
        if shape.tied and "lm" in ours["parts"]:
            state["parts.lm.weight"] = state["tokens.weight"]
        return shape, state, ours["parts"], []
    family = FAMILIES[kind]
    head = "lm" in ours["parts"] if ours else _has_head(family, shape, state, config)
    extra = {name: tensor for name, tensor in state.items() if name.startswith("parts.")}
    rest = {name: tensor for name, tensor in state.items() if name not in extra}
    if ours:
        parts, (_, headed) = ours["parts"], _class([family], shape, ours["parts"])
    else:
        headed = next(
            (h for h in family.headed if h.lm == head and all(e.theirs in rest for e in h.entries(shape))), None
        )
        parts = {"lm": described(_bare_head(shape))} if head else {}
        parts |= {} if headed is None else _heads(headed, shape)
    found, spare = to_ours(family, rest, _entries(family, shape, head, headed), f"{directory}")
    if shape.tied:
        found.pop("parts.lm.weight", None)
        if head and "tokens.weight" in found:
            found["parts.lm.weight"] = found["tokens.weight"]
    return shape, found | extra, parts, spare


def _bare_head(shape: Shape) -> Vocabulary:
    with torch.device("meta"):
        return Vocabulary(shape)


def _has_head(family: Family, shape: Shape, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> bool:
    """Whether a foreign file holds the vocabulary head: by its tensors, or by its class where all of it is tied."""
    trunk = set(family.entries(shape, False))
    own: list[Entry] = [e for e in family.entries(shape, True) if e not in trunk]
    own = [e for e in own if not (shape.tied and e.ours == ("parts.lm.weight",))]
    if own:
        return all(entry.theirs in state for entry in own)
    return family.classes[1] not in config.get("architectures", [])


def _shape(ours: Mapping[str, Any]) -> Shape:
    """The shape in firth.json."""
    unknown = sorted(ours["shape"].keys() - {field.name for field in fields(Shape)})
    if unknown:
        raise UserError(f"firth.json has the unknown shape field {unknown[0]!r}: it is of a newer version")
    if type(ours["parts"]) is not dict:
        raise TypeError("its parts are no object")
    return Shape(**ours["shape"])


def checked(make: Callable[[], Shape], state: Mapping[str, Tensor], file: Path) -> Shape:
    """The shape that a file describes, if it is one and the tensors beside it are enough for a model of that size.

    UserError otherwise, before anything of that size is made.
    """
    try:
        shape = make()
        _typed(shape)
        table = 0 if shape.characters else shape.vocab * shape.table_width
        layers, needed = max(shape.depth, shape.encoder), replace(shape, vocab=1).parameters() + table
    except KeyError as missing:
        raise UserError(f"{file} lacks the field {missing}") from None
    except UserError as fault:
        raise UserError(f"{file}: {fault}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as fault:
        raise UserError(f"{file} describes no model: {fault}") from None
    held = sum(tensor.numel() for tensor in state.values())
    if layers > DEEPEST or needed > SPARE * held:
        raise UserError(
            f"{file} describes a model of {min(layers, MOST):,} layers and {min(needed, MOST):,} numbers, and the files "
            f"beside it hold {held:,}: they do not belong together"
        )
    return shape


MOST = 10**15
DEEPEST, SPARE = 10_000, 3
"""The most layers of a model from a file (ALBERT's cost nothing there), and how many times the numbers in its files a model
may have, its head aside: a file may lack what its class does not use. No more than MOST are told."""


def _typed(shape: Shape) -> None:
    """TypeError if a field of a shape is of another type than it says."""
    allowed = {"int": (int,), "float": (int, float), "bool": (bool,)}
    for field in fields(Shape):
        value = getattr(shape, field.name)
        if type(value) not in allowed.get(str(field.type), (str, int)):
            raise TypeError(f"{field.name} is {value!r:.40}")


def _rebuilt(names: Mapping[str, Any], directory: Path) -> dict[str, nn.Module]:
    """The parts that firth.json describes, without memory of their own."""
    try:
        for shape in _shapes(names):
            if max(shape.get("depth", 0), shape.get("encoder", 0)) > DEEPEST:
                raise ValueError("a part has too many layers")
        return {name: rebuilt(description, name) for name, description in names.items()}
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as fault:
        raise UserError(f"{directory}/firth.json describes parts that cannot be rebuilt ({str(fault)[:80]})") from None


def _shapes(described: Any) -> Iterator[Mapping[str, Any]]:
    """Every shape in a description, however deep."""
    waiting = [described]
    while waiting:
        one = waiting.pop()
        if type(one) is dict:
            waiting += one.values()
            if "vocab" in one:
                yield one
        elif type(one) is list:
            waiting += one
