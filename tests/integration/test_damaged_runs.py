"""Damaged, missing and stray files of a run: each command fails with one sentence that names the file, or works without it."""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from firth.io.json_files import read_object
from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.report.run_report import run_report
from firth.runs.import_export import export_model, import_model
from firth.runs.inference import evaluate_run, nearest_words
from firth.runs.peft_options import PrefixTuning, PromptTuning
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.train import train
from firth.training.logging import keep_until
from firth.types import UserError
from tests.support.runs import quiet

TINY = [
    "model.hidden_size=32",
    "model.num_layers=1",
    "model.num_heads=2",
    "model.max_positions=32",
    "examples.max_length=16",
    "batch.size=4",
    "max_steps=4",
    "tokenizer.vocab_size=300",
    "precision=fp32",
    "sample_prompts=[the cat]",
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    place = tmp_path_factory.mktemp("damage")
    (place / "a.txt").write_text("".join(f"the cat sat on mat {i} and saw dog {i * i}.\n\n" for i in range(200)))
    run(load("llama", [*TINY, f"data.path={place / 'a.txt'}", "data.split_by=blank"]), place / "run", quiet)
    return place / "run"


@pytest.fixture
def there(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def again(there: Path) -> None:
    run(load(str(there)), there, quiet)


def fails_with_one_sentence(action: Callable[[], Any], says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        action()
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


CUT = ('{"step": 3, "x', "[]\n", "3\n", '{"a": 1}\n', "\x00\x01\n")


@pytest.mark.parametrize("text", CUT)
def test_damaged_json_of_a_finished_run(text: str, there: Path) -> None:
    (there / "done.json").write_text(text)
    fails_with_one_sentence(
        lambda: again(there), r"done\.json.*: delete .*done\.json, and the same command exports the model again$"
    )
    if text != CUT[3]:  # that is a note of a run without counts
        fails_with_one_sentence(lambda: evaluate_run(there, [], task=None, limit=None, as_json=False), r"done\.json")
        fails_with_one_sentence(
            lambda: export_model(there, there / "out", form="hf", dtype="", shard="", log=quiet), r"done\.json"
        )
    (there / "done.json").unlink()
    again(there)
    assert read_object(there / "done.json")["steps"] == 4


@pytest.mark.parametrize("name", ["samples.jsonl", "metrics.jsonl"])
def test_damaged_jsonl_of_a_run(name: str, there: Path) -> None:
    (there / "done.json").unlink()
    before = (there / name).read_text()
    for text in (*CUT[1:], CUT[0] + "\n" + before):
        (there / name).write_text(text)
        (there / "done.json").unlink(missing_ok=True)
        fails_with_one_sentence(lambda: again(there), rf"{name}, line 1: .*(delete|remove)")
        fails_with_one_sentence(lambda: run_report(there), rf"{name}, line 1: .*(delete|remove)")
    if name == "metrics.jsonl":
        fails_with_one_sentence(lambda: keep_until(there / name, 3), r"metrics\.jsonl, line 1: .*remove")
    (there / name).write_text(before)
    again(there)


def test_missing_model_is_exported_again(there: Path) -> None:
    before = (there / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(there / "model")
    lines: list[str] = []
    run(load(str(there)), there, lines.append)
    assert any("is missing, so it is exported again" in line for line in lines)
    assert (there / "model" / "model.safetensors").read_bytes() == before


def test_stray_files_in_the_checkpoints(there: Path) -> None:
    (there / "done.json").unlink()
    for name in ("step-000051", "step-²", "step-000004.txt", "notes"):
        (there / "checkpoints" / name).write_text("x")
    (there / "checkpoints" / "step-000099" / "manifest.json").mkdir(parents=True)
    again(there)
    assert read_object(there / "done.json")["steps"] == 4 and (there / "checkpoints" / "step-000051").read_text() == "x"


def test_out_that_cannot_be_a_directory(whole: Path, tmp_path: Path) -> None:
    plan = load(str(whole))
    (tmp_path / "file").write_text("x")
    for name, cure in (
        ("file", "a file is where"),
        ("file/run", "a file is where"),
        ("n" * 300, "choose a shorter name"),
    ):
        fails_with_one_sentence(lambda name=name: run(plan, tmp_path / name, quiet), cure)
        fails_with_one_sentence(
            lambda name=name: export_model(whole, tmp_path / name, form="hf", dtype="", shard="", log=quiet),
            f"{cure}|holds other files",
        )


def test_empty_arrays_are_rejected(whole: Path) -> None:
    for setting in ("examples.max_length=0", "batch.gradient_accumulation_steps=0"):
        fails_with_one_sentence(
            lambda setting=setting: load(str(whole), [setting]), f"{setting} should be greater than or equal to 1"
        )


@pytest.mark.parametrize("what", ["train", "export", "gguf", "import", "vectors"])
def test_full_disk_error_names_the_file(what: str, there: Path, tmp_path: Path) -> None:
    """No partial file has a final name, and existing files are kept."""
    if what == "train":
        (there / "done.json").unlink()
        shutil.rmtree(there / "model")
    out = there / "model" if what == "train" else tmp_path / "out"
    actions: dict[str, Callable[[], Any]] = {
        "train": lambda: again(there),
        "export": lambda: export_model(there, out, form="hf", dtype="", shard="", log=quiet),
        "gguf": lambda: export_model(there, out, form="gguf", dtype="fp32", shard="", log=quiet),
        "import": lambda: import_model(there / "model", out, quiet),
        "vectors": lambda: nearest_words(there, [], 8, out),
    }
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = (there / "metrics.jsonl").stat().st_size + 30_000  # the tables fit, the weights do not
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        fails_with_one_sentence(actions[what], rf"{out.name}.*; free some room and run the same command again$")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (
        not out.exists()
        and not list(out.parent.glob(f".{out.name}.partial*"))
        and not list(out.parent.glob("*.partial"))
    )
    actions[what]()
    assert out.exists()


def test_damaged_recipes(there: Path) -> None:
    file = there / "recipe.yaml"
    text = file.read_text()
    for at in range(0, len(text), max(1, len(text) // 60)):
        file.write_text(text[:at] + chr(ord(text[at]) ^ 1 << at % 5) + text[at + 1 :])
        with contextlib.suppress(UserError):
            load(str(there))


def test_model_larger_than_memory_is_rejected(whole: Path, tmp_path: Path) -> None:
    """0.4 TB of weights, 1.2 TB with gradients and Muon's momentum; nothing is allocated."""
    settings = [
        "model.hidden_size=32768",
        "model.num_heads=64",
        "model.num_layers=10",
        "model.intermediate_size=131072",
    ]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    fails_with_one_sentence(
        lambda: run(load(str(whole), settings), tmp_path / "run", quiet),
        r"parameters, which take [\d,.]+ GB with gradients and optimizer, and [\d.,]+ GB of main memory are free: lower model",
    )
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_empty_turns_and_blank_prompts_are_rejected(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": [], "completion": []}\n' * 3)
    data = [f"data.path={tmp_path / 'a.jsonl'}", f"init_from={whole}", "max_steps=1"]
    fails_with_one_sentence(lambda: run(load("sft", data), tmp_path / "run", quiet), r"a\.jsonl")
    words = train(["low lower lowest " * 20], "wordpiece", vocab_size=300, seed=0)
    config = ModelConfig(
        vocab_size=words.vocab.size, hidden_size=16, num_layers=1, num_heads=2, max_positions=16, causal=True
    )
    for kind in (PromptTuning, PrefixTuning):
        model = LM(config, {"lm": LMHead(config)})
        fails_with_one_sentence(
            lambda kind=kind, model=model: kind(num_virtual_tokens=2, init_text=" \n ").apply(model, [], words, 0),
            "has no tokens",
        )
