"""A model never exists whole on a rank: while it is initialized, while a start model is read, and at 7 B parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from firth.pretrained.load_save import load_model

ROOT = Path(__file__).parents[2]


def build(world: int, *words: object) -> list[dict[str, Any]]:
    """Run tests/support/shard_build.py on several ranks, and return what each found."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [*command, str(ROOT / "tests/support/shard_build.py"), *map(str, words)], text=True, timeout=240,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert not done.returncode, done.stdout
    found = [json.loads(path.read_text()) for path in sorted(Path(str(words[1])).glob("?.json"))]
    assert len(found) == world
    assert sum(rank["own"] for rank in found) == pytest.approx(found[0]["whole"], rel=1e-3)
    return found


PROCESS_BYTES = 60e6
"""Bytes that a process takes for code and buffers when it first builds, gathers and reads."""


def test_no_rank_holds_more_than_its_share_and_a_unit(tmp_path: Path) -> None:
    """386 M parameters (1,544 MB) on four ranks. A unit is in memory twice at most: gathered, and as it is sent."""
    for rank in build(4, "build", tmp_path):
        assert rank["whole"] > 1.5e9
        assert rank["own"] == pytest.approx(rank["whole"] / 4, rel=1e-3)
        assert rank["own"] < rank["peak"] < rank["own"] + 2 * rank["unit"] + PROCESS_BYTES < 0.4 * rank["whole"]


def test_seven_billion_parameters_are_divided_without_data(tmp_path: Path) -> None:
    for rank in build(2, "shape", tmp_path):
        assert 6.5e9 < rank["whole"] / 4 < 7.5e9
        assert rank["own"] == pytest.approx(rank["whole"] / 2, rel=1e-4)
        assert rank["peak"] < 100e6


@pytest.mark.parametrize("kind", ["expected", "checkpoints/step-000001"])
def test_a_start_model_is_never_whole_in_memory(tmp_path: Path, kind: str) -> None:
    """Pages of the mapped files are not counted: the kernel drops them when memory is short."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = str(ROOT / "tests/support/streamed_export.py")
    subprocess.run([sys.executable, script, "write", str(tmp_path)], env=environment, check=True, timeout=120)
    out = tmp_path / "out"
    out.mkdir()
    ranks = build(2, "start", out, tmp_path / kind)
    for rank in ranks:
        assert rank["own"] < rank["peak"] < rank["own"] + 2 * rank["unit"] + PROCESS_BYTES < rank["whole"]
    for name, p in load_model(tmp_path / kind).named_parameters():
        assert ranks[0]["sums"][name] == pytest.approx(float(p.detach().double().sum()), rel=1e-6, abs=1e-3), name
