"""Save and load sharded checkpoints; started by torchrun.

torchrun --nproc-per-node 2 tests/support/shard_checkpoints.py save OUT
torchrun --nproc-per-node 3 tests/support/shard_checkpoints.py load OUT FROM
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from firth.model.model import LM
from firth.training import checkpoint, sharded_checkpoint
from firth.training.distributed import Ranks, join
from firth.training.logging import NullReporter
from firth.training.optimizer import Optimizer, OptimizerConfig
from firth.training.schedule import Budget, Schedule
from firth.training.sharding import Shards
from firth.training.step import validate
from firth.training.trainer import TrainerConfig, train
from tests.support.training import Chains, WithAccuracy, small_batches, small_model

OPTIMIZER = OptimizerConfig(lr=0.01)
STEPS = 6


def sharded_model(ranks: Ranks, seed: int = 0) -> tuple[LM, Shards]:
    model = small_model(dropout=0.3, seed=seed)
    return model, Shards(model, ranks, ranks.world, torch.device("cpu"))


def run(directory: Path, ranks: Ranks, steps: int, seed: int = 0) -> None:
    """Train to a step with Muon and AdamW, dropout and validation, and save every third step."""
    torch.manual_seed(seed)
    model, shards = sharded_model(ranks, seed)

    def evaluate(model: LM, _: int) -> dict[str, float]:
        batches = small_batches(Chains(), 2, ranks.rank, ranks.world)
        return validate(
            model, WithAccuracy(), batches.all_batches(), reduce=ranks.sum, parallel=shards, filler=batches.filler()
        )

    train(
        model, WithAccuracy(), small_batches(Chains(), 2, ranks.rank, ranks.world), directory, budget=Budget(max_steps=steps),
        optimizer=OPTIMIZER, schedule=Schedule("constant", warmup_ratio=0.0), evaluate=evaluate, ranks=ranks, shards=shards,
        config=TrainerConfig(save_every=3, keep=9, precision="fp32", eval_every=2), recipe="r", reporter=NullReporter(),
    )  # fmt: skip


def save(out: Path, ranks: Ranks) -> None:
    """Train without and with an interruption, and try to save what is no tensor."""
    run(out / "whole", ranks, STEPS)
    run(out / "resumed", ranks, STEPS // 2)
    run(out / "resumed", ranks, STEPS, seed=5)
    model, _ = sharded_model(ranks)
    for wrong in (3, torch.ones(2)):
        message = ""
        try:
            sharded_checkpoint.write(out / "wrong", {"model/x": model.tokens.weight, "step": wrong}, ranks)  # type: ignore[dict-item]
        except TypeError as error:
            message = str(error)
        assert "step is not sharded" in message
    assert not (out / "wrong").exists()


def load(out: Path, source: Path, ranks: Ranks) -> None:
    """Restore the last checkpoint of a run, and save it again as it is."""
    model, shards = sharded_model(ranks, seed=9)
    optimizer = Optimizer(OPTIMIZER, model, shards=shards)
    saved = checkpoint.newest(source, print, ranks)
    assert saved is not None
    state = checkpoint.restore(saved, model, optimizer, Chains(), ranks, {})
    checkpoint.save_state(
        out, state, model, optimizer, Chains(), ranks, recipe="r", keep=9, score=None, frozen={}, shards=ranks.world
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    group = join()
    if sys.argv[1] == "save":
        save(Path(sys.argv[2]), group)
    else:
        load(Path(sys.argv[2]), Path(sys.argv[3]), group)
    torch.distributed.destroy_process_group()
