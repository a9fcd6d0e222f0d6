"""Runs of two sharded ranks whose host reads no step, as on a GPU: NaN on one rank, Ctrl-C on one, a full disk on one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXT = "the king and queen of all that land did walk by night with many a fool who sang. But no one heard it, my lord! "
SMALL = [
    "train", "gpt", "model.hidden_size=32", "model.num_heads=2", "model.num_layers=2", "model.max_positions=32",
    "examples.max_length=16", "max_steps=13", "batch.size=7", "batch.gradient_accumulation_steps=2", "evaluation.every=0",
    "checkpoint.every=4", "sample_prompts=[]", "precision=fp32", "data.validation_fraction=0.3", "tokenizer.vocab_size=400",
    "optimizer.name=adamw",
]  # fmt: skip
SHARD = "distributed.shard=full"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Run all jobs in one process that imports torch once; return the folder of the runs and the outcomes by job."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text").mkdir()
    words = TEXT.split()
    for number in range(24):
        permuted = [words[(i * (number % 7 + 1) + number * number) % len(words)] for i in range(200)]
        (folder / f"text/{number}.txt").write_text(" ".join(permuted))

    def job(name: str, world: int, hook: str, out: str, *overrides: str) -> dict[str, Any]:
        arguments = [*SMALL, f"data.path={folder / 'text'}", "--out", str(folder / out), *overrides]
        return {"name": name, "world": world, "arguments": arguments, "hook": hook}

    jobs = [
        job("one", 1, "nothing", "one"),
        job("nan", 2, "deferred_nan", "nan", SHARD),
        job("stopped", 2, "deferred_interrupt", "stopped", SHARD),
        job("stopped, then one", 1, "deferred", "stopped"),
        job("full", 2, "full_disk", "full", SHARD),
        job("full, then three", 3, "deferred", "full", SHARD),
    ]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(ROOT / "tests/support/fork_ranks.py"), str(folder / "jobs.json")], env=environment,
                          text=True, capture_output=True, timeout=280)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "outcomes.json").read_text())


def steps(folder: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["split"] == "train"]


def printed(folder: Path, name: str, rank: int = 0) -> str:
    return (folder / f"{name}-{rank}.txt").read_text()


def check_equal(folder: Path, name: str) -> None:
    """Check the steps of a run against those of one process without an interruption."""
    one, other = steps(folder, "one"), steps(folder, name)
    assert [row["step"] for row in other] == [*range(1, 14)]
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-4)
        assert (a["tokens"], b["skipped"]) == (b["tokens"], 0)


def test_nan_on_one_rank_skips_the_step_on_all(runs: tuple[Path, dict[str, Any]]) -> None:
    """Two micro-batches a step: the third and fourth loss are those of the second step."""
    folder, ends = runs
    assert ends["nan"]["codes"] == [0, 0], printed(folder, "nan")
    rows = steps(folder, "nan")
    assert [row["skipped"] for row in rows] == [0, *[1] * 12]
    assert [row["loss"] is None for row in rows] == [False, True, *[False] * 11]


def test_a_stopped_run_resumes_on_one_process(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, ends = runs
    assert all(ends["stopped"]["codes"])
    stopped = re.search(r"stopped at step ([67]) and saved", printed(folder, "stopped"))  # by when the signal arrives
    assert stopped, printed(folder, "stopped")
    assert ends["stopped, then one"]["codes"] == [0], printed(folder, "stopped, then one")
    assert f"resuming from step-00000{stopped[1]}" in printed(folder, "stopped, then one")
    check_equal(folder, "stopped")


def test_a_full_disk_of_one_rank_keeps_the_checkpoint_before(runs: tuple[Path, dict[str, Any]]) -> None:
    folder, ends = runs
    assert ends["full"]["codes"] == [2, 2], printed(folder, "full", 1)
    for rank in (0, 1):
        assert "step-000008: not enough disk space for a checkpoint of 1 MB" in printed(folder, "full", rank)
        assert "Traceback" not in printed(folder, "full", rank)
    assert "resuming from step-000004" in printed(folder, "full, then three")
    check_equal(folder, "full")
