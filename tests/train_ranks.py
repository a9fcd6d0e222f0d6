"""What every rank does in `test_train_distributed`; started by torchrun, or alone for the reference.

torchrun --nproc-per-node 2 tests/train_ranks.py OUT
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from train_room import Chains, Scored, small_batches, small_model

from firth.model.model import LM
from firth.train.distributed import Ranks, join
from firth.train.logging import NullReporter
from firth.train.optimizer import OptimizerConfig
from firth.train.schedule import Budget, Schedule
from firth.train.step import step
from firth.train.trainer import TrainerConfig, TrainingResult, train
from firth.train.validate import validate
from firth.types import Batch, Outputs


class Broken(Scored):
    """On rank 1 the second loss is not a number."""

    calls = 0
    rank = 0

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(model, outputs, batch)
        type(self).calls += 1
        if type(self).calls == 2 and self.rank == 1:
            terms["tokens"] = terms["tokens"] / 0
        return terms


def short_run(
    directory: Path, ranks: Ranks, model: LM, steps: int, objective: Scored, accumulate: int
) -> TrainingResult:
    def held_out(model: LM, _: int) -> dict[str, float]:
        batches = small_batches(Chains(), rank=ranks.rank, world=ranks.world).all_batches()
        return validate(model, objective, batches, reduce=ranks.sum)

    return train(
        model, objective, small_batches(Chains(), accumulate, ranks.rank, ranks.world), directory,
        budget=Budget(max_steps=steps), optimizer=OptimizerConfig("adamw", lr=1e-3), schedule=Schedule("constant", warmup_ratio=0.0),
        config=TrainerConfig(save_every=0, precision="fp32"), evaluate=held_out, ranks=ranks, reporter=NullReporter(),
    )  # fmt: skip


def everything(out: Path, ranks: Ranks, accumulate: int) -> None:
    """Writes gradients.safetensors and facts.json; the runs' own directories are beside them."""
    torch.set_num_threads(1)
    model, objective = small_model(dropout=0.0), Scored()
    parameters = list(model.parameters())
    means = step(model, objective, small_batches(Chains(), accumulate, ranks.rank, ranks.world).batches(0), ranks.sum)
    ranks.sum_gradients(parameters)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if ranks.first:
        save_file(gradients, out / "gradients.safetensors")

    ended = short_run(out / "plain", ranks, small_model(dropout=0.0), 5, objective, accumulate)

    Broken.rank = ranks.rank
    broken_model = small_model(dropout=0.0)
    broken = short_run(out / "broken", ranks, broken_model, 3, Broken(), 1)
    flat = torch.cat([p.detach().flatten() for p in broken_model.parameters()])
    every = ranks.gather(flat)

    # One table that rank 1 never uses and one that nobody does.
    used, unused = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2))
    if ranks.first:
        used.grad = torch.full((3,), 2.0)
    ranks.sum_gradients([used, unused])

    whole, parts = (small_model(dropout=0.3) for _ in range(2))
    torch.manual_seed(1)
    short_run(out / "whole", ranks, whole, 6, objective, accumulate)
    torch.manual_seed(1)
    short_run(out / "parts", ranks, parts, 3, objective, accumulate)
    torch.manual_seed(99)
    short_run(out / "parts", ranks, small_model(dropout=0.3, seed=5), 6, objective, accumulate)
    if ranks.first:
        facts = {
            "step": {k: v.item() for k, v in means.items()}, "trained": ended.metrics, "tokens": ended.tokens,
            "skipped": broken.skipped, "apart": (every - every[0]).abs().max().item(),
            "finite": bool(torch.isfinite(flat).all()), "used": used.grad.tolist(), "unused": unused.grad is None,
        }  # fmt: skip
        (out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    everything(Path(sys.argv[1]), join(), accumulate=2)
    torch.distributed.destroy_process_group()
