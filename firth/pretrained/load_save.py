"""Models on disk: directories that `transformers` loads, and the directories that `transformers` wrote.

    config.json  generation_config.json  model.safetensors  tokenizer.json ...     the family's own format
    firth.json   the Shape, the parts, the facts, the tokenizer's digest, content hashes of config.json and the weights

Parts other than the vocabulary head lie in the same file as `parts.NAME.*`, which others ignore. A shape that no
published family expresses is saved with our own names and firth.json alone. Nothing pickled is ever read.

    print(save_model(model, tokenizer, Path("runs/mine/model")))     # transformers loads it as NanoChatForCausalLM
    model = load_model(Path("runs/mine/model"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

import torch
from torch import Tensor, nn

from firth.io.atomic import make_directory
from firth.io.gguf import find
from firth.io.integrity import COPY_AGAIN, sealed, verify
from firth.io.safetensors import (
    AS_IT_IS,
    Storage,
    check_finite,
    check_no_foreign_code,
    check_numbers,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from firth.model.config import ModelConfig
from firth.model.empty_weights import init_empty_weights
from firth.model.head_descriptions import describe_head, rebuild_head
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS
from firth.pretrained import gguf
from firth.pretrained.families import FAMILIES, families_of
from firth.pretrained.families.family import Family, to_hf
from firth.pretrained.families.heads import labels, of_model
from firth.pretrained.families.read_state import LoadedState, read_hf, read_own
from firth.tokenizer import chat
from firth.types import UserError

if TYPE_CHECKING:
    from firth.tokenizer.tokenizer import Tokenizer


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
    make_directory(directory)
    names: list[str] = []
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    parts, head = {name: describe_head(part) for name, part in model.heads.items()}, "lm" in model.heads
    form = of_model(_families(model.config, tokenizer), model.config, parts)
    record = {"config": asdict(model.config), "heads": parts, "family": None if form is None else form.family.name}
    record |= {} if tokenizer is None else {"tokenizer": tokenizer.digest}
    if form is None:
        written = {name: tensor.contiguous() for name, tensor in state.items() if name not in model.shared_parameters()}
        (directory / "config.json").unlink(missing_ok=True)
        (directory / "generation_config.json").unlink(missing_ok=True)
        said = "no family of transformers expresses this shape, so only firth loads it"
    else:
        entries = form.written(model.config)
        written = to_hf(state, entries)
        theirs = {ours for entry in entries for ours in entry.name} | model.shared_parameters().keys()
        written |= {name: tensor.contiguous() for name, tensor in state.items() if name not in theirs}
        dtype = str(storage.dtype or model.tokens.weight.dtype).removeprefix("torch.")
        ids = token_ids(tokenizer, model.config)
        common = {
            "architectures": [form.name],
            "model_type": form.family.name,
            "dtype": dtype,
            "torch_dtype": dtype,
        } | ids
        classes = [str(name) for name in (facts or {}).get("classes", ())]
        names.append("config.json")
        write_json(directory / "config.json", common | form.family.to_hf_config(model.config) | form.config(classes))
        if head and model.config.causal:
            known = {name: id for name, id in ids.items() if id is not None}
            stops = [] if tokenizer is None else chat.stops(tokenizer)
            # A chat's answer ends with its turn, which is not the end of the text: generate() must know both.
            write_json(
                directory / "generation_config.json", known | ({"eos_token_id": stops} if len(stops) > 1 else {})
            )
        beside = sorted(PREFIX_HEADS & parts.keys())
        said = f"transformers loads it as {form.name}"
        said += "".join(f", without its {name}, which peft adds" for name in beside)
    names += write_tensors(written, directory, storage)
    if tokenizer is not None:
        reads: Literal["seq2seq", "causal", "bidirectional"] = (
            "causal" if model.config.causal or model.config.prefix_lm else "bidirectional"
        )
        tokenizer.with_post_processor("seq2seq" if model.config.num_encoder_layers else reads).save(
            directory, token_type_ids=model.config.type_vocab_size > 0
        )
    # Not of the files that people edit: chat_template.jinja, generation_config.json, tokenizer_config.json. What decides
    # the ids has the tokenizer's digest.
    write_json(directory / "firth.json", sealed(record | {"facts": dict(facts or {})}, directory, names))
    return said


def _families(config: ModelConfig, tokenizer: Tokenizer | None) -> list[Family]:
    """The families that express a shape, and whose positions a tokenizer's padding does not upset."""
    pad = None if tokenizer is None else tokenizer.vocab.roles.get("pad")
    return [family for family in families_of(config) if tokenizer is None or family.pad in (None, pad)]


def token_ids(tokenizer: Tokenizer | None, config: ModelConfig) -> dict[str, Any]:
    """The ids a config states. Explicit nulls: a family's own defaults may lie outside a small vocabulary."""
    roles: Mapping[str, int] = {} if tokenizer is None else tokenizer.vocab.roles
    ids: dict[str, Any] = {f"{role}_token_id": roles.get(role) for role in ("pad", "bos", "eos", "cls", "sep")}
    if config.num_encoder_layers:
        ids["pad_token_id"] = roles.get("pad", 0)
        ids["decoder_start_token_id"] = roles.get(config.decoder_start_token, 0)
    return ids


def load_model(directory: Path, parts: Mapping[str, nn.Module] | None = None) -> LM:
    """The model of a directory that firth or transformers wrote, in evaluation mode.

    parts: modules to fill in place of those that firth.json describes; needed only for kinds it cannot rebuild.
    Raises UserError if the directory holds no model, or tensors that do not fit.
    """
    found = _read(directory)
    if parts is None:
        with init_empty_weights(), _described(found.parts, directory):
            model = LM(
                found.config, {name: rebuild_head(description, name) for name, description in found.parts.items()}
            )
        _compare(model, found.state, directory)  # before memory is taken for what a stranger's file says there is
        model = model.to_empty(device="cpu")
        model.tie()
    else:
        model = LM(found.config, parts)
    _fill(model, found.state, directory)
    return model.eval()


def check_vocab_fits(tokenizer: Tokenizer, config: ModelConfig, where: str) -> None:
    """UserError if a tokenizer has ids that a model has no vector for. One with fewer is common: tables are padded."""
    if tokenizer.vocab.size > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab.size:,} ids and the model {config.vocab_size:,} vectors, so they do not "
            "belong together: take the tokenizer that the model was trained with"
        )


def init_from(model: LM, directory: Path) -> tuple[list[str], list[str]]:
    """Begin from the weights of a directory: strict on the trunk. Returns the parts dropped and the parts added.

    A part of the same name but of other sizes is both dropped and added. A prefix or a prompt is kept, for without it the
    trunk would read every text in another way. Raises UserError if the trunks differ.
    """
    found = _read(directory)
    with _described(found.parts, directory):
        for name in PREFIX_HEADS & found.parts.keys():
            model.heads[name] = rebuild_head(found.parts[name], name)
    config, shared = found.config, model.shared_parameters()
    state = {name: tensor for name, tensor in found.state.items() if name not in shared}
    mine = {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
    for name, tensor in mine.items():
        if not name.startswith("heads.") and (name not in state or state[name].shape != tensor.shape):
            raise UserError(
                f"cannot start from {directory}: {_difference(model.config, config)}; use the same shape, which model=null does"
            )
    there, here = _by_part(state), _by_part(mine)
    kept = _kept(mine, state)
    fill = {n: t for n, t in state.items() if not n.startswith("heads.")} | {n: state[n] for p in kept for n in here[p]}
    _fill(model, {n: fill.get(n, t) for n, t in mine.items()}, directory)
    return sorted(there.keys() - set(kept)), sorted(here.keys() - set(kept))


def added_parts(model: LM, base: LM) -> list[str]:
    """Return the parts of a model that `start_from` finds no weights for in a base."""
    mine = {name: tensor for name, tensor in model.state_dict().items() if name not in model.shared_parameters()}
    state = {name: tensor for name, tensor in base.state_dict().items() if name not in base.shared_parameters()}
    return sorted(_by_part(mine).keys() - {*_kept(mine, state)})


def _kept(mine: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """The parts that are there under the same name with the same sizes."""
    there, here = _by_part(state), _by_part(mine)
    return [
        p for p in here if p in there and {n: state[n].shape for n in there[p]} == {n: mine[n].shape for n in here[p]}
    ]


def _by_part(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for name in state:
        if name.startswith("heads."):
            parts.setdefault(name.split(".")[1], []).append(name)
    return parts


def _difference(mine: ModelConfig, theirs: ModelConfig) -> str:
    """The first field in which two shapes differ, in words."""
    for field in fields(ModelConfig):
        here, there = getattr(mine, field.name), getattr(theirs, field.name)
        if here != there:
            return f"model.{field.name} is {there!r} there and {here!r} here"
    return "its tensors do not fit its shape"


def _compare(model: LM, state: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """The tensors for every name of the model; one missing, left over, of another size or kind is a UserError."""
    state = dict(state) | {name: state[first] for name, first in model.shared_parameters().items() if first in state}
    mine = model.state_dict()
    for name in sorted(mine.keys() ^ state.keys()):
        raise UserError(f"{where} {'lacks' if name in mine else 'holds an unexpected'} tensor {name!r}")
    for name, tensor in mine.items():
        if tensor.shape != state[name].shape:
            raise UserError(f"{where}: tensor {name!r} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
        if not tensor.is_floating_point() and state[name].dtype != tensor.dtype:
            raise UserError(f"{where}: tensor {name!r} is of {state[name].dtype}, expected {tensor.dtype}")
    check_numbers({name: state[name] for name, tensor in mine.items() if tensor.is_floating_point()}, where)
    return state


def _fill(model: LM, state: Mapping[str, Tensor], where: Path) -> None:
    """Copy every tensor in."""
    state = _compare(model, state, where)
    mine = model.state_dict()
    check_finite({name: state[name] for name in mine}, where)
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(state[name])


def left_out(directory: Path) -> list[str]:
    """The tensors of a directory, by name, that no model of ours has a place for, and that `load_model` leaves out."""
    return _read(directory).left_out


def metadata_of(directory: Path) -> dict[str, Any]:
    """What was kept of a model's training beside its weights; nothing where there is none."""
    found = read_json(directory / "firth.json").get("facts")
    return found if isinstance(found, dict) else {}


def class_names(directory: Path) -> tuple[str, ...]:
    """The names of the classes of a directory's head, in the order of its rows; none where nothing names them."""
    told = metadata_of(directory).get("classes")
    return labels(read_json(directory / "config.json")) if told is None else tuple(str(name) for name in told)


def _read(directory: Path) -> LoadedState:
    """What a directory holds, by our names."""
    config, ours = read_json(directory / "config.json"), read_json(directory / "firth.json")
    verify(ours, directory, directory / "firth.json", COPY_AGAIN)
    file = find(directory)
    if file is not None:
        config, ours = gguf.config(file), {}
    elif not config and (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} holds an adapter and no model: start from its base, with peft.init_from={directory}"
        )
    elif not config and not ours:
        raise UserError(f"{directory} holds no model: neither firth.json nor config.json is there")
    check_no_foreign_code(config, directory / "config.json")
    kind = ours.get("family") if ours else config.get("model_type")
    if not (ours and kind is None) and (type(kind) is not str or kind not in FAMILIES):
        raise UserError(f"{directory}/config.json is of family {kind!r:.40}; firth reads {', '.join(FAMILIES)}")
    state = read_tensors(directory) if file is None else gguf.tensors(file)
    check_numbers({name: tensor for name, tensor in state.items() if tensor.is_floating_point()}, directory)
    if not ours:
        family = FAMILIES[str(kind)]
        model_config = checked(lambda: family.to_config(config), state, file or directory / "config.json")
        return read_hf(family, model_config, state, config, f"{directory}")
    model_config = checked(lambda: _shape(ours), state, directory / "firth.json")
    if kind is not None:
        with _described(ours["heads"], directory):
            return read_own(FAMILIES[kind], model_config, state, ours["heads"], f"{directory}")
    if model_config.tie_embeddings and "lm" in ours["heads"] and "tokens.weight" in state:
        state["heads.lm.weight"] = state["tokens.weight"]
    return LoadedState(model_config, state, ours["heads"], [])


def _shape(ours: Mapping[str, Any]) -> ModelConfig:
    """The shape in firth.json."""
    unknown = sorted(ours["config"].keys() - {field.name for field in fields(ModelConfig)})
    if unknown:
        raise UserError(f"firth.json has the unknown shape field {unknown[0]!r}: it is of a newer version")
    if type(ours["heads"]) is not dict:
        raise TypeError("its parts are no object")
    return ModelConfig(**ours["config"])


def checked(make: Callable[[], ModelConfig], state: Mapping[str, Tensor], file: Path) -> ModelConfig:
    """The shape that a file describes, if it is one and the tensors beside it are enough for a model of that size.

    UserError otherwise, before anything of that size is made.
    """
    try:
        config = make()
        _typed(config)
        table = 0 if config.max_characters else config.vocab_size * config.embedding_dim
        needed = replace(config, vocab_size=1).num_parameters() + table
    except KeyError as missing:
        raise UserError(f"{file} lacks the field {missing}") from None
    except UserError as fault:
        raise UserError(f"{file}: {fault}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as fault:
        raise UserError(f"{file} describes no model: {fault}") from None
    held = sum(tensor.numel() for tensor in state.values())
    if needed > SPARE * held:
        raise UserError(
            f"{file} describes a model of {max(config.num_layers, config.num_encoder_layers):,} layers and {min(needed, MOST):,} numbers, and the files "
            f"beside it hold {held:,}: they do not belong together"
        )
    return config


MOST = 10**15
DEEPEST, SPARE = 10_000, 3
"""The most layers of a model from a file (ALBERT's cost nothing there), and how many times the numbers in its files a model
may have, its head aside: a file may lack what its class does not use. No more than MOST are told."""


def _typed(config: ModelConfig) -> None:
    """TypeError if a field of a shape is of another type than it says."""
    allowed: dict[type, tuple[type, ...]] = {int: (int,), float: (int, float), bool: (bool,)}
    for name, kind in get_type_hints(ModelConfig).items():
        value = getattr(config, name)
        if type(value) not in allowed.get(kind, (str, int)):
            raise TypeError(f"{name} is {value!r:.40}")


@contextmanager
def _described(parts: Mapping[str, Any], directory: Path) -> Iterator[None]:
    """UserError where what firth.json says of the parts is believed and turns out to be nonsense."""
    try:
        for shape in _shapes(parts):
            if max(shape.get("num_layers", 0), shape.get("num_encoder_layers", 0)) > DEEPEST:
                raise ValueError("a part has too many layers")
        yield
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
