"""Runs whose model is sharded over two ranks: validation, start models and checkpoints as models, against one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from firth.evaluate.task import load_evaluated_model
from firth.io.integrity import with_digest
from firth.pretrained.load_save import load_model, metadata_of, open_model
from firth.runs.import_export import export_model, import_model
from firth.types import UserError
from tests.support.runs import quiet

ROOT = Path(__file__).parents[2]
TEXT = "the king and queen of all that land did walk by night with many a fool who sang. But no one heard it, my lord! "
LAST = "checkpoints/step-000002"
SHARD = "distributed.shard=full"
SMALL = [
    "train", "gpt", "model.hidden_size=32", "model.num_heads=2", "model.num_layers=2", "model.max_positions=32",
    "examples.max_length=16", "max_steps=2", "batch.size=8", "evaluation.every=1",
    "checkpoint.every=1", "sample_prompts=[]", "precision=fp32", "data.validation_fraction=0.3",
]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run all jobs in one process that imports torch once; return the folder of the runs and the outcomes by job."""
    folder = tmp_path_factory.mktemp("runs")
    words = TEXT.split()
    (folder / "text").mkdir()
    for number in range(24):
        permuted = [words[(i * (number % 7 + 1) + number * number) % len(words)] for i in range(200)]
        (folder / f"text/{number}.txt").write_text(" ".join(permuted))

    def job(name: str, world: int, *overrides: str, **options: Any) -> dict[str, Any]:
        tokenizer = [] if "from" in name else ["tokenizer.vocab_size=400"]  # a run has the tokenizer of its start model
        arguments = [*SMALL, *tokenizer, f"data.path={folder / 'text'}", "--out", str(folder / name), *overrides]
        return {"name": name, "world": world, "arguments": arguments, "hook": "count_gathers"} | options

    starts = {"model": folder / "sharded", "checkpoint": folder / "sharded/checkpoints/step-000001"}
    jobs = [job("one", 1), job("sharded", 2, SHARD)]
    for kind, place in starts.items():
        start = ["model=null", f"init_from={place}"]
        jobs += [job(f"one from {kind}", 1, *start), job(f"sharded from {kind}", 2, *start, SHARD)]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "tests/support/fork_ranks.py"), str(folder / "jobs.json")], env=environment,
                          text=True, capture_output=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "outcomes.json").read_text())


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def printed(folder: Path, name: str, rank: int) -> str:
    return (folder / f"{name}-{rank}.txt").read_text()


@pytest.mark.parametrize("kind", ["", " from model", " from checkpoint"])
def test_validation_runs_on_the_shards(runs: tuple[Path, dict[str, Any]], kind: str) -> None:
    """No rank gathers the model; losses before the first update agree to 1e-5, and after one of Muon in bf16 to 2e-3."""
    folder, ends = runs
    assert ends[f"one{kind}"]["codes"] == [0], printed(folder, f"one{kind}", 0)
    assert ends[f"sharded{kind}"]["codes"] == [0, 0], printed(folder, f"sharded{kind}", 0)
    assert all("gathered 0 times in all" in printed(folder, f"sharded{kind}", rank) for rank in (0, 1))
    one, sharded = rows(folder, f"one{kind}"), rows(folder, f"sharded{kind}")
    assert [(r["split"], r["step"]) for r in one] == [(r["split"], r["step"]) for r in sharded]
    assert [r["split"] for r in one] == ["train", "valid"] * 2
    assert one[0]["loss"] == pytest.approx(sharded[0]["loss"], abs=1e-5)
    for a, b in zip(one, sharded, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=2e-3)
    assert one[1]["bits_per_byte"] == pytest.approx(sharded[1]["bits_per_byte"], abs=2e-3)


@pytest.mark.parametrize("kind", ["model", "checkpoint"])
def test_one_rank_hashes_a_start_model_once(runs: tuple[Path, dict[str, Any]], kind: str) -> None:
    folder, _ = runs
    start = folder / {"model": "sharded/model", "checkpoint": "sharded/checkpoints/step-000001"}[kind]
    weights = [str(path) for path in start.rglob("*.safetensors") if path.name != "optimizer.safetensors"]
    assert weights
    for rank in (0, 1):
        lines = printed(folder, f"sharded from {kind}", rank).splitlines()
        assert {path: lines.count(f"hashed {path}") for path in weights} == dict.fromkeys(weights, 1 - rank)


def test_a_checkpoint_of_an_unfinished_run_is_exported(runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = runs
    run = tmp_path / "run"
    shutil.copytree(folder / "sharded", run, ignore=shutil.ignore_patterns("model", "done.json", "report.html"))
    export_model(run / "checkpoints/step-000001", tmp_path / "out", form="hf", dtype="", shard="", log=quiet)
    first, last = (load_file(path / "model.safetensors") for path in (tmp_path / "out", folder / "sharded/model"))
    assert first.keys() == last.keys() and any(not torch.equal(x, last[name]) for name, x in first.items())
    assert metadata_of(tmp_path / "out")["steps"] == 1
    card = (tmp_path / "out/README.md").read_text()
    assert "NanoChat" in card and "2 steps" not in card


def test_a_checkpoint_exports_the_model_of_its_run(runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = runs
    run = folder / "sharded"
    for options in ({"dtype": "", "shard": ""}, {"dtype": "bf16", "shard": "20kB"}):
        export_model(run, tmp_path / "run", form="hf", log=quiet, **options)
        export_model(run / LAST, tmp_path / "checkpoint", form="hf", log=quiet, **options)
        names = {path.name for path in (tmp_path / "run").iterdir()}
        assert names == {path.name for path in (tmp_path / "checkpoint").iterdir()}
        weights = [name for name in names if name.endswith((".safetensors", ".index.json"))]
        assert len(weights) > 1 if options["shard"] else weights == ["model.safetensors"]
        for name in (*weights, "config.json", "tokenizer.json"):
            assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "checkpoint" / name).read_bytes(), name


def test_an_export_replaces_no_checkpoint(runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = runs
    other = tmp_path / "other/checkpoints/step-000002"
    shutil.copytree(folder / "one" / LAST, other)
    before = {path.name: path.read_bytes() for path in other.iterdir() if path.is_file()}
    with pytest.raises(UserError, match="already exists and holds other files"):
        export_model(folder / "sharded", other, form="hf", dtype="", shard="", log=quiet)
    assert {path.name: path.read_bytes() for path in other.iterdir() if path.is_file()} == before
    with pytest.raises(UserError, match="is a checkpoint of a run: write its model with `firth export"):
        import_model(other, tmp_path / "imported", quiet)


def test_a_checkpoint_that_its_run_deletes_is_reported(runs: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = runs
    shutil.copytree(folder / "sharded" / LAST, tmp_path / "step-000002")
    _, read = open_model(tmp_path / "step-000002")
    assert read is not None and read("tokens.weight").numel()
    shutil.rmtree(tmp_path / "step-000002")
    with pytest.raises(UserError, match=r"can no longer be read .* take a newer one"):
        read("tokens.weight")


@pytest.mark.parametrize("name", ["one", "sharded"])
def test_a_checkpoint_is_read_as_a_model(runs: tuple[Path, dict[str, Any]], name: str) -> None:
    folder, _ = runs
    expected, found = load_model(folder / name / "model"), load_evaluated_model(folder / name / LAST)
    assert found.context == 16  # from the recipe of the run
    assert found.tokenizer.digest == load_evaluated_model(folder / name).tokenizer.digest
    for key, x in expected.state_dict().items():
        assert torch.equal(x, found.model.state_dict()[key]), key


def test_a_start_model_is_read_into_the_shards(runs: tuple[Path, dict[str, Any]]) -> None:
    """The run starts from the trained weights: its first loss is below that of the run before."""
    folder, _ = runs
    for kind in ("model", "checkpoint"):
        assert rows(folder, f"sharded from {kind}")[0]["loss"] < rows(folder, "sharded")[0]["loss"]
    one, sharded = (load_file(folder / f"{name} from model/model/model.safetensors") for name in ("one", "sharded"))
    for name, x in one.items():
        assert (x - sharded[name]).abs().max() <= 6e-3, name  # two steps of Muon in bf16 at lr 3e-3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("changed", "is not as it was written"),
        ("missing", "is missing"),
        ("extra", "firth.json does not list this file"),
        ("unlisted", "tensor .* is .*, expected"),
        ("old", "does not describe its model"),
    ],
)
def test_a_damaged_checkpoint_is_no_model(
    runs: tuple[Path, dict[str, Any]], tmp_path: Path, damage: str, message: str
) -> None:
    folder, _ = runs
    place = tmp_path / "step-000002"
    shutil.copytree(folder / "sharded" / LAST, place)
    [second] = (place / "shards").glob("shard-00002-*")
    if damage == "changed":
        data = bytearray(second.read_bytes())
        data[-1] ^= 1
        second.write_bytes(data)
    elif damage == "missing":
        second.unlink()
    elif damage == "extra":
        shutil.copy(second, place / "shards/shard-00003-model-00001-of-00001.safetensors")
    elif damage == "old":
        (place / "firth.json").unlink()
    elif damage == "unlisted":
        record = json.loads((place / "firth.json").read_text())
        del record["files"][f"shards/{second.name}"]
        del record["digest"]
        second.unlink()
        (place / "firth.json").write_text(json.dumps(with_digest(record)))
    with pytest.raises(UserError, match=message):
        open_model(place)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint of 218 MB in two parts, and the model directory that it should give."""
    folder = tmp_path_factory.mktemp("large")
    script("write", folder)
    return folder


def script(*words: object) -> list[int]:
    command = [sys.executable, str(ROOT / "tests/support/streamed_export.py"), *map(str, words)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_an_export_in_parts_has_bounded_memory(large: Path, tmp_path: Path) -> None:
    """The largest weight has 8 MB of 218; the rest is what a process needs to read files."""
    _, loaded = script("whole", large, tmp_path / "whole")
    size, streamed = script("streamed", large, tmp_path / "streamed")
    assert loaded > size > 200e6
    assert streamed < 0.35 * size
    for out in ("whole", "streamed"):
        expected = (large / "expected/model.safetensors").read_bytes()
        assert (tmp_path / out / "model.safetensors").read_bytes() == expected
