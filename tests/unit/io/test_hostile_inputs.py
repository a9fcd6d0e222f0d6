"""Malicious files and settings other than models: pipes, YAML, prompt templates, regular expressions of tokenizers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from firth.corpora import readers
from firth.data.dialogues import fill_template
from firth.io.yaml_files import read_yaml
from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.pretrained.load_save import load_model, save_model
from firth.runs import recipe
from firth.tokenizer.limits import fault
from firth.tokenizer.tokenizer import Tokenizer
from tests.support.errors import refused
from tests.support.tiny_corpus import tokenizer


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """A model directory."""
    config = ModelConfig(vocab_size=tokenizer().vocab.size, hidden_size=16, num_layers=1, num_heads=2, max_positions=32)
    save_model(LM(config, {"lm": LMHead(config)}), tokenizer(), tmp_path / "given")
    return tmp_path / "given"


def test_a_pipe_for_a_file_is_refused_at_once(given: Path, tmp_path: Path) -> None:
    """Opening a named pipe blocks until another process writes to it."""
    for name in ("config.json", "model.safetensors", "firth.json"):
        kept = (given / name).read_bytes() if (given / name).exists() else None
        (given / name).unlink(missing_ok=True)
        os.mkfifo(given / name)
        refused(lambda: load_model(given), "is a pipe or a device, not a file|no safetensors")
        (given / name).unlink()
        if kept is not None:
            (given / name).write_bytes(kept)
    for name, load in (("r.yaml", lambda p: recipe.load(str(p))), ("t.json", Tokenizer.load), ("m.gguf", load_model)):
        os.mkfifo(tmp_path / name)
        refused(lambda load=load, name=name: load(tmp_path / name), "pipe|no tokenizer here|no such file")
    os.mkfifo(tmp_path / "text.txt")
    refused(lambda: list(readers.documents([str(tmp_path / "text.txt")])), "neither a file nor a directory")
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "tokenizer.json")
    refused(lambda: Tokenizer.load(folder), "no tokenizer here")


YAMLS = {
    "aliases of aliases": ("a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [" + f"*a{i - 1}," * 9 + "]\n" for i in range(1, 9)), "aliases expand"),
    "an alias of itself": ("name: &a [*a]\n", "aliases expand to"),
    "deep lists": ("name: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    "deep, but closed": ("name: " + "[" * 80 + "]" * 80, "nested too deeply"),
    "a date that is none": ("name: 2001-99-99", "not YAML"),
    "a number of a million digits": ("name: " + "9" * 100_000, "not YAML"),
    "megabytes": ("name: x\n" * 200_000, "more than any such file needs"),
    "no text": ("\x00", "not YAML"),
    "an object of Python's": ("name: !!python/object/apply:os.system [touch ran]", "not YAML"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", YAMLS)
def test_malicious_recipes_are_rejected(name: str, tmp_path: Path) -> None:
    text, says = YAMLS[name]
    (tmp_path / "r.yaml").write_text(text)
    refused(lambda: recipe.load(str(tmp_path / "r.yaml")), says)


def test_a_small_anchor_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("a: &a [1, 2]\nb: [*a, *a]\n")
    assert read_yaml(tmp_path / "r.yaml")[0] == {"a": [1, 2], "b": [[1, 2], [1, 2]]}


@pytest.mark.parametrize("form", ["{x:>999999999}", "{x.__class__}", "{x[0]}", "{x!r}", "{}", "{0}", "{y}", "{x", "x}"])
def test_a_template_contains_only_field_names(form: str) -> None:
    refused(lambda: fill_template(form, {"x": "word"}), "is not a field name; the fields are x|has an unpaired brace")
    assert fill_template("{x}: {{x}}", {"x": "word"}) == "word: {x}"


PUBLISHED = {
    "GPT-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "GPT-4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s+",
    "thousands": r"\d{1,3}(?=(?:\d{3})*\b)",
    "BLOOM": r" ?[^(\s|[.,!?…。，、।۔،])]+",
    "DeepSeek": r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s+",
    "SentencePiece": r" {2,}|\A +| +\z",
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_expressions_are_within_the_limits(name: str) -> None:
    assert fault(PUBLISHED[name]) == ""
