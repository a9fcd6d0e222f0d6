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
from firth.io.json_files import read_rows
from firth.io.safetensors import read_json
from firth.pretrained import families
from firth.pretrained.load_save import load_model
from firth.runs.recipe import load
from firth.types import UserError

HOW_TO = Path(__file__).parents[2] / "docs" / "how-to"


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
    (opt / "MY_FOLDER").mkdir()
    (opt / "MY_FOLDER" / "mine.txt").write_text(
        "".join(f"so shaken as we are, so wan with care {i}\n" for i in range(200)), "utf-8"
    )
    firth("tokenizer", "train", "MY_FOLDER", "--vocab-size", "300", "--out", str(base))
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


TINY = ["tokenizer.vocab_size=300", "model.hidden_size=32", "model.num_heads=2", "model.num_layers=1", "max_steps=12"]


@pytest.fixture
def module(directory, monkeypatch, request):
    """Return a function that writes the module of a page under the name that the page gives it."""

    def write(page: str) -> str:
        text = (HOW_TO / page).read_text("utf-8")
        name = re.search(r"Save it as `(\w+)\.py`", text)[1]
        monkeypatch.delitem(sys.modules, name, raising=False)
        request.addfinalizer(lambda: sys.modules.pop(name, None))
        (directory / f"{name}.py").write_text(blocks(page, "python")[0], "utf-8")
        return name

    return write


def commands(page: str) -> list[list[str]]:
    """Return the words of the page's commands, without `firth`."""
    lines = [line for block in blocks(page, "") for line in block.splitlines() if line.startswith("firth ")]
    return [shlex.split(line)[1:] for line in lines]


def write_translations(directory: Path, n: int = 200) -> None:
    numbers = [[i % 10, i // 10 % 10, i // 100, i * 7 % 10] for i in range(n)]
    english = ["the", "sea", "a", "ship", "my", "king", "one", "day", "old", "new"]
    french = ["la", "mer", "un", "navire", "mon", "roi", "un", "jour", "vieux", "neuf"]
    for name, words in (("english.txt", english), ("french.txt", french)):
        (directory / name).write_text(
            "".join(" ".join(words[k] for k in row) + f" {row}\n" for row in numbers), "utf-8"
        )


def test_the_dataset_of_the_page_trains(directory, module):
    assert module("add-a-dataset.md") == "parallel"
    write_translations(directory)
    train, generate = commands("add-a-dataset.md")
    model = "model={hidden_size: 32, num_layers: 1, encoder: {num_layers: 1}, num_heads: 2}"
    train = [model if word.startswith("model=") else word for word in train]
    settings = ["tokenizer.vocab_size=300", "max_steps=12"]
    printed = firth(*train, *settings)
    losses = [float(loss) for loss in re.findall(r"step \d+/\d+ +loss (\d\.\d+)", printed)]
    assert losses[-1] < losses[0]
    assert "validation: loss" in printed
    assert firth(*generate)
    recipe = load("runs/translate")
    assert recipe.examples.max_length == 64
    assert "parallel:ParallelLines" in (directory / "runs/translate/recipe.yaml").read_text("utf-8")
    assert "is finished" in firth(*train, *settings)
    (directory / "parallel.py").write_text(blocks("add-a-dataset.md", "python")[0] + "# changed\n", "utf-8")
    changed = CliRunner().invoke(app, [*train, *settings])
    assert isinstance(changed.exception, UserError)
    assert "examples parallel:ParallelLines" in str(changed.exception)


@pytest.mark.parametrize(
    ("name", "message"),
    [("parallel:Path", r"is no kind of examples: derive a @dataclass"), ("parallel:Nothing", r"has no attribute 'Nothing'"),
     ("lines", r"there is no kind of examples 'lines'")],
)  # fmt: skip
def test_wrong_kinds_of_examples_are_explained(directory, module, name, message):
    module("add-a-dataset.md")
    with pytest.raises(UserError, match=message):
        load(
            "text_to_text",
            [f"examples={name}", "model={hidden_size: 32, num_layers: 1, encoder: {num_layers: 1}, num_heads: 2}"],
        )


@pytest.fixture
def decoder(directory):
    """Return a working directory with a decoder in runs/mine."""
    lines = "".join(f"so shaken as we are, so wan with care {i}\n" for i in range(300))
    (directory / "mine.txt").write_text(lines, "utf-8")
    firth("train", "gpt", "data.path=mine.txt", "data.split_by=line", *TINY, "evaluation.every=6", "--out", "runs/mine")
    return directory


def test_the_task_of_the_page_scores(decoder, module):
    assert module("add-a-task.md") == "blimp"
    shown = next(block for block in blocks("add-a-task.md", "text") if "sentence_good" in block)
    (decoder / "shown.jsonl").write_text(shown, "utf-8")
    pairs = [{"sentence_good": f"so shaken as we are {i}", "sentence_bad": f"{i} zq Xx {{}} ~~~~"} for i in range(5)]
    (decoder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    [words] = commands("add-a-task.md")
    found = json.loads(firth(*words, "--json"))
    assert found == {"task": "blimp:TASK", "items": 5, "accuracy": 1.0, "accuracy_interval": [1.0, 1.0]}
    assert re.search(r"items +2", firth(words[0], words[1], "shown.jsonl", *words[3:]))
    (decoder / "pairs.jsonl").write_text('{"sentence_good": "a", "sentence_bd": "b"}\n', "utf-8")
    wrong = CliRunner().invoke(app, words).exception
    assert "pairs.jsonl:1" in str(wrong) and "did you mean 'sentence_bd'" in str(wrong)
    for name, message in (
        ("blimp:load", "is a function and no firth.evaluate.task.Task"),
        ("blimp:X", "no attribute 'X'"),
    ):
        wrong = CliRunner().invoke(app, [*words[:-1], name]).exception
        assert isinstance(wrong, UserError) and message in str(wrong)


def test_metrics_have_the_fields_of_the_page(decoder):
    text = (HOW_TO / "read-metrics.md").read_text("utf-8")
    table = dict(re.findall(r"^\| `([\w/]+)` \| ([\w, ]+) \|", text, re.M))
    for row in read_rows(decoder / "runs/mine/metrics.jsonl", {"split": str}, ""):
        expected = {name for name, splits in table.items() if splits == "all" or row["split"] in splits.split(", ")}
        assert {*row, "crc"} == expected
