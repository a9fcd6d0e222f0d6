"""A budget in FLOPs: the run ends with the step that reaches it, and resumes bit for bit."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from firth.model import flops
from firth.model.model import LM
from firth.training.checkpoint import load, newest
from firth.training.logging import NullReporter
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule
from firth.training.trainer import TrainerConfig, TrainingResult, train
from firth.types import IGNORE
from tests.support.training import Chains, WithAccuracy, small_batches, small_model

BUDGET_FLOPS = 3e8


class FailsAtStep5(Chains):
    """Raises an error when it prepares step 5."""

    def prepare(self, model: LM, step: int) -> Mapping[str, float]:
        if step == 5:
            raise RuntimeError("killed")
        return {}


def run(directory: Path, source: Chains) -> TrainingResult:
    torch.set_num_threads(1)
    return train(
        small_model(), WithAccuracy(), small_batches(source), directory, budget=Budget(max_flops=BUDGET_FLOPS),
        optimizer=OptimizerConfig(lr=0.01), schedule=Schedule("linear", warmup_ratio=0.1), reporter=NullReporter(),
        config=TrainerConfig(save_every=2, precision="fp32"),
    )  # fmt: skip


@pytest.mark.slow
def test_the_run_ends_with_the_step_that_reaches_the_budget(tmp_path: Path) -> None:
    result = run(tmp_path, Chains())
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    counts = [row["flops"] for row in log]
    assert counts[-2] < BUDGET_FLOPS <= counts[-1] == result.flops
    batches, model = small_batches(Chains()), small_model()
    steps = [sum(WithAccuracy().flops(model, b) for b in batches.batches(s)) for s in range(3)]
    assert [row["flops"] for row in log[:3]] == [sum(steps[: n + 1]) for n in range(3)]
    middle = (counts[-3] + counts[-2]) / 2 / BUDGET_FLOPS
    assert log[-2]["rate"] == pytest.approx(0.01 * Schedule("linear", warmup_ratio=0.1).factor(middle))


@pytest.mark.slow
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Chains())
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", FailsAtStep5())
    saved = newest(tmp_path / "killed", print)
    assert saved is not None and saved.state["step"] == 4 and 0 < saved.state["flops"] < BUDGET_FLOPS
    resumed = run(tmp_path / "killed", Chains())
    assert (resumed.step, resumed.flops, resumed.tokens) == (whole.step, whole.flops, whole.tokens)
    last = f"checkpoints/step-{whole.step:06d}"
    one, other = load(tmp_path / "whole" / last), load(tmp_path / "killed" / last)
    assert all(torch.equal(x, other.files["model"][name]) for name, x in one.files["model"].items())


def test_loss_flops_are_those_of_the_supervised_positions() -> None:
    model = small_model()
    [batch] = small_batches(Chains(), accumulate=1).batches(0)
    supervised = int((batch["labels"] != IGNORE).sum())
    assert (
        WithAccuracy().flops(model, batch, forward=0.0)
        == flops.head_flops(model.config, supervised)
        == 6 * supervised * 32 * 40
    )
