"""Sharded checkpoints: resuming to the bit, other numbers of ranks, damage, and what must not enter them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from firth.training import checkpoint
from firth.training.distributed import Ranks
from firth.training.optimizer import Optimizer
from firth.types import UserError
from tests.support.shard_checkpoints import OPTIMIZER
from tests.support.training import Chains, small_model

ROOT = Path(__file__).parents[2]
LAST = Path("checkpoints/step-000006")


def run_ranks(world: int, *arguments: str) -> None:
    """Run tests/support/shard_checkpoints.py on several ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    done = subprocess.run(
        [*command, str(ROOT / "tests/support/shard_checkpoints.py"), *arguments], text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert not done.returncode, done.stdout


def assembled(path: Path) -> dict[str, Tensor]:
    """Return the whole tensors of a checkpoint, from its files alone: parts in the order of the ranks."""
    parts: dict[str, list[Tensor]] = {}
    for file in sorted((path / "shards").iterdir()):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                parts.setdefault(name, []).append(opened.get_tensor(name))
    return {name: torch.cat(rows) for name, rows in parts.items()}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("two")
    run_ranks(2, "save", str(out))
    return out


@pytest.fixture(scope="module")
def three(two: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of two ranks after three have loaded and saved it."""
    out = tmp_path_factory.mktemp("three")
    run_ranks(3, "load", str(out), str(two / "whole"))
    return out


def test_a_resumed_sharded_run_has_the_same_bits(two: Path) -> None:
    whole, resumed = (checkpoint.load(two / name / LAST) for name in ("whole", "resumed"))
    first, second = (assembled(two / name / LAST) for name in ("whole", "resumed"))
    assert first.keys() == second.keys()
    for name, x in first.items():
        assert torch.equal(x, second[name]), name
    assert whole.state["random"] == resumed.state["random"]
    assert {name for name in first if name.startswith("optimizer/momentum")}
    assert len({*(two / "whole" / LAST / "shards").iterdir()}) == 2


def test_one_process_loads_what_two_ranks_saved(two: Path) -> None:
    model = small_model(seed=9)
    optimizer = Optimizer(OPTIMIZER, model)
    saved = checkpoint.load(two / "whole" / LAST)
    state = checkpoint.restore(saved, model, optimizer, Chains(), Ranks(), {})
    assert state.step == 6
    expected = assembled(two / "whole" / LAST)
    found = {f"model/{name}": x for name, x in checkpoint.weights(model).items()}
    found |= {f"optimizer/{name}": x for name, x in optimizer.state().items() if not name.startswith("step/")}
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(found[name], x), name
    steps = {name: float(x) for name, x in optimizer.state().items() if name.startswith("step/")}
    assert set(steps.values()) == {6.0}


def test_three_ranks_load_what_two_saved(two: Path, three: Path) -> None:
    expected, found = assembled(two / "whole" / LAST), assembled(three / LAST)
    assert expected.keys() == found.keys()
    for name, x in expected.items():
        assert torch.equal(x, found[name]), name
    assert checkpoint.load(three / LAST).layout["shards"] == 3


@pytest.mark.parametrize("damage", ["missing", "changed", "extra"])
def test_a_damaged_part_is_found_before_it_is_read(three: Path, tmp_path: Path, damage: str) -> None:
    path = tmp_path / "checkpoints/step-000006"
    shutil.copytree(three / LAST, path)
    [middle] = (path / "shards").glob("shard-00002-*")
    if damage == "missing":
        middle.unlink()
    elif damage == "changed":
        data = bytearray(middle.read_bytes())
        data[len(data) // 2] ^= 1
        middle.write_bytes(data)
    else:
        shutil.copy(middle, path / "shards/shard-00009-model-00001-of-00001.safetensors")
    messages: list[str] = []
    assert checkpoint.newest(tmp_path, messages.append) is None
    [message] = messages
    assert {"missing": "the file is missing", "changed": "do not match", "extra": "not in the manifest"}[
        damage
    ] in message
    with pytest.raises(UserError, match="shard-0000"):
        checkpoint.load(path)
