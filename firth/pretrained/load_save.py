"""Save and load model directories, in a format that transformers can read and write.

    config.json  generation_config.json  model.safetensors  tokenizer.json ...     transformers' format
    firth.json   the ModelConfig, the heads, metadata, digest of the tokenizer, content hashes of config.json and the weights

Heads that transformers has no class for are saved in the same file as `heads.NAME.*`, which other libraries ignore. A
config that no published family supports is saved with firth's names and with firth.json alone. Pickled files are never
read.

    print(save_model(model, tokenizer, Path("runs/mine/model")))     # transformers loads it as NanoChatForCausalLM
    model = load_model(Path("runs/mine/model"))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from firth.io.atomic import make_directory
from firth.io.gguf import find
from firth.io.integrity import COPY_AGAIN, sealed, verify
from firth.io.safetensors import (
    AS_IT_IS,
    Read,
    Storage,
    check_finite,
    check_no_foreign_code,
    check_numbers,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from firth.io.sharded import checkpoint_tensors, is_checkpoint
from firth.model.config import ModelConfig
from firth.model.flops import num_parameters
from firth.model.heads import describe_head, rebuild_head
from firth.model.init import init_empty_weights
from firth.model.model import LM
from firth.model.prefix import PREFIX_HEADS
from firth.model.shard_tensors import local, own_part
from firth.pretrained import families, gguf
from firth.pretrained.families.conversion import LoadedState, form_of_model, label_names, read_hf, read_own
from firth.pretrained.families.family import Family, WeightMapping, to_hf
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
    read: Read | None = None,
) -> str:
    """Write a model directory and return one sentence about what can load it.

    Args:
        model: The model.
        tokenizer: Its tokenizer, written so that other libraries add the same special tokens.
        directory: Directory to write.
        facts: Metadata to save (steps, loss, recipe hash), as JSON.
        storage: Number format of the weights and their division into files.
        read: Returns each weight when it is written; the model is on the meta device then (`open_model`).
    """
    make_directory(directory)
    names: list[str] = []
    state = {name: x.detach() if read else x.detach().cpu() for name, x in model.state_dict().items()}
    record = describe_model(model, tokenizer)
    heads = record["heads"]
    form = form_of_model(_families(model.config, tokenizer), model.config, heads)
    record |= {"family": None if form is None else form.family.name}
    converted: dict[str, WeightMapping] = {}
    if form is None:
        written = {name: tensor.contiguous() for name, tensor in state.items() if name not in model.shared_parameters()}
        (directory / "config.json").unlink(missing_ok=True)
        (directory / "generation_config.json").unlink(missing_ok=True)
        summary = "transformers has no family for this model config, so only firth loads it"
    else:
        entries = form.export_mappings(model.config)
        written = to_hf(state, entries)
        converted = {entry.hf_name: entry for entry in entries}
        theirs = {ours for entry in entries for ours in entry.names} | model.shared_parameters().keys()
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
        write_json(
            directory / "config.json", common | form.family.to_hf_config(model.config) | form.config_fields(classes)
        )
        if "lm" in model.heads and model.config.causal:
            known = {name: id for name, id in ids.items() if id is not None}
            stops = [] if tokenizer is None else chat.stops(tokenizer)
            # An answer in a chat ends with the end of its turn, not of the text: generate() must stop at both.
            write_json(
                directory / "generation_config.json", known | ({"eos_token_id": stops} if len(stops) > 1 else {})
            )
        summary = f"transformers loads it as {form.name}"
        summary += "".join(f", without its {name}, which peft adds" for name in sorted(PREFIX_HEADS & heads.keys()))

    def read_converted(name: str) -> Tensor:
        assert read is not None
        entry = converted.get(name)
        if entry is None:
            return read(name)
        return to_hf({ours: read(ours) for ours in entry.names}, [entry])[name]

    names += write_tensors(written, directory, storage, read_converted if read else None)
    if tokenizer is not None:
        pattern: Literal["seq2seq", "causal", "bidirectional"] = (
            "causal" if model.config.causal or model.config.attention.prefix_lm else "bidirectional"
        )
        tokenizer.with_post_processor("seq2seq" if model.config.encoder.num_layers else pattern).save(
            directory, token_type_ids=model.config.embedding.type_vocab_size > 0
        )
    # No hashes of files that users edit: chat_template.jinja, generation_config.json, tokenizer_config.json. The
    # tokenizer's digest covers what determines the ids.
    write_json(directory / "firth.json", sealed(record | {"facts": dict(facts or {})}, directory, names))
    return summary


def describe_model(model: LM, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """Return what firth.json says about a model whose weights have firth's names: its config, its heads, its tokenizer."""
    heads = {name: describe_head(head) for name, head in model.heads.items()}
    record: dict[str, Any] = {"config": asdict(model.config), "heads": heads, "family": None}
    return record | ({} if tokenizer is None else {"tokenizer": tokenizer.digest})


def _families(config: ModelConfig, tokenizer: Tokenizer | None) -> Iterator[Family]:
    """Yield the families that support a config and the tokenizer's padding id."""
    pad = None if tokenizer is None else tokenizer.vocab.roles.get("pad")
    return (
        family for family in families.families_of(config) if tokenizer is None or family.pad_token_id in (None, pad)
    )


def token_ids(tokenizer: Tokenizer | None, config: ModelConfig) -> dict[str, Any]:
    """Return the token ids for config.json. Nulls are explicit: a family's defaults may exceed a small vocabulary."""
    roles: Mapping[str, int] = {} if tokenizer is None else tokenizer.vocab.roles
    ids: dict[str, Any] = {f"{role}_token_id": roles.get(role) for role in ("pad", "bos", "eos", "cls", "sep")}
    if config.encoder.num_layers:
        ids["pad_token_id"] = roles.get("pad", 0)
        ids["decoder_start_token_id"] = roles.get(config.encoder.decoder_start_token, 0)
    return ids


def load_model(directory: Path, heads: Mapping[str, nn.Module] | None = None) -> LM:
    """Load a model that firth or transformers saved, in evaluation mode.

    Args:
        directory: Directory of the model, or a GGUF file.
        heads: Modules to load the heads into, for types that cannot be rebuilt from firth.json.

    Raises:
        UserError: If the directory contains no model or tensors that do not fit.
    """
    found = _read(directory)
    if heads is None:
        model = _empty(found, directory).to_empty(device="cpu")
        model.tie()
    else:
        model = LM(found.config, heads)
    _fill(model, found, directory)
    return model.eval()


def open_model(directory: Path) -> tuple[LM, Read | None]:
    """Load a model, or only its shape and a function that reads its weights one by one, if a checkpoint has it in shards.

    Args:
        directory: Directory of the model, a checkpoint, or a GGUF file.

    Returns:
        The model, on the meta device if its weights are read later, and None or that function.

    Raises:
        UserError: As for `load_model`.
    """
    found = _read(directory)
    if found.read is None:
        return load_model(directory), None
    model = _empty(found, directory).eval()
    return model, _canonical(model, found.read)


def load_without_weights(directory: Path) -> LM:
    """Return a model of a directory without its weights, on the meta device.

    Raises:
        UserError: As for `load_model`.
    """
    return _empty(_read(directory), directory).eval()


def _empty(found: LoadedState, directory: Path) -> LM:
    """Return the model of a file on the meta device, after comparing its sizes with those of the file."""
    with init_empty_weights(), _head_errors(found.heads, directory):
        model = LM(found.config, {name: rebuild_head(description, name) for name, description in found.heads.items()})
    _compare(model, found.state, directory)  # before allocating the sizes that an untrusted file states
    return model


def _canonical(model: LM, read: Read) -> Read:
    """Return `read` for all names of a model, of which shared weights have several."""
    first = model.shared_parameters()
    return lambda name: read(first.get(name, name))


def check_vocab_fits(tokenizer: Tokenizer, config: ModelConfig, where: str) -> None:
    """Raise a UserError if a tokenizer has more ids than a model has embeddings. Fewer are common: tables are padded."""
    if tokenizer.vocab.size > config.vocab_size:
        raise UserError(
            f"{where}: the tokenizer has {tokenizer.vocab.size:,} ids and the model {config.vocab_size:,} embeddings, so they do "
            "not belong together: use the tokenizer that the model was trained with"
        )


def init_from(model: LM, directory: Path) -> tuple[list[str], list[str]]:
    """Initialize a model from the weights of a directory; the transformer stack must match exactly.

    A prefix or a prompt in the directory is added to the model, since the stack was trained with it. Of a sharded model each
    rank reads its parts of the weights, one weight at a time; `add_prefix_heads` comes before it is sharded.

    Args:
        model: The model, changed in place.
        directory: Directory of a model.

    Returns:
        The names of the heads that were dropped and of those that were added; a head of another size is in both.

    Raises:
        UserError: If the transformer stacks differ.
    """
    found = _read(directory)
    with _head_errors(found.heads, directory):
        for name in PREFIX_HEADS & found.heads.keys() - model.heads.keys():
            model.heads[name] = rebuild_head(found.heads[name], name)
    return _copy_weights(model, found, directory)


def add_prefix_heads(model: LM, base: LM) -> None:
    """Add the prefix or the prompt of a base to a model, without its weights."""
    for name in PREFIX_HEADS & base.heads.keys():
        model.heads[name] = rebuild_head(describe_head(base.heads[name]), name)


def init_from_model(model: LM, base: LM, where: Path) -> tuple[list[str], list[str]]:
    """Initialize a model from a base that has been loaded from a directory; see `init_from`. `add_prefix_heads` comes before.

    Args:
        model: The model, changed in place.
        base: The base model, which is not changed.
        where: Directory of the base, for messages.
    """
    return _copy_weights(model, LoadedState(base.config, base.state_dict(), {}, []), where)


def _copy_weights(model: LM, base: LoadedState, where: Path) -> tuple[list[str], list[str]]:
    """Copy the weights that a model shares with a base; return the heads that are dropped and those that are added."""
    shared = model.shared_parameters()
    state = {name: tensor for name, tensor in base.state.items() if name not in shared}
    mine = {name: tensor for name, tensor in model.state_dict().items() if name not in shared}
    for name, tensor in mine.items():
        if not name.startswith("heads.") and (name not in state or state[name].shape != tensor.shape):
            raise UserError(
                f"cannot initialize from {where}: {_difference(model.config, base.config)}; use the same model config, as "
                "model=null does"
            )
    old, new = _by_head(state), _by_head(mine)
    kept = _matching_heads(mine, state)
    _compare(model, mine | {name: state[name] for head in kept for name in new[head]}, where)
    stack = (name for name in mine if not name.startswith("heads."))
    _assign(model, base, [*stack, *(name for head in kept for name in new[head])], where)
    return sorted(old.keys() - set(kept)), sorted(new.keys() - set(kept))


def added_heads(model: LM, base: LM) -> list[str]:
    """Return the heads of a model that `init_from` finds no weights for in a base."""
    mine = {name: tensor for name, tensor in model.state_dict().items() if name not in model.shared_parameters()}
    state = {name: tensor for name, tensor in base.state_dict().items() if name not in base.shared_parameters()}
    return sorted(_by_head(mine).keys() - {*_matching_heads(mine, state)})


def _matching_heads(mine: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return the heads that both states have with the same sizes."""
    old, new = _by_head(state), _by_head(mine)
    return [h for h in new if h in old and {n: state[n].shape for n in old[h]} == {n: mine[n].shape for n in new[h]}]


def _by_head(state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    heads: dict[str, list[str]] = {}
    for name in state:
        if name.startswith("heads."):
            heads.setdefault(name.split(".")[1], []).append(name)
    return heads


def _difference(mine: ModelConfig, theirs: ModelConfig) -> str:
    """Return a description of the first difference of two configs."""
    found = theirs.flat_fields()
    for name, expected in mine.flat_fields().items():
        if expected != found[name]:
            return f"its model.{name} is {found[name]!r}, not {expected!r}"
    return "its tensors do not fit its config"


def _compare(model: LM, state: Mapping[str, Tensor], where: Path) -> dict[str, Tensor]:
    """Return the tensors for all names of a model; raise a UserError if one is missing, unexpected, or does not fit."""
    state = dict(state) | {name: state[first] for name, first in model.shared_parameters().items() if first in state}
    mine = model.state_dict()
    for name in sorted(mine.keys() ^ state.keys()):
        raise UserError(f"{where} {'lacks' if name in mine else 'has an unexpected'} tensor {name!r}")
    for name, tensor in mine.items():
        if tensor.shape != state[name].shape:
            raise UserError(f"{where}: tensor {name!r} is {tuple(state[name].shape)}, expected {tuple(tensor.shape)}")
        if not tensor.is_floating_point() and state[name].dtype != tensor.dtype:
            raise UserError(f"{where}: tensor {name!r} is of {state[name].dtype}, expected {tensor.dtype}")
    check_numbers({name: state[name] for name, tensor in mine.items() if tensor.is_floating_point()}, where)
    return state


def _fill(model: LM, found: LoadedState, where: Path) -> None:
    """Copy the tensors of a file into a model."""
    state = _compare(model, found.state, where)
    _assign(model, replace(found, state=state, read=found.read and _canonical(model, found.read)), [*state], where)


def _assign(model: LM, found: LoadedState, names: Iterable[str], where: Path) -> None:
    """Copy some tensors into a model, one by one. Of a sharded weight this rank reads and checks its part."""
    mine = model.state_dict()
    for name in names:
        value = own_part(mine[name], found.state[name] if found.read is None else found.read(name))
        check_finite({name: value}, where)
        with torch.no_grad():
            local(mine[name]).copy_(value)


def left_out(directory: Path) -> list[str]:
    """Return the names of the tensors in a directory that `load_model` skips."""
    return _read(directory).left_out


def metadata_of(directory: Path) -> dict[str, Any]:
    """Return the metadata saved with a model; empty if there is none."""
    found = read_json(directory / "firth.json").get("facts")
    return found if isinstance(found, dict) else {}


def class_names(directory: Path) -> tuple[str, ...]:
    """Return the class names of a directory's head in the order of its rows; empty if they have no names."""
    names = metadata_of(directory).get("classes")
    return label_names(read_json(directory / "config.json")) if names is None else tuple(str(name) for name in names)


def _read(directory: Path) -> LoadedState:
    """Read the model in a directory, with firth's names."""
    config, ours = read_json(directory / "config.json"), read_json(directory / "firth.json")
    verify(ours, directory, directory / "firth.json", COPY_AGAIN)
    file = find(directory)
    if file is not None:
        config, ours = gguf.read_config(file), {}
    elif not config and (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} contains an adapter and no model: set init_from to its base, and peft.init_from={directory}"
        )
    elif is_checkpoint(directory) and not ours:
        raise UserError(
            f"{directory} does not describe its model: it has frozen weights or a head that is saved in another form, or an "
            "older version of firth wrote it; finish the run, and take the model of the run directory"
        )
    elif not config and not ours:
        raise UserError(f"{directory} contains no model: it has neither firth.json nor config.json")
    check_no_foreign_code(config, directory / "config.json")
    if is_checkpoint(directory):
        return _read_checkpoint(directory, ours)
    kind = ours.get("family") if ours else config.get("model_type")
    family = families.find(kind) if type(kind) is str else None
    if family is None and not (ours and kind is None):
        raise UserError(
            f"{directory}/config.json has model_type {kind!r:.40}; firth reads {', '.join(families.names())}"
        )
    state = read_tensors(directory) if file is None else gguf.read_tensors(file)
    check_numbers({name: tensor for name, tensor in state.items() if tensor.is_floating_point()}, directory)
    if family is not None and not ours:
        to_config = family.to_config
        model_config = check_config(lambda: to_config(config), state, file or directory / "config.json")
        return read_hf(family, model_config, state, config, f"{directory}")
    model_config = check_config(lambda: _config_of(ours), state, directory / "firth.json")
    if family is not None:
        with _head_errors(ours["heads"], directory):
            return read_own(family, model_config, state, ours["heads"], f"{directory}")
    if model_config.tie_embeddings and "lm" in ours["heads"] and "tokens.weight" in state:
        state["heads.lm.weight"] = state["tokens.weight"]
    return LoadedState(model_config, state, ours["heads"], [])


def _read_checkpoint(directory: Path, ours: Mapping[str, Any]) -> LoadedState:
    """Return the model in a checkpoint of a run, whose tensors are read one by one. Heads for training alone are left out."""
    stored = checkpoint_tensors(directory, ours)
    state = {name: x for name, x in stored.shapes.items()
             if not name.startswith("heads.") or name.split(".")[1] in ours["heads"]}  # fmt: skip
    check_numbers({name: x for name, x in state.items() if x.is_floating_point()}, directory)
    config = check_config(lambda: _config_of(ours), state, directory / "firth.json")
    return LoadedState(config, state, ours["heads"], [], stored.read)


def read_config(directory: Path) -> ModelConfig:
    """Return the model config of a directory or a GGUF file, without its weights.

    Raises:
        UserError: The directory contains no model that firth reads.
    """
    file, ours = find(directory), read_json(directory / "firth.json")
    if ours and file is None:
        return check_config(lambda: _config_of(ours), {}, directory / "firth.json", sized=False)
    config = read_json(directory / "config.json") if file is None else gguf.read_config(file)
    family = families.find(str(config.get("model_type")))
    if family is None:
        raise UserError(f"{directory} contains no model that firth reads")
    return check_config(lambda: family.to_config(config), {}, file or directory / "config.json", sized=False)


def _config_of(ours: Mapping[str, Any]) -> ModelConfig:
    """Return the model config in firth.json."""
    if type(ours["heads"]) is not dict:
        raise TypeError("its heads are not a JSON object")
    return ModelConfig.from_dict(ours["config"])


def check_config(
    make: Callable[[], ModelConfig], state: Mapping[str, Tensor], file: Path, sized: bool = True
) -> ModelConfig:
    """Return the config that a file describes, checked before a model of its size is allocated.

    Args:
        make: Function that makes the config.
        state: The tensors that come with it.
        file: The file, for messages.
        sized: Whether the tensors are there, and their number is compared with the model's.

    Raises:
        UserError: If the config is invalid or the tensors are too few for a model of its size.
    """
    try:
        config = make()
        table = 0 if config.embedding.characters.max_length else config.vocab_size * config.embedding_dim
        needed = num_parameters(replace(config, vocab_size=1)) + table
    except KeyError as missing:
        raise UserError(f"{file} lacks the field {missing}") from None
    except UserError as fault:
        raise UserError(f"{file}: {fault}") from None
    except (TypeError, ValueError, AttributeError, ArithmeticError) as fault:
        raise UserError(f"{file} describes no valid model: {fault}") from None
    stored = sum(tensor.numel() for tensor in state.values())
    if sized and needed > MAX_PARAMETERS_PER_STORED_NUMBER * stored:
        raise UserError(
            f"{file} describes a model of {max(config.num_layers, config.encoder.num_layers):,} layers and "
            f"{min(needed, MAX_REPORTED_PARAMETERS):,} parameters, but its weight files contain {stored:,} numbers: they do not "
            "belong together"
        )
    return config


MAX_REPORTED_PARAMETERS = 10**15
MAX_LAYERS, MAX_PARAMETERS_PER_STORED_NUMBER = 10_000, 3
"""Limits on a model from a file: its layers (ALBERT's need no storage), and its parameters without the LM head per stored
number (a file may lack what its class does not use). Messages report at most MAX_REPORTED_PARAMETERS."""


@contextmanager
def _head_errors(heads: Mapping[str, Any], directory: Path) -> Iterator[None]:
    """Raise a UserError for errors that come from invalid head descriptions in firth.json."""
    try:
        for config in _model_configs(heads):
            if max(config.get("num_layers", 0), config.get("encoder", {}).get("num_layers", 0)) > MAX_LAYERS:
                raise ValueError("a head has too many layers")
        yield
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, RecursionError) as fault:
        raise UserError(f"{directory}/firth.json describes heads that cannot be rebuilt ({str(fault)[:80]})") from None


def _model_configs(described: Any) -> Iterator[Mapping[str, Any]]:
    """Yield every model config in a description, at any depth."""
    pending = [described]
    while pending:
        value = pending.pop()
        if type(value) is dict:
            pending += value.values()
            if "vocab_size" in value:
                yield value
        elif type(value) is list:
            pending += value
