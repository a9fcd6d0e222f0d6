"""Two and three ranks, with a copy of the model each and with shards, take the steps of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from firth.training.distributed import Ranks
from tests.support import shard_ranks

ROOT = Path(__file__).parents[2]
EVERY_WAY = ("none", "1", "none", "2", "full", "1", "full", "2")
"""A copy on each rank and shards, each without and with accumulation of gradients."""


def run_ranks(script: str, world: int, *arguments: str) -> str:
    """Run a module of tests.support on several ranks and return its output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-m", f"tests.support.{script}", *arguments], env=environment, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert not done.returncode, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of one process."""
    out, threads = tmp_path_factory.mktemp("one"), torch.get_num_threads()
    shard_ranks.main(out, Ranks(), ["none", "1"])
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the results of two ranks."""
    out = tmp_path_factory.mktemp("two")
    run_ranks("shard_ranks", 2, str(out), *EVERY_WAY)
    return out


def check_equal(one: Path, several: Path, name: str) -> None:
    """Check the first gradients and losses to 1e-5, and the weights after two steps of AdamW to its usual error."""
    expected, found = load_file(one / f"none-1-{name}.safetensors"), load_file(several)
    assert expected.keys() == found.keys()
    total = torch.stack([x.norm() for key, x in expected.items() if key.startswith("gradient")]).norm()
    assert total > 1e-3
    for key, x in expected.items():
        kind = key.split()[0]
        if kind == "source":
            assert torch.equal(x.nan_to_num(), found[key].nan_to_num()), key
        elif kind == "gradient":
            assert (x - found[key]).norm() <= 1e-5 * x.norm() + 1e-7 * total, key
        elif kind == "weight":
            assert (x - found[key]).abs().max() <= 1e-3, key  # a step of AdamW changes a weight by at most lr
        else:
            assert (x - found[key]).abs().max() <= 1e-5 * (1 + x.abs().max()), key


@pytest.mark.parametrize("way", ["none-1", "none-2", "full-1", "full-2"])
@pytest.mark.parametrize("name", shard_ranks.CASES)
def test_two_ranks_take_the_steps_of_one_process(one: Path, two: Path, name: str, way: str) -> None:
    check_equal(one, two / f"{way}-{name}.safetensors", name)


@pytest.mark.slow
def test_compiled_blocks_are_sharded(one: Path, tmp_path: Path) -> None:
    """torch.compile inside of the hooks that gather the weights; the numbers are those of one process that compiles nothing."""
    run_ranks("shard_ranks", 2, str(tmp_path), "full", "1", "cases", "clm-compiled")
    check_equal(one, tmp_path / "full-1-clm-compiled.safetensors", "clm")


@pytest.mark.slow
@pytest.mark.parametrize(("world", "ways"), [(3, EVERY_WAY), (4, ("hybrid", "1", "hybrid", "2"))])
def test_more_ranks_take_the_steps_of_one_process(one: Path, tmp_path: Path, world: int, ways: tuple[str, ...]) -> None:
    run_ranks("shard_ranks", world, str(tmp_path), *ways)
    results = sorted(tmp_path.iterdir())
    assert len(results) == len(shard_ranks.CASES) * len(ways) // 2
    for path in results:
        check_equal(one, path, path.stem.split("-", 2)[2])
