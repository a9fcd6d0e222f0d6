"""Models in and out: a directory of strangers becomes one of firth's, a run becomes a directory for others.

    firth import DIR OUT                                       what generate, chat, fill, evaluate and start= take
    firth export RUN DIR --dtype bf16 --shard-size 2GB         what transformers, vLLM and sentence-transformers take
    firth export RUN DIR --format gguf --dtype q4_0            what llama.cpp takes: DIR/model.gguf

Both read all of a model, check it against its tokenizer and write into a neighbour of the target that is renamed at the
end: a directory is there whole or not at all. Neither writes into a directory that another has filled.
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
from firth.io.safetensors import DTYPES, Storage, dtypes, parse_size, read_json, read_list, write_json
from firth.model.model import LM
from firth.pretrained import gguf
from firth.pretrained.families import family_of
from firth.pretrained.load_save import check_vocab_fits, left_out, load_model, metadata_of, save_model
from firth.runs import model_card
from firth.runs.examples import model_directory
from firth.runs.inference import objective_of
from firth.runs.prepare import Echo
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

MADE = "firth.json"
"""What lies in every model directory that is written here."""


@dataclass(frozen=True, eq=False)
class ModelPackage:
    """A model on its way out. facts: what firth.json keeps of its training. talks: whether it was trained on dialogues.

    given: the directory it comes from. name: what the user called it. dtype: as the user wrote it, "" for nothing.
    """

    model: LM
    tokenizer: Tokenizer
    metadata: dict[str, Any]
    is_chat_model: bool
    given: Path
    name: str
    dtype: str


def import_model(given: Path, out: Path, echo: Echo = print) -> None:
    """Read a model that others wrote, say what it is, and write a directory that all of firth's commands take.

    given: a directory or a GGUF file. The numbers keep their type, and those of few bits become fp32. UserError for
    whatever cannot be read whole, and for an `out` that is not firth's.
    """
    given = model_directory(given)
    if not given.exists():
        raise UserError(f"{given} is not there: give a directory with config.json, model.safetensors and a tokenizer")
    model, tokenizer = load_model(given), load_tokenizer(given)
    check_vocab_fits(tokenizer, model.config, f"{given}")
    file = find(given)
    types = dtypes(given) if file is None else gguf.dtypes(file)
    facts = metadata_of(given)
    with _fresh(out, given) as place:
        said = save_model(model, tokenizer, place, facts, Storage(types[0] if len(types) == 1 else None))
        carried = given.is_dir() and copy_files(given, place)
        for line in described(given, model, tokenizer, types):
            echo(line)
        if carried:
            echo("  sentence vectors: as its modules.json says")
        told = model_card.of_directory(given, place, model, said, facts)
        licence = "" if file is None else str(read(file).metadata.get("general.license", ""))
        model_card.write(replace(told, licence=told.licence or licence), place / "README.md")
    for line in _uses(out, model, _template(tokenizer).startswith("yes;")):
        echo(line)


def export_model(run: Path, out: Path, *, form: str, dtype: str, shard: str, echo: Echo = print) -> None:
    """Write the model of a run into a directory for others, with its card.

    form: one of FORMS. dtype: fp32, fp16 or bf16; "" as it is. For gguf q8_0 and q4_0 too, and "" is fp16. shard: most bytes in
    one file, such as "2GB"; "" for one.
    """
    if form not in FORMS:
        raise UserError(f"there is no format {form!r}; there is {', '.join(FORMS)}")
    known = KINDS if form == "gguf" else DTYPES
    if dtype and dtype not in known:
        raise UserError(f"there is no dtype {dtype!r}; there is {', '.join(known)}")
    if out.suffix == ".gguf":
        raise UserError(f"an export is a directory that holds {FILE} and its card: name it {out.with_suffix('')}")
    size, given = parse_size(shard), model_directory(run)
    model, tokenizer = load_model(given), load_tokenizer(given)
    check_vocab_fits(tokenizer, model.config, f"{given}")
    types = dtypes(given) if find(given) is None else [torch.float32]
    storage = Storage(DTYPES.get(dtype) if dtype else types[0] if len(types) == 1 else None, size)
    facts = metadata_of(given)
    parcel = ModelPackage(
        model, tokenizer, facts, bool(TALKING & {*objective_of(run)}), given, run.resolve().name, dtype
    )
    with _fresh(out, given) as place:
        said = FORMS[form](parcel, place, storage)
        model_card.write(model_card.of_run(run, place, model, said, facts), place / "README.md")
        files = [p for p in place.rglob("*") if p.is_file()]
        echo(f"{out}: {len(files)} files, {sum(p.stat().st_size for p in files) / 1e6:,.1f} MB; {said}")
    # firth writes a template beside every tokenizer that has the tokens of turns: of a run, the objective tells.
    for line in _uses(
        out, model, parcel.is_chat_model if objective_of(run) else _template(tokenizer).startswith("yes;")
    ):
        echo(line)
    if form == "gguf":
        echo(f"With llama.cpp:  llama-cli -m {shlex.quote(str(out / FILE))}")


FILE = "model.gguf"
"""What a GGUF export calls its one file."""
TALKING = {"sft", "dpo", "reinforce", "ppo"}
"""Objectives of dialogues."""


def _hf(parcel: ModelPackage, place: Path, storage: Storage) -> str:
    """A directory for transformers, and for sentence-transformers where the model is an encoder."""
    said = save_model(parcel.model, parcel.tokenizer, place, parcel.metadata, storage)
    config = parcel.model.config
    if not (place / "config.json").exists() or config.causal or config.num_encoder_layers:
        return said
    if not copy_files(parcel.given, place):
        sentences(parcel.model, place)
    return f"{said}, sentence-transformers as it is"


def _gguf(parcel: ModelPackage, place: Path, storage: Storage) -> str:
    """One file for llama.cpp, with the tokenizer inside."""
    if storage.shard:
        raise UserError("a GGUF file is one file here: leave out --shard-size")
    kind, told = KINDS[parcel.dtype or "fp16"], {"general.name": parcel.name}
    said = gguf.write(parcel.model, parcel.tokenizer, place / FILE, kind, dialogue=parcel.is_chat_model, facts=told)
    write_json(place / MADE, sealed({"facts": parcel.metadata}, place, [FILE]))
    return said


KINDS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
"""--dtype -> how a GGUF file calls it."""
FORMS: dict[str, Callable[[ModelPackage, Path, Storage], str]] = {"hf": _hf, "gguf": _gguf}
"""Name of a format -> what writes it into a directory and says what others load it as."""

SENTENCE = "sentence_bert_config.json"
POOLED = ("bert", "roberta", "albert", "mpnet")
"""Families whose bare class makes a pooler at random where the files have none, unless it is told not to."""
PLAIN = ("Transformer", "Pooling", "Normalize")
"""Modules of sentence-transformers that have no weights of their own besides the model's."""


def copy_files(given: Path, place: Path) -> bool:
    """Take over how a directory makes sentence vectors, if it says so and needs no further weights for it."""
    if not (given / "modules.json").is_file():
        return False
    listed = read_list(given / "modules.json")
    paths = [str(module.get("path", "")) for module in listed]
    if not all(str(module.get("type", "")).endswith(PLAIN) for module in listed):
        return False
    if any(Path(path).name != path for path in paths):
        raise UserError(f"{given / 'modules.json'} names a place outside of its directory")
    for file in (SENTENCE, *(f"{path}/config.json" for path in paths if path)):
        if (given / file).is_file():
            (place / file).parent.mkdir(exist_ok=True)
            write_json(place / file, read_json(given / file) | (_unpooled(place) if file == SENTENCE else {}))
    write_text(place / "modules.json", model_card.pretty(listed))
    return True


def _unpooled(place: Path) -> dict[str, Any]:
    """What sentence-transformers tells the class of a model without a pooler."""
    return (
        {"model_args": {"add_pooling_layer": False}}
        if read_json(place / "config.json").get("model_type") in POOLED
        else {}
    )


def sentences(model: LM, place: Path) -> None:
    """The three files by which sentence-transformers takes the mean of an encoder's last states for a text's vector."""
    modules = [("0", "", "Transformer"), ("1", "1_Pooling", "Pooling")]
    listed = [
        {"idx": i, "name": name, "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (name, path, kind) in enumerate(modules)
    ]
    (place / "1_Pooling").mkdir(exist_ok=True)
    limits = {"max_seq_length": model.config.max_positions, "do_lower_case": False}
    write_json(place / SENTENCE, limits | _unpooled(place))
    pooling = {f"pooling_mode_{way}": way == "mean_tokens" for way in ("cls_token", "mean_tokens", "max_tokens")}
    write_json(place / "1_Pooling" / "config.json", {"word_embedding_dimension": model.config.hidden_size} | pooling)
    write_text(place / "modules.json", model_card.pretty(listed))


def described(given: Path, model: LM, tokenizer: Tokenizer, types: list[torch.dtype]) -> list[str]:
    """What a directory holds, a line each."""
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
    """Whether a dialogue can be written, and how an answer ends."""
    if tokenizer.template is None:
        return "no"
    try:
        chat.encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    except UserError as fault:
        return f"yes, but it cannot be used: {fault}"
    return f"yes; an answer ends with {' or '.join(tokenizer.token(i) for i in chat.stops(tokenizer))}"


def _uses(out: Path, model: LM, talks: bool) -> list[str]:
    """What to type next. talks: whether it has learnt to answer."""
    place, config = shlex.quote(str(out)), model.config
    if "lm" not in model.heads:
        return [f"Finetune it:  firth train classification init_from={place} data.path=labelled.jsonl"]
    if not (config.causal or config.prefix_lm or config.num_encoder_layers):
        return [f'Fill a gap:  firth fill {place} "a word is <mask> here"']
    return (
        [f"Talk with it:  firth chat {place}"]
        if talks and not config.num_encoder_layers
        else [f'Let it write:  firth generate {place} "..."']
    )


@contextmanager
def _fresh(out: Path, given: Path) -> Iterator[Path]:
    """A new directory beside `out` that takes its place when all went well; else nothing is changed."""
    with refusals(out):
        whole = out.resolve()
        if whole == given.resolve() or whole in given.resolve().parents:
            raise UserError(f"{out} holds what is to be read: choose another directory")
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not _ours(out))):
            raise UserError(f"{out} is there already and holds other things: choose another directory, or remove it")
    with new_directory(whole) as partial:
        yield partial


def _ours(out: Path) -> bool:
    """Whether all that a directory holds was written here: an import or an export, and no run."""
    readme = out / "README.md"
    made = (out / MADE).is_file() or (
        readme.is_file() and model_card.MARK in readme.read_text("utf-8", errors="replace")
    )
    return made and not (out / "recipe.yaml").exists() and not (out / "model").exists()
