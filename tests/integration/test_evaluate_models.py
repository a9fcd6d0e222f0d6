"""Tasks in prompts on every kind of model: a run, a run with LoRA, its adapter directory, and a GGUF file."""

import json
import logging
import shutil
from pathlib import Path
from pydoc_data.topics import topics

import pytest

from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.evaluate.prompting.runner import TaskResult
from firth.runs.evaluate_prompts import evaluate_and_report, evaluate_prompts, training_texts
from firth.runs.import_export import export_model
from firth.runs.recipe import load
from firth.runs.run import run
from firth.types import UserError
from tests.support.messages import logged
from tests.support.runs import quiet


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a base run, a run with LoRA on it, a GGUF file, and questions."""
    folder = tmp_path_factory.mktemp("models")
    texts = [text for text in topics.values() if len(text) > 400][:20]
    (folder / "text.txt").write_text("\n\n".join(texts))
    shape = (
        "model.hidden_size=32",
        "model.num_layers=2",
        "model.num_heads=2",
        "tokenizer.vocab_size=400",
        "precision=fp32",
    )
    common = (f"data.path={folder / 'text.txt'}", "data.split_by=blank", "batch.size=8", "examples.max_length=64")
    run(load("llama", [*shape, *common, "max_steps=2"]), folder / "base", quiet)
    tuned = [*common, f"init_from={folder / 'base'}", "max_steps=3", "optimizer.lr=0.05", "precision=fp32"]
    run(load("llama", [*tuned, "peft={kind: lora, rank: 4}"]), folder / "tuned", quiet)
    export_model(folder / "base", folder / "gguf", form="gguf", dtype="fp32", shard="")
    words = [" ".join(text.split()[20:36]) for text in texts]
    rows = [{"sentence_good": w, "sentence_bad": " ".join(w.split()[::-1])} for w in words]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def scores(folder: Path, *models: str) -> list[TaskResult]:
    names = [str(folder / model) for model in models]
    found = evaluate_prompts(names, ["minimal_pairs"], PromptConfig(), data=[str(folder / "pairs.jsonl")])
    return [result for [result] in found]


def replies(result: TaskResult) -> list[float]:
    return [reply for item in result.items for reply in item.replies]


def test_a_gguf_file_scores_as_its_run(folder: Path) -> None:
    [file] = [path.name for path in (folder / "gguf").glob("*.gguf")]
    base, gguf = scores(folder, "base", f"gguf/{file}")
    assert replies(gguf) == pytest.approx(replies(base), abs=1e-3)


def test_an_adapter_directory_scores_as_its_run(folder: Path) -> None:
    """The run's model has the adapter merged; the directory names its base."""
    base, tuned, adapter = scores(folder, "base", "tuned", "tuned/adapter")
    assert replies(adapter) == pytest.approx(replies(tuned), abs=1e-3)
    assert replies(base) != pytest.approx(replies(tuned), abs=1e-2)


def test_the_questions_are_found_in_the_text_of_the_run(folder: Path) -> None:
    """Most items are in training documents; the run with LoRA starts from the base, whose text is searched too."""
    text = evaluate_and_report(
        [str(folder / "base")], ["minimal_pairs"], PromptConfig(), data=[str(folder / "pairs.jsonl")], examples=(),
        weights=None, within_word=False, out=folder / "out", as_json=False, contamination=[str(folder / "tuned")],
    )  # fmt: skip
    record = json.loads((folder / "out" / "results.json").read_text())["contamination"]["minimal_pairs"]
    assert record["share"] > 0.5 and record["runs"] == [str(folder / "tuned"), str(folder / "base")]
    assert f"{record['found']:,} of 20 items" in text


def test_the_text_of_a_run_is_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run from scratch does not read recipe.yaml of the current directory."""
    monkeypatch.chdir(folder / "tuned")
    with logged(logging.WARNING) as warnings:
        assert [text.name for text in training_texts(folder / "base")] == [str(folder / "base")]
    assert not warnings


def test_what_is_not_searched_is_named(folder: Path) -> None:
    """Records, a model that is no run, and parts of a mixture without a token store."""
    records = folder / "dialogues.jsonl"
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
    records.write_text((json.dumps(row) + "\n") * 8)
    settings = [f"data.path={records}", "batch.size=4", "max_steps=1", "precision=fp32"]
    run(load("sft", [*settings, f"init_from={folder / 'base' / 'model'}"]), folder / "sft", quiet)
    with logged(logging.WARNING) as warnings:
        assert [text.name for text in training_texts(folder / "sft")] == [str(folder / "base")]
    assert len(warnings) == 1 and f"the records of {folder / 'sft'}" in warnings[0]
    shutil.copytree(folder / "base" / "model", folder / "bare")
    run(load("sft", [*settings, f"init_from={folder / 'bare'}"]), folder / "alone", quiet)
    with logged(logging.WARNING) as warnings, pytest.raises(UserError, match="there is no token store"):
        training_texts(folder / "alone")
    assert len(warnings) == 2 and f"{folder / 'bare'}, which is no run directory" in warnings[1]


@pytest.mark.parametrize("cache", ["", "cache"])
def test_a_missing_part_of_a_mixture_is_named(folder: Path, cache: str) -> None:
    """In the run directory, or in data.cache_dir, where the files name the token stores."""
    place, other = folder / f"mixture{cache}", folder / f"other{cache}.txt"
    other.write_text((folder / "text.txt").read_text().upper())
    mixture = [
        f"data.path=[{folder / 'text.txt'}, {other}]",
        "data.weights=[1, 1]",
        "data.split_by=blank",
        "batch.size=8",
    ]
    stored = [f"data.cache_dir={folder / cache}"] if cache else []
    start = [f"init_from={folder / 'base'}", "max_steps=1", "precision=fp32", "examples.max_length=64"]
    run(load("llama", [*mixture, *stored, *start]), place, quiet)
    with logged(logging.WARNING) as warnings:
        assert [len(text.stores) for text in training_texts(place)] == [2, 1]
    assert not warnings
    shutil.rmtree(next((folder / cache if cache else place / "data").glob("*/train")))
    expected = f".txt of {place}: data.cache_dir has no token store" if cache else f"1 of 2 token stores of {place}"
    with logged(logging.WARNING) as warnings:
        assert [len(text.stores) for text in training_texts(place)] == [1, 1]
    assert len(warnings) == 1 and expected in warnings[0]
    if cache:
        other.unlink()
        with logged(logging.WARNING) as warnings:
            assert training_texts(place)[-1].name == str(folder / "base")
        assert warnings and str(other) in warnings[0]
