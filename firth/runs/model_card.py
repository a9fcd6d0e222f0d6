"""Model cards: the README.md of every exported model, with its training and its scores.

    of_run          of a run that ends
    read_card       of a finished run, from its recipe.yaml, done.json and samples.jsonl
    of_directory    of a model from elsewhere

The front matter holds the metadata of model hubs (license, language, tags, base_model). The license is that of the base
model, where one is known; the owner of a new model has to choose one. Paths are reduced to file names.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from firth.corpora.catalog import CATALOG
from firth.io.atomic import write_text
from firth.io.gguf import find, read
from firth.io.integrity import check_recipe, read_done
from firth.io.json_files import read_rows
from firth.io.safetensors import read_json
from firth.model.model import LM
from firth.runs import config_io
from firth.runs.recipe import load

PIPELINE_TAGS = {
    "causal": "text-generation",
    "bidirectional": "fill-mask",
    "seq2seq": "text2text-generation",
    "": "feature-extraction",
}
"""Architecture of a model with an LM head, or "" without one -> the task name on model hubs."""
MARK = "Made with firth"
MAX_FRONT_MATTER_CHARS = 4096
"""Characters of a README.md in which the license is searched."""


@dataclass(frozen=True)
class ModelCard:
    """The content of a model card.

    Args:
        directory: The model directory, with the files written so far.
        model: The model.
        summary: A sentence on the format: which classes load it.
        metadata: The training metadata (`firth.json`).
        name: The name of the model.
        recipe: The resolved recipe as plain data, with paths reduced to names; empty for a model from elsewhere.
        result: The result of the run (done.json).
        samples: Rows of samples.jsonl.
        base: Name of the base model; "" for none.
        license: License of the base model; "" if unknown.
        language: Language of the model; "" if unknown.
    """

    directory: Path
    model: LM
    summary: str
    metadata: Mapping[str, Any]
    name: str
    recipe: dict[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Mapping[str, Any]] = ()
    base: str = ""
    license: str = ""
    language: str = ""


def read_card(run: Path, place: Path, model: LM, summary: str, facts: Mapping[str, Any]) -> ModelCard:
    """Return the card of the model in the directory of a finished run, or of a model directory without a recipe.

    Raises:
        UserError: The recipe or the result of the run is damaged.
    """
    if not (run / "recipe.yaml").exists():
        return of_directory(run, place, model, summary, facts)
    check_recipe(run)
    return of_run(run, place, model, summary, facts, config_io.to_dict(load(str(run))), read_done(run))


def of_run(
    run: Path,
    place: Path,
    model: LM,
    summary: str,
    facts: Mapping[str, Any],
    given: Mapping[str, Any],
    done: Mapping[str, Any],
) -> ModelCard:
    """Return the card of a run's model.

    Args:
        run: The run directory.
        place: The directory to write to, with the files written so far.
        model: The model.
        summary: A sentence on the format.
        facts: The training metadata.
        given: The resolved recipe as plain data, with short forms written out.
        done: The result of the run.
    """
    recipe, start = strip_directories(given), given.get("init_from") or ""
    rows = run / "samples.jsonl"
    samples = read_rows(rows, {"prompt": str, "text": str}, "delete the file: it is for the report alone")
    license, language = _license_and_language(Path(start)) if start else ("", "")
    source = _at(recipe, "data") or {}
    corpus = "" if source.get("path") else str(source.get("corpus") or "").partition("/")[0]
    return ModelCard(
        place, model, summary, facts, run.resolve().name, recipe, done,
        samples, PurePath(start).name, license, language or ("en" if corpus in CATALOG else ""),
    )  # fmt: skip


def of_directory(given: Path, place: Path, model: LM, summary: str, facts: Mapping[str, Any]) -> ModelCard:
    """Return the card of a model from another directory, without a recipe."""
    license, language = _license_and_language(given)
    name = given.resolve().name
    return ModelCard(place, model, summary, facts, name, base=name, license=license, language=language)


def write(card: ModelCard, file: Path) -> None:
    """Write a card atomically."""
    write_text(file, text(card))


def pretty(value: Any) -> str:
    """Return indented JSON with a final newline."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def text(card: ModelCard) -> str:
    """Return the card in Markdown with YAML front matter."""
    config, model_config = read_json(card.directory / "config.json"), card.model.config
    task = PIPELINE_TAGS[
        (
            "seq2seq"
            if model_config.encoder.num_layers
            else "causal"
            if model_config.causal or model_config.attention.prefix_lm
            else "bidirectional"
        )
        if "lm" in card.model.heads
        else ""
    ]
    front: dict[str, Any] = {"license": card.license or "other"}
    if not card.license:
        front["license_name"] = "not-stated"
    front |= {"language": card.language} if card.language else {}
    front |= {"base_model": card.base} if card.base else {}
    front |= {"library_name": "transformers" if config else "firth", "pipeline_tag": task}
    front["tags"] = ["firth", *_objectives(card.recipe)]
    blocks = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {card.name}",
        _summary(card, config),
        *_training(card),
        *_scores(card),
        *_samples(card),
        _loading(card, config, task),
        _limits(card),
    ]
    return "\n\n".join(blocks) + "\n"


def _summary(card: ModelCard, config: Mapping[str, Any]) -> str:
    model_config = card.model.config
    layers = f"{model_config.num_layers}"
    if model_config.encoder.num_layers:
        layers = f"{model_config.encoder.num_layers} + {layers}"
    rows = [
        ("parameters", f"{sum(p.numel() for p in card.model.parameters()):,}"),
        ("layers", layers), ("hidden size", f"{model_config.hidden_size:,}"),
        ("context", f"{model_config.max_positions:,} tokens"), ("vocabulary", f"{model_config.vocab_size:,}"),
        ("heads", ", ".join(card.model.heads) or "none"), ("dtype", _dtype(card.directory, config)),
    ]  # fmt: skip
    base = f" It was trained from {card.base}." if card.base and card.recipe else ""
    return f"{MARK}; {card.summary}.{base}\n\n" + _table(("", ""), rows)


def _training(card: ModelCard) -> list[str]:
    if not card.recipe:
        origin = f"from `{card.base}`" if card.base else "from elsewhere"
        return [f"## Training\n\nThis model came {origin}; see its own card for its training data."]
    source = _at(card.recipe, "data") or {}
    corpus = str(source.get("corpus") or "")
    known = CATALOG.get(corpus.partition("/")[0])
    if source.get("path") or known is None:
        data = ", ".join(f"`{p}`" for p in source.get("path") or ()) or "not stated"
        data += "; the license of these files is not known to firth"
    else:
        data = f"{corpus}: {known.about}, from {known.package}; license: {known.license}"
        data += f" ({known.note})" if known.note else ""
    rows = [("objective", " + ".join(_objectives(card.recipe))), ("data", data)]
    done = card.result
    if done:
        took = f"{done['steps']:,} steps, {done['tokens']:,} tokens, {done['flops']:.3g} counted FLOPs, {done['seconds']:,.0f} s"
        took += f", {done['mfu']:.1%} of the machine's peak" if done.get("mfu") else ""
        rows.append(("length", took))
        if done.get("exported_step", done["steps"]) != done["steps"]:
            rows.append(("exported", f"the model of step {done['exported_step']:,}, the best evaluation"))
    command = "Save the recipe below as recipe.yaml; then `firth train recipe.yaml` repeats the training."
    listing = yaml.safe_dump(card.recipe, sort_keys=False, allow_unicode=True)
    return [f"## Training\n\n{_table(('', ''), rows)}\n\n{command}\n\n```yaml\n{listing}```"]


def _scores(card: ModelCard) -> list[str]:
    found = card.metadata.get("metrics")
    found = found if isinstance(found, dict) else {}
    held = {name.removeprefix("valid/"): value for name, value in found.items() if name.startswith("valid/")}
    rows = [(name.replace("_", " "), f"{value:.4g}") for name, value in held.items() if type(value) in (int, float)]
    if not rows:
        return []
    return [f"## Scores\n\nOn text that was held out from the same source.\n\n{_table(('metric', 'held out'), rows)}"]


def _samples(card: ModelCard) -> list[str]:
    last: dict[str, str] = {str(row["prompt"]): str(row["text"]) for row in card.samples}
    shown = [f"> **{_quoted(prompt)}** {_quoted(text[:400])}" for prompt, text in list(last.items())[:3]]
    return ["## Samples\n\nThe last ones of the run, not chosen.\n\n" + "\n\n".join(shown)] if shown else []


def _quoted(text: str) -> str:
    """Escape text for Markdown, keeping line breaks."""
    return re.sub(r"([\\`*_<>#|\[\]])", r"\\\1", text).replace("\n", "  \n> ")


def _dtype(place: Path, config: Mapping[str, Any]) -> str:
    """Return the dtype of most weights."""
    file = find(place)
    if file is None:
        return str(config.get("dtype", "float32"))
    sizes: Counter[str] = Counter()
    for stored in read(file).tensors.values():
        sizes[stored.kind] += math.prod(stored.shape)
    return sizes.most_common(1)[0][0]


def _loading(card: ModelCard, config: Mapping[str, Any], task: str) -> str:
    verb = {"text-generation": 'generate DIR "..."', "fill-mask": 'fill DIR "a word is <mask> here"',
            "text2text-generation": 'generate DIR "..."'}.get(task, "evaluate DIR FILES")  # fmt: skip
    blocks = [f"```\nfirth {verb}\n```"]
    kinds = config.get("architectures")
    if isinstance(kinds, list) and kinds:
        blocks.append(
            f"```python\nfrom transformers import AutoTokenizer, {kinds[0]}\n\n"
            f'model, tokenizer = {kinds[0]}.from_pretrained("DIR"), AutoTokenizer.from_pretrained("DIR")\n```'
        )
    if find(card.directory) is not None:
        blocks.append("```\nllama-cli -m DIR/model.gguf\n```")
    if (card.directory / "modules.json").exists():
        blocks.append(
            '```python\nfrom sentence_transformers import SentenceTransformer\n\nSentenceTransformer("DIR").encode(["a text"])\n```'
        )
    return "## Use\n\nDIR is this directory.\n\n" + "\n\n".join(blocks)


def _limits(card: ModelCard) -> str:
    read = card.result.get("tokens")
    how = f"{read:,} tokens" if read else "its training text"
    return (
        f"## Limits\n\nThe model was trained on {how} and knows nothing else. It repeats their errors and prejudices, and it "
        "states false things as confidently as true ones. The scores hold for the text and the records named above and say "
        "little about others. The model has not been tested for any use in which a wrong answer does harm."
    )


def _table(head: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {head[0]} | {head[1]} |", "|---|---|"]
    return "\n".join(lines + [f"| {a} | {b.replace('|', chr(92) + '|')} |" for a, b in rows])


def _at(data: Any, *keys: str) -> Any:
    for key in keys:
        data = data.get(key) if isinstance(data, Mapping) else None
    return data


def _objectives(recipe: Mapping[str, Any]) -> list[str]:
    given = recipe.get("objective") or []
    listed = given if isinstance(given, list) else [given]
    return [str(one["kind"] if isinstance(one, Mapping) else one) for one in listed]


def strip_directories(data: Any) -> Any:
    """Return plain data with absolute paths reduced to their file names.

    >>> strip_directories({"path": ["mine/a.txt", "/" + "data/b.txt"], "lr": 0.1})
    {'path': ['mine/a.txt', 'b.txt'], 'lr': 0.1}
    """
    if isinstance(data, Mapping):
        return {key: strip_directories(value) for key, value in data.items()}
    if isinstance(data, list):
        return [strip_directories(value) for value in data]
    return PurePath(data).name if isinstance(data, str) and PurePath(data).is_absolute() else data


def _license_and_language(directory: Path) -> tuple[str, str]:
    """Return the license and the language in the model card of a directory; "" where not stated."""
    for file in (directory / "README.md", directory / "model" / "README.md"):
        if file.is_file():
            with file.open(encoding="utf-8", errors="replace") as opened:
                front = opened.read(MAX_FRONT_MATTER_CHARS).split("\n---")[0]
            found = [re.search(rf"^{key}:\s*([\w.-]+)\s*$", front, re.M) for key in ("license", "language")]
            license, language = ("" if match is None else match[1] for match in found)
            return "" if license == "other" else license, language
    return "", ""
