"""A run as long as a number of counted FLOPs: it ends with the step that reaches them, and goes on bit for bit."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from train_room import Chains, Scored, small_batches, small_model

from firth.model import flops
from firth.model.model import LM
from firth.train.checkpoint import load, newest
from firth.train.logging import NullReporter
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule
from firth.train.trainer import TrainerConfig, TrainingResult, train
from firth.types import IGNORE

ENOUGH = 3e8


class Dies(Chains):
    """Its fifth step never comes."""

    def prepare(self, model: LM, step: int) -> Mapping[str, float]:
        if step == 5:
            raise RuntimeError("killed")
        return {}


def run(directory: Path, source: Chains) -> TrainingResult:
    torch.set_num_threads(1)
    return train(
        small_model(), Scored(), small_batches(source), directory, budget=Budget(max_flops=ENOUGH),
        optimizer=OptimizerConfig(lr=0.01), schedule=Schedule("linear", warmup_ratio=0.1), reporter=NullReporter(),
        config=TrainerConfig(save_every=2, precision="fp32"),
    )  # fmt: skip


def test_it_ends_with_the_step_that_reaches_them_and_the_rate_follows_the_count(tmp_path: Path) -> None:
    done = run(tmp_path, Chains())
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    counts = [row["flops"] for row in log]
    assert counts[-2] < ENOUGH <= counts[-1] == done.flops
    batches, model = small_batches(Chains()), small_model()
    steps = [
        sum(Scored().forward_flops(model, b) + Scored().loss_flops(model, b) for b in batches.batches(s))
        for s in range(3)
    ]
    assert [row["flops"] for row in log[:3]] == [sum(steps[: n + 1]) for n in range(3)]
    middle = (counts[-3] + counts[-2]) / 2 / ENOUGH
    assert log[-2]["rate"] == pytest.approx(0.01 * Schedule("linear", warmup_ratio=0.1).factor(middle))


def test_killed_and_run_again_it_equals_the_uninterrupted_run(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Chains())
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", Dies())
    at = newest(tmp_path / "killed", print)
    assert at is not None and at.state["step"] == 4 and 0 < at.state["flops"] < ENOUGH
    again = run(tmp_path / "killed", Chains())
    assert (again.step, again.flops, again.tokens) == (whole.step, whole.flops, whole.tokens)
    last = f"checkpoints/step-{whole.step:06d}"
    ours, theirs = load(tmp_path / "whole" / last), load(tmp_path / "killed" / last)
    assert all(torch.equal(x, theirs.files["model"][name]) for name, x in ours.files["model"].items())


def test_what_loss_costs_is_counted_once_for_each_head_that_runs() -> None:
    model = small_model()
    [batch] = small_batches(Chains(), accumulate=1).batches(0)
    asked = int((batch["labels"] != IGNORE).sum())
    assert Scored().loss_flops(model, batch) == flops.head_flops(model.config, asked) == 6 * asked * 32 * 40
