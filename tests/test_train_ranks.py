"""`firth train` on two ranks: what it reads before its first step, and how it waits and ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
WORDS = (
    "the king and queen of all that land did walk by night with many a fool who sang. But no one heard it, my lord! "
)
SMALL = [
    "train", "gpt", "shape.width=32", "shape.heads=2", "shape.depth=1", "shape.context=32", "segment.length=16",
    "tokenizer.size=400", "length.steps=2", "batch.rows=8", "checks.every=0", "checks.save=1", "samples=[]",
    "precision=fp32", "source.held_out=0.1",
]  # fmt: skip


def write_text(folder: Path) -> Path:
    """Two dozen documents whose words differ, so that every share of a step has other frequencies."""
    folder.mkdir()
    words = WORDS.split()
    for number in range(24):
        turned = [words[(i * (number % 7 + 1) + number * number) % len(words)] for i in range(200)]
        (folder / f"{number}.txt").write_text(" ".join(turned))
    return folder


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """All jobs in one process that imports torch once: the folder of the runs, and how each job ended."""
    folder = tmp_path_factory.mktemp("ranks")
    text = write_text(folder / "text")

    def job(name: str, world: int, *more: str, **how: Any) -> dict[str, Any]:
        return {
            "name": name,
            "world": world,
            "arguments": [*SMALL, f"source.path={text}", "--out", str(folder / name), *more],
        } | how

    jobs = [job("one", 1), job("two", 2), job("accumulate", 1, "batch.accumulate=2")]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(HERE / "fork_ranks.py"), str(folder / "jobs.json")], env=environment,
                          text=True, capture_output=True, timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder, json.loads((folder / "outcomes.json").read_text())


def first_loss(folder: Path, name: str) -> float:
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    return next(row["loss"] for row in rows if row["split"] == "train" and row["step"] == 1)


def test_the_first_loss_is_the_same_on_any_ranks(outcomes: tuple[Path, dict[str, Any]]) -> None:
    """The starting frequencies are those of whole steps: 3e-3 off when each rank counted its own share.

    Two ranks compute what one rank computes in two micro-batches, so that difference is 0. A single batch adds the same
    numbers in another order, which costs a last bit of fp32 (2.4e-7 at a loss of 3.7).
    """
    folder, ends = outcomes
    assert [ends[name]["codes"] for name in ("one", "two", "accumulate")] == [[0], [0, 0], [0]]
    one, two, accumulated = (first_loss(folder, name) for name in ("one", "two", "accumulate"))
    assert two == accumulated
    assert abs(one - two) < 1e-6


def test_the_first_loss_is_the_same_with_micro_batches(outcomes: tuple[Path, dict[str, Any]]) -> None:
    """8e-4 off when the frequencies were those of the first micro-batch."""
    folder, _ = outcomes
    assert abs(first_loss(folder, "one") - first_loss(folder, "accumulate")) < 1e-5
