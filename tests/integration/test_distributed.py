"""Two processes under torchrun equal a single process: gradients, losses, skipped steps, uneven labels, accumulation."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from firth.training.checkpoint import load
from firth.training.distributed import BUCKET_BYTES, Ranks, buckets
from tests.support import train_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the result directories of one process and of two processes."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    ranks = subprocess.Popen([*command, str(ROOT / "tests/support/train_ranks.py"), str(two)], env=environment, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
    threads = torch.get_num_threads()
    train_ranks.run_all(one, Ranks(), accumulate=1)
    torch.set_num_threads(threads)
    output, _ = ranks.communicate(timeout=120)
    assert ranks.returncode == 0, output
    return one, two


def results(directory: Path) -> dict:  # type: ignore[type-arg]
    return json.loads((directory / "results.json").read_text())


def test_the_first_gradient_equals_that_of_one_process(outcomes: tuple[Path, Path]) -> None:
    one, two = (load_file(p / "gradients.safetensors") for p in outcomes)
    assert one.keys() == two.keys()
    for name, g in one.items():
        assert (g - two[name]).norm() <= 1e-5 * g.norm() + 1e-12, name


@pytest.mark.parametrize("name", ["ppo", "grpo", "rloo"])
def test_two_ranks_have_the_rollouts_and_gradients_of_one(outcomes: tuple[Path, Path], name: str) -> None:
    one, two = (load_file(path / f"{name}.safetensors") for path in outcomes)
    assert one.keys() == two.keys()
    for key, x in one.items():
        if key.startswith("rollout"):
            assert torch.equal(x.nan_to_num(), two[key].nan_to_num()), key
        else:
            assert (x - two[key]).norm() <= 1e-5 * x.norm() + 1e-9, key
    assert sum(float(x.norm()) for key, x in one.items() if key.startswith("gradient")) > 0.01


def test_each_answer_is_scored_once(outcomes: tuple[Path, Path]) -> None:
    """A random reward: when every rank scored all answers, their advantages differed, and so did their steps."""
    for found in map(results, outcomes):
        assert (found["reward_calls"], found["advantage_difference"]) == (13, 0.0)


def test_losses_equal_those_of_one_process(outcomes: tuple[Path, Path]) -> None:
    one, two = (results(p) for p in outcomes)
    assert one["step"] == pytest.approx(two["step"], abs=1e-5)
    assert one["tokens"] == two["tokens"]
    logs = [[json.loads(line) for line in (p / "plain" / "metrics.jsonl").read_text().splitlines()] for p in outcomes]
    assert len(logs[0]) == len(logs[1]) == 6
    for a, b in zip(*logs, strict=True):
        for name in ("step", "tokens", "loss", "accuracy"):
            assert a[name] == pytest.approx(b[name], abs=1e-5), name


def test_a_step_with_nan_on_one_rank_is_skipped_by_all(outcomes: tuple[Path, Path]) -> None:
    found = results(outcomes[1])
    assert (found["skipped"], found["max_difference"], found["finite"]) == (1, 0.0, True)


@pytest.mark.parametrize("world", [1, 2])
def test_infinite_gradients_are_skipped_without_a_read(outcomes: tuple[Path, Path], world: int) -> None:
    """The decision of the device: the same skipped steps and weights as if the host had read every step."""
    found = results(outcomes[world - 1])["late"]
    assert len(found) == 2 * world
    for name, (skipped, steps, difference) in found.items():
        assert (skipped, steps) == (1, 2), name
        assert difference <= (0.0 if "adamw" in name and world > 1 else 1e-5), name


def test_a_gradient_of_one_rank_reaches_all_ranks(outcomes: tuple[Path, Path]) -> None:
    found = results(outcomes[1])
    assert (found["used"], found["unused"]) == ([2.0, 2.0, 2.0], True)


def test_muon_dealt_to_ranks_equals_muon_on_one(outcomes: tuple[Path, Path]) -> None:
    assert results(outcomes[1])["muon_difference"] <= 2**-7  # a unit in the last place of bf16 at 1


@pytest.mark.parametrize("world", [1, 2])
def test_resuming_is_bitwise_with_random_states_of_all_ranks(outcomes: tuple[Path, Path], world: int) -> None:
    whole, resumed = (load(outcomes[world - 1] / name / "checkpoints" / "step-000006") for name in ("whole", "resumed"))
    for name, x in whole.files["model"].items():
        assert torch.equal(x, resumed.files["model"][name]), name
    assert whole.state["random"] == resumed.state["random"]
    assert len(set(whole.state["random"]["cpu"])) == world  # dropout differs from rank to rank


def test_buckets_hold_every_gradient_once_in_order() -> None:
    sizes = (3, BUCKET_BYTES // 8, BUCKET_BYTES // 8, BUCKET_BYTES // 2, 1)
    tensors = [torch.nn.Parameter(torch.empty(n)) for n in sizes]
    tensors.append(torch.nn.Parameter(torch.empty(2, dtype=torch.bfloat16)))
    found = [[x.numel() for x in bucket] for bucket in buckets(tensors)]
    assert found == [[3, BUCKET_BYTES // 8], [BUCKET_BYTES // 8], [BUCKET_BYTES // 2], [1], [2]]
