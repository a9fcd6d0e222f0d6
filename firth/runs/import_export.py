"""Import and export models: transformers directories and GGUF files.

    firth import DIR OUT                                       for generate, chat, fill, evaluate and init_from
    firth export RUN DIR --dtype bf16 --shard-size 2GB         for transformers, vLLM and sentence-transformers
    firth export RUN DIR --format gguf --dtype q4_0            for llama.cpp: DIR/model.gguf
    firth export RUN/checkpoints/step-000400 DIR               the model at that step

Both check the model against its tokenizer and write to a temporary directory that is renamed at the end, so an
incomplete directory never appears. Neither overwrites a directory that firth did not write. They load the whole model, except for
an export of a checkpoint for transformers: that reads and writes the weights one by one.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from firth.evaluate.tokenizer_match import load_tokenizer
from firth.io.atomic import new_directory, refusals, write_text
from firth.io.gguf import find, read
from firth.io.integrity import sealed
from firth.io.safetensors import DTYPES, Read, Storage, dtypes, parse_size, read_json, read_list, write_json
from firth.io.sharded import is_checkpoint, run_of
from firth.model.model import LM
from firth.objectives.objective import reads_dialogues
from firth.pretrained import gguf
from firth.pretrained.families import family_of
from firth.pretrained.load_save import check_vocab_fits, left_out, load_model, metadata_of, open_model, save_model
from firth.runs import model_card
from firth.runs.loaded_model import objective_in
from firth.runs.start_model import model_directory
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import LOGGER, LogLine, UserError

METADATA_FILE = "firth.json"
"""File in every model directory that firth writes."""


@dataclass(frozen=True, eq=False)
class ModelPackage:
    """A model to export.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        metadata: The training metadata in firth.json.
        is_chat_model: Whether it was trained on dialogues.
        given: The model directory that it comes from.
        name: The name of the run directory.
        dtype: The dtype option of the user; "" if not given.
        read: Returns each weight of a model that is on the meta device; None if the model has them.
    """

    model: LM
    tokenizer: Tokenizer
    metadata: dict[str, Any]
    is_chat_model: bool
    given: Path
    name: str
    dtype: str
    read: Read | None = None


def import_model(given: Path, out: Path, log: LogLine = LOGGER.info) -> None:
    """Import a model of another library into a directory that all firth commands accept, and describe it.

    Weights keep their dtype; quantized weights become fp32.

    Args:
        given: A model directory or a GGUF file.
        out: The directory to write.
        log: Receives the description.

    Raises:
        UserError: The model cannot be read completely, or `out` holds files that firth did not write.
    """
    given = model_directory(given)
    if not given.exists():
        raise UserError(f"{given} does not exist: give a directory with config.json, model.safetensors and a tokenizer")
    if is_checkpoint(given):
        raise UserError(f"{given} is a checkpoint of a run: write its model with `firth export {given} {out}`")
    model, tokenizer = load_model(given), load_tokenizer(given)
    check_vocab_fits(tokenizer, model.config, f"{given}")
    file = find(given)
    types = dtypes(given) if file is None else gguf.dtypes(file)
    facts = metadata_of(given)
    with _fresh(out, given) as place:
        summary = save_model(model, tokenizer, place, facts, Storage(types[0] if len(types) == 1 else None))
        copied = given.is_dir() and copy_files(given, place)
        for line in describe(given, model, tokenizer, types):
            log(line)
        if copied:
            log("  sentence vectors: as its modules.json says")
        card = model_card.of_directory(given, place, model, summary, facts)
        license = "" if file is None else str(read(file).metadata.get("general.license", ""))
        model_card.write(replace(card, license=card.license or license), place / "README.md")
    for line in _uses(out, model, _template(tokenizer).startswith("yes;")):
        log(line)


def export_model(run: Path, out: Path, *, form: str, dtype: str, shard: str, log: LogLine = LOGGER.info) -> None:
    """Export the model of a run for other libraries, with a model card.

    Args:
        run: The run directory, or a checkpoint in it.
        out: The directory to write.
        form: One of EXPORTERS ("hf", "gguf").
        dtype: fp32, fp16, bf16, or "" for the stored dtype. GGUF also takes q8_0 and q4_0, and "" is fp16.
        shard: The most bytes of a file, such as "2GB"; "" for a single file.
        log: Receives the summary.

    Raises:
        UserError: An option is unknown, or `out` holds files that firth did not write.
    """
    if form not in EXPORTERS:
        raise UserError(f"there is no format {form!r}; there is {', '.join(EXPORTERS)}")
    known = GGUF_DTYPES if form == "gguf" else DTYPES
    if dtype and dtype not in known:
        raise UserError(f"there is no dtype {dtype!r}; there is {', '.join(known)}")
    if out.suffix == ".gguf":
        raise UserError(f"an export is a directory that holds {FILE} and its card: name it {out.with_suffix('')}")
    size, given = parse_size(shard), model_directory(run)
    model, read = open_model(given) if form == "hf" else (load_model(given), None)
    tokenizer = load_tokenizer(given)
    check_vocab_fits(tokenizer, model.config, f"{given}")
    types = [torch.float32] if find(given) is not None or is_checkpoint(given) else dtypes(given)
    storage = Storage(DTYPES.get(dtype) if dtype else types[0] if len(types) == 1 else None, size)
    facts = metadata_of(given)
    trained = run_of(run)
    objective = objective_in(trained)
    on_dialogues = objective is not None and reads_dialogues(objective)
    package = ModelPackage(model, tokenizer, facts, on_dialogues, given, trained.resolve().name, dtype, read)
    with _fresh(out, given) as place:
        summary = EXPORTERS[form](package, place, storage)
        card = model_card.read_card(trained, place, model, summary, facts)
        if is_checkpoint(given):  # the result and the samples are those of the end of the run
            card = replace(card, result={}, samples=[])
        model_card.write(card, place / "README.md")
        files = [p for p in place.rglob("*") if p.is_file()]
        log(f"{out}: {len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:,.1f} MB; {summary}")
    # Every tokenizer with chat tokens has a chat template, so for a run the objective decides.
    talks = _template(tokenizer).startswith("yes;") if objective is None else on_dialogues
    for line in _uses(out, model, talks):
        log(line)
    if form == "gguf":
        log(f"With llama.cpp:  llama-cli -m {shlex.quote(str(out / FILE))}")


FILE = "model.gguf"
"""File name of a GGUF export."""


def _hf(package: ModelPackage, place: Path, storage: Storage) -> str:
    """Write a directory for transformers, and for sentence-transformers if the model is an encoder."""
    summary = save_model(package.model, package.tokenizer, place, package.metadata, storage, package.read)
    config = package.model.config
    if not (place / "config.json").exists() or config.causal or config.encoder.num_layers:
        return summary
    if not copy_files(package.given, place):
        write_sentence_config(package.model, place)
    return f"{summary}, sentence-transformers as it is"


def _gguf(package: ModelPackage, place: Path, storage: Storage) -> str:
    """Write one file for llama.cpp, which includes the tokenizer."""
    if storage.shard:
        raise UserError("a GGUF file is one file here: leave out --shard-size")
    kind, facts = GGUF_DTYPES[package.dtype or "fp16"], {"general.name": package.name}
    summary = gguf.write(
        package.model, package.tokenizer, place / FILE, kind, dialogue=package.is_chat_model, facts=facts
    )
    write_json(place / METADATA_FILE, sealed({"facts": package.metadata}, place, [FILE]))
    return summary


GGUF_DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""--dtype -> its name in a GGUF file."""
EXPORTERS: dict[str, Callable[[ModelPackage, Path, Storage], str]] = {"hf": _hf, "gguf": _gguf}
"""Name of a format -> the function that writes it into a directory and returns a summary for the user."""

SENTENCE_CONFIG = "sentence_bert_config.json"
FAMILIES_WITH_POOLER = ("bert", "roberta", "albert", "mpnet")
"""Families whose base class adds a randomly initialized pooler if the files have none and it is not disabled."""
WEIGHTLESS_MODULES = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers without weights besides the model's."""


def copy_files(given: Path, place: Path) -> bool:
    """Copy the sentence-transformers configuration of a directory; return False if there is none or it needs more weights."""
    if not (given / "modules.json").is_file():
        return False
    listed = read_list(given / "modules.json")
    paths = [str(module.get("path", "")) for module in listed]
    if not all(str(module.get("type", "")).endswith(WEIGHTLESS_MODULES) for module in listed):
        return False
    if any(Path(path).name != path for path in paths):
        raise UserError(f"{given / 'modules.json'} names a path outside of its directory")
    for file in (SENTENCE_CONFIG, *(f"{path}/config.json" for path in paths if path)):
        if (given / file).is_file():
            (place / file).parent.mkdir(exist_ok=True)
            write_json(place / file, read_json(given / file) | (_no_pooler(place) if file == SENTENCE_CONFIG else {}))
    write_text(place / "modules.json", model_card.pretty(listed))
    return True


def _no_pooler(place: Path) -> dict[str, Any]:
    """Return the sentence-transformers option that disables the pooler."""
    return (
        {"model_args": {"add_pooling_layer": False}}
        if read_json(place / "config.json").get("model_type") in FAMILIES_WITH_POOLER
        else {}
    )


def write_sentence_config(model: LM, place: Path) -> None:
    """Write the three files with which sentence-transformers mean-pools an encoder's last hidden states."""
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    listed = [
        {"idx": i, "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (name, path, kind) in enumerate(modules)
    ]
    (place / "1_Pooling").mkdir(exist_ok=True)
    limits = {"max_seq_length": model.config.max_positions, "do_lower_case": False}
    write_json(place / SENTENCE_CONFIG, limits | _no_pooler(place))
    pooling = {f"pooling_mode_{mode}": mode == "mean_tokens" for mode in ("cls_token", "mean_tokens", "max_tokens")}
    write_json(place / "1_Pooling" / "config.json", {"word_embedding_dimension": model.config.hidden_size} | pooling)
    write_text(place / "modules.json", model_card.pretty(listed))


def describe(given: Path, model: LM, tokenizer: Tokenizer, types: list[torch.dtype]) -> list[str]:
    """Return lines that describe a model directory or GGUF file."""
    file = find(given)
    config, model_config = read_json(given / "config.json") if file is None else gguf.read_config(file), model.config
    kinds = config.get("architectures")
    named = f" ({', '.join(map(str, kinds))})" if isinstance(kinds, list) else ""
    family = family_of(model_config)
    kind = config.get("model_type") or (family.name if family else "no family")
    count = sum(p.numel() for p in model.parameters())
    ids, rows = tokenizer.vocab.size, model_config.vocab_size
    spare = left_out(given) if file is None else []
    unused = [
        p.name for p in sorted(given.glob("*")) if p.is_file() and p.suffix in (".py", ".bin", ".pt", ".h5", ".onnx")
    ]
    padding = f" for {rows:,} vectors: {rows - ids:,} of those are padding" if ids < rows else ""
    return [
        f"{given}: {kind}{named}, {model_config.description}",
        f"  {count:,} parameters in {', '.join(str(t).removeprefix('torch.') for t in types)}; context {model_config.max_positions:,}",
        f"  heads: {', '.join(model.heads) or 'none'}",
        f"  tokenizer: {ids:,} ids{padding}; {', '.join(f'{r} {tokenizer.token(i)}' for r, i in tokenizer.vocab.roles.items())}",
        f"  chat template: {_template(tokenizer)}",
        *(
            [f"  left out of the tensors: {', '.join(spare[:6])}{f' and {len(spare) - 6} more' * (len(spare) > 6)}"]
            if spare
            else []
        ),
        *([f"  left out of the files: {', '.join(unused)}"] if unused else []),
    ]


def _template(tokenizer: Tokenizer) -> str:
    """Return "yes; ..." with the stop tokens, "yes, but ..." with an error, or "no"."""
    if tokenizer.template is None:
        return "no"
    try:
        chat.encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except UserError as fault:
        return f"yes, but it cannot be used: {fault}"
    return f"yes; an answer ends with {' or '.join(tokenizer.token(i) for i in chat.stops(tokenizer))}"


def _uses(out: Path, model: LM, talks: bool) -> list[str]:
    """Return suggested next commands. talks: Whether it is a chat model."""
    place, config = shlex.quote(str(out)), model.config
    if "lm" not in model.heads:
        return [f"Fine-tune it:  firth train classification init_from={place} data.path=labeled.jsonl"]
    if not (config.causal or config.attention.prefix_lm or config.encoder.num_layers):
        return [f'Fill a gap:  firth fill {place} "a word is <mask> here"']
    return (
        [f"Talk with it:  firth chat {place}"]
        if talks and not config.encoder.num_layers
        else [f'Let it write:  firth generate {place} "..."']
    )


@contextmanager
def _fresh(out: Path, given: Path) -> Iterator[Path]:
    """Yield a temporary directory that replaces `out` on success; on an error nothing changes."""
    with refusals(out):
        whole = out.resolve()
        if whole == given.resolve() or whole in given.resolve().parents:
            raise UserError(f"{out} holds the model to read: choose another directory")
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _written_by_firth(out))):
            raise UserError(f"{out} already exists and holds other files: choose another directory, or remove it")
    with new_directory(whole) as partial:
        yield partial


def _written_by_firth(out: Path) -> bool:
    """Return whether a directory is a firth import or export, and neither a run nor a checkpoint of one."""
    readme = out / "README.md"
    written = (out / METADATA_FILE).is_file() or (
        readme.is_file() and model_card.MARK in readme.read_text("utf-8", errors="replace")
    )
    run = is_checkpoint(out) or (out / "recipe.yaml").exists() or (out / "model").exists()
    return written and not run
