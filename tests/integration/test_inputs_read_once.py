"""A run reads the model that it starts from once, and its labeled records once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from firth.corpora import readers
from firth.pretrained import load_save
from firth.runs.recipe import load
from firth.runs.run import run
from tests.support.runs import quiet

TINY = ("model.hidden_size=32", "model.num_heads=2", "model.num_layers=1", "tokenizer.vocab_size=300", "precision=fp32")
WORDS = [
    "so",
    "shaken",
    "as",
    "we",
    "are",
    "wan",
    "with",
    "care",
    "find",
    "a",
    "time",
    "for",
    "peace",
    "to",
    "pant",
    "hear",
]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the runs of a decoder and of an encoder."""
    place = tmp_path_factory.mktemp("starts")
    text = place / "text.txt"
    text.write_text("".join(" ".join(WORDS[i % 5 :]) + f" {i}\n" for i in range(200)))
    settings = (*TINY, f"data.path={text}", "data.split_by=line", "max_steps=2")
    for name in ("gpt", "roberta"):
        run(load(name, settings), place / name, log=quiet)
    return {name: place / name for name in ("gpt", "roberta")}


@pytest.fixture
def tensor_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[Path]:
    """Count how often the tensors of each directory are read."""
    found: Counter[Path] = Counter()
    read = load_save.read_tensors

    def counted(directory: Path) -> Any:
        found[directory] += 1
        return read(directory)

    monkeypatch.setattr(load_save, "read_tensors", counted)
    return found


@pytest.fixture
def record_reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Count how often the records of each file are read."""
    found: Counter[str] = Counter()
    read: Callable[..., Iterator[Any]] = readers.records

    def counted(paths: list[str], **options: Any) -> Iterator[Any]:
        found.update(paths)
        return read(paths, **options)

    monkeypatch.setattr(readers, "records", counted)
    return found


@pytest.mark.parametrize("peft", ["full", "lora", "prefix"])
def test_start_model_of_a_classifier_is_read_once(
    peft: str, starts: dict[str, Path], tensor_reads: Counter[Path], tmp_path: Path
) -> None:
    rows = [{"text": f"{WORDS[i % 16]} {i}", "label": "ab"[i % 2]} for i in range(40)]
    settings = (f"init_from={starts['roberta']}", f"data.path={write(tmp_path / 'a.jsonl', rows)}", f"peft={peft}")
    run(load("classification", (*settings, "max_steps=2", "precision=fp32")), tmp_path / "run", log=quiet)
    assert tensor_reads == {starts["roberta"] / "model": 1}


def test_start_model_and_reference_of_dpo_are_read_once(
    starts: dict[str, Path], tensor_reads: Counter[Path], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Speak {i}", "chosen": "with care", "rejected": "so wan"} for i in range(16)]
    settings = (f"init_from={starts['gpt']}", f"data.path={write(tmp_path / 'a.jsonl', rows)}", "batch.size=4")
    run(load("dpo", (*settings, "max_steps=2", "precision=fp32")), tmp_path / "run", log=quiet)
    assert tensor_reads == {starts["gpt"] / "model": 1}


@pytest.mark.parametrize(
    ("recipe", "row"),
    [
        ("classification", lambda i: {"text": f"{WORDS[i % 16]} {i}", "label": i % 3}),
        ("regression", lambda i: {"text": f"{WORDS[i % 16]} {i}", "label": i / 7}),
        ("multiple_choice", lambda i: {"text": f"find {i}", "options": ["peace", "care", "time"], "label": i % 2}),
        ("token_classification", lambda i: {"tokens": ["so", f"wan {i}"], "tags": ["O", "AB"[i % 2]]}),
    ],
)
def test_labeled_records_are_read_once(
    recipe: str,
    row: Callable[[int], dict[str, Any]],
    starts: dict[str, Path],
    record_reads: Counter[str],
    tmp_path: Path,
) -> None:
    rows = [row(i) for i in range(48)]
    train, valid = write(tmp_path / "a.jsonl", rows[:36]), write(tmp_path / "b.jsonl", rows[36:])
    settings = (f"init_from={starts['roberta']}", f"data.path={train}", f"data.validation_path={valid}", "max_steps=2")
    run(load(recipe, (*settings, "precision=fp32")), tmp_path / "run", log=quiet)
    assert record_reads == {train: 1, valid: 1}


@pytest.mark.parametrize(
    ("recipe", "row"),
    [
        ("classification", lambda i: {"text": f"{WORDS[i % 16]} {i}", "label": "abc"[i % 3 if i < 20 else i % 2]}),
        ("regression", lambda i: {"text": f"{WORDS[i % 16]} {i}", "label": i / 7}),
        (
            "token_classification",
            lambda i: {"tokens": ["so", f"wan {i}"], "tags": ["O", "ABC"[i % 3 if i < 20 else 1]]},
        ),
    ],
)
def test_records_of_a_mixture_are_read_once(
    recipe: str,
    row: Callable[[int], dict[str, Any]],
    starts: dict[str, Path],
    record_reads: Counter[str],
    tmp_path: Path,
) -> None:
    """One path has all classes and the other has not; both are numbered alike."""
    rows = [row(i) for i in range(60)]
    some, others = write(tmp_path / "a.jsonl", rows[:20]), write(tmp_path / "b.jsonl", rows[20:])
    settings = (f"init_from={starts['roberta']}", f"data.path=[{some}, {others}]", "data.weights=[1, 3]", "max_steps=2")
    done = run(load(recipe, (*settings, "precision=fp32", "data.validation_fraction=0.2")), tmp_path / "run", log=quiet)
    assert record_reads == {some: 1, others: 1}
    objective = yaml.safe_load((done.directory / "recipe.yaml").read_text("utf-8"))["objective"]
    names = {"classification": ["a", "b", "c"], "token_classification": ["A", "B", "C", "O"]}
    assert objective.get("class_names", []) == names.get(recipe, [])
