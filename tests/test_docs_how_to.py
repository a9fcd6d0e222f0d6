"""Extensions from outside the package, built from the pages in docs/how-to that show them."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from firth.cli import app
from firth.io.safetensors import read_json
from firth.pretrained import families
from firth.pretrained.load_save import load_model
from firth.types import UserError

HOW_TO = Path(__file__).parents[1] / "docs" / "how-to"


def blocks(page: str, language: str) -> list[str]:
    """Return the fenced blocks of a page in a language; "" for commands and output."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", (HOW_TO / page).read_text("utf-8"), re.M | re.S)
    return [text for name, text in found if name == language]


@pytest.fixture
def directory(tmp_path, monkeypatch):
    """Return an empty working directory whose modules can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def firth(*words: str) -> str:
    """Run a command and return what it prints."""
    done = CliRunner().invoke(app, list(words))
    assert done.exit_code == 0, done.output + str(done.exception or "")
    return done.output


@pytest.fixture
def opt(directory, monkeypatch):
    """Return a working directory with the family of the page, which is registered."""
    monkeypatch.delitem(sys.modules, "opt", raising=False)
    (directory / "opt.py").write_text(blocks("add-a-family.md", "python")[0], "utf-8")
    monkeypatch.setenv("FIRTH_FAMILIES", "opt:FAMILY")
    families._user_families.cache_clear()
    yield directory
    families._user_families.cache_clear()


def test_the_family_agrees_with_transformers(opt, capsys):
    pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
    exec(compile(blocks("add-a-family.md", "python")[1], "check.py", "exec"), {"__name__": "check"})
    printed = capsys.readouterr().out
    assert "transformers loads it as OPTForCausalLM" in printed
    before, after = (float(number) for number in re.findall(r": ([\d.e-]+)$", printed, re.M))
    assert before < 1e-5
    assert after < 1e-5


def test_the_commands_of_the_family_run(opt):
    transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
    base = opt / "OPT_FOLDER"
    (opt / "mine.txt").write_text("".join(f"so shaken as we are, so wan with care {i}\n" for i in range(200)), "utf-8")
    firth("tokenizer", "train", "mine.txt", "--vocab-size", "300", "--out", str(base))
    sizes = {
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_dim": 48,
    }
    transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=300, **sizes)).save_pretrained(base)
    lines = [line for block in blocks("add-a-family.md", "") for line in block.splitlines()]
    for words in (shlex.split(line)[1:] for line in lines if line.startswith("firth")):
        firth(*words, *(["max_steps=2", "data.split_by=line"] if words[0] == "train" else []))
    assert read_json(opt / "runs/continued/model/config.json")["architectures"] == ["OPTForCausalLM"]


@pytest.mark.parametrize(
    ("named", "message"),
    [("opt:to_config", "is a function and no Family"), ("opt:FAMILY,opt:FAMILY", "which another family has"),
     ("opt:Family", "is a type and no Family"), ("nowhere:FAMILY", "No module named 'nowhere'")],
)  # fmt: skip
def test_wrong_families_are_explained(opt, monkeypatch, named, message):
    monkeypatch.setenv("FIRTH_FAMILIES", named)
    with pytest.raises(UserError, match=message):
        families.names()


def test_a_model_directory_names_no_module(opt, monkeypatch):
    """Only the environment names a user's module: a `model_type` of that form is unknown, not imported."""
    (opt / "broken.py").write_text("raise SystemExit\n", "utf-8")
    (opt / "model").mkdir()
    (opt / "model" / "config.json").write_text(json.dumps({"model_type": "broken:FAMILY"}), "utf-8")
    with pytest.raises(UserError, match=r"has model_type 'broken:FAMILY'; firth reads .*marian, opt"):
        load_model(opt / "model")
