"""A mixture of paths in a recipe: the stated weights in training and validation, and errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from firth.data.examples import DataConfig
from firth.data.source import Source
from firth.data.windows import WindowsConfig
from firth.runs import examples
from firth.runs.examples import spread
from firth.runs.prepare import RunData, train_tokenizer
from firth.runs.recipe import load
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

WORDS = {"a": "ababab baba abba ", "z": "zyzy yzzy zzyy "}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two languages without a common letter; one has three times the text of the other."""
    folder = tmp_path_factory.mktemp("two")
    for letter, files in (("a", 20), ("z", 60)):
        (folder / letter).mkdir()
        for i in range(files):
            (folder / letter / f"{i}.txt").write_text(f"{WORDS[letter]}{'x' * (i % 7)} " * 40)
    train_tokenizer([str(folder)], folder / "tok", algorithm="byte-bpe", vocab_size=400, log=lambda _: None)
    return folder


def run_data(folder: Path, place: Path, **settings: object) -> RunData:
    paths = (str(folder / "a"), str(folder / "z"))
    source = DataConfig(path=paths, validation_fraction=0.3, **settings)  # type: ignore[arg-type]
    return RunData(source, Tokenizer.load(folder / "tok"), place, log=lambda _: None)


def share_of_a(source: Source, indices: np.ndarray, tokenizer: Tokenizer) -> float:
    texts = [tokenizer.decode(source[int(i)]["tokens"]) for i in indices]
    return float(np.mean([t.count("a") + t.count("b") > t.count("z") + t.count("y") for t in texts]))


def test_mixture_has_the_stated_weights(folder: Path, tmp_path: Path) -> None:
    mixed = run_data(folder, tmp_path, weights=(3.0, 1.0))
    cut = examples.build_datasets(WindowsConfig(max_length=32), mixed, load("gpt").objective)
    _, indices = cut.train.order(seed=0, positions=np.arange(64))
    assert share_of_a(cut.train, indices, mixed.tokenizer) == 0.75
    assert cut.validation is not None
    assert share_of_a(cut.validation, np.arange(len(cut.validation)), mixed.tokenizer) == pytest.approx(0.75, abs=0.06)
    parts = [WindowsConfig(max_length=32).build(part, load("gpt").objective) for part in mixed.per_path()]
    assert cut.bytes_per_target == pytest.approx(0.75 * parts[0].bytes_per_target + 0.25 * parts[1].bytes_per_target)
    assert cut.counts["documents"] == sum(p.counts["documents"] for p in parts)


def test_without_weights_paths_are_concatenated(folder: Path, tmp_path: Path) -> None:
    plain = run_data(folder, tmp_path)
    cut = examples.build_datasets(WindowsConfig(max_length=32), plain, load("gpt").objective)
    assert share_of_a(cut.train, np.arange(len(cut.train)), plain.tokenizer) == pytest.approx(0.25, abs=0.1)


def test_missing_weight_is_rejected(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.weights has 1 numbers for the 2 paths"):
        examples.build_datasets(
            WindowsConfig(max_length=32), run_data(folder, tmp_path, weights=(1.0,)), load("gpt").objective
        )


def test_recipe_with_weights_runs_and_resumes(folder: Path, tmp_path: Path) -> None:
    settings = [f"data.path=[{folder / 'a'}, {folder / 'z'}]", "data.weights=[1, 2]", "tokenizer.vocab_size=400",
                "model.hidden_size=32", "model.num_layers=1", "model.num_heads=1", "model.max_positions=64", "examples.max_length=32",
                "batch.size=6", "max_steps=4", "evaluation.every=2", "evaluation.max_examples=20", "sample_prompts=[]"]  # fmt: skip
    done = run(load("gpt", settings), tmp_path / "run", log=lambda _: None)
    assert np.isfinite(done.metrics["valid/bits_per_byte"])
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["data"]["weights"] == [1.0, 2.0]
    assert json.loads((tmp_path / "run" / "done.json").read_text())["counts"]["documents"] > 40
    assert run(load(str(tmp_path / "run")), tmp_path / "again", log=lambda _: None).metrics == done.metrics


def test_a_mixture_of_tasks_is_measured_on_a_held_out_task(folder: Path, tmp_path: Path) -> None:
    """Dialogues of two tasks with weights, and a third task that is only validated."""
    for task, answer in (("upper", "AB"), ("lower", "ab"), ("double", "abab")):
        rows = [{"prompt": f"{task} {i}", "completion": f"{answer} {i}"} for i in range(12)]
        (tmp_path / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = DataConfig(
        path=(str(tmp_path / "upper.jsonl"), str(tmp_path / "lower.jsonl")), weights=(1.0, 3.0),
        validation_path=(str(tmp_path / "double.jsonl"),),
    )  # fmt: skip
    data = RunData(source, Tokenizer.load(folder / "tok"), tmp_path, log=lambda _: None)
    recipe = load("sft")
    cut = examples.build_datasets(recipe.examples, data, recipe.objective)
    decode, seen = data.tokenizer.decode, []
    for i in cut.train.order(seed=0, positions=np.arange(16))[1]:
        seen.append("lower" in decode(cut.train[int(i)]["tokens"]))
    assert np.mean(seen) == 0.75
    assert cut.validation is not None
    assert len(cut.validation) == 12
    assert all("double" in decode(cut.validation[i]["tokens"]) for i in range(12))


def test_spread_takes_evenly_spaced_examples() -> None:
    class Numbers(Source):
        def __len__(self) -> int:
            return 100

        def __getitem__(self, index: int) -> dict[str, np.ndarray]:
            return {"tokens": np.array([index])}

    some = spread(Numbers(), 5)
    assert [int(some[i]["tokens"][0]) for i in range(len(some))] == [0, 25, 50, 74, 99]
    assert len(spread(Numbers(), 200)) == 100
