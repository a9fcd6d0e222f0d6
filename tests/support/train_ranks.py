"""What every rank runs in `test_train_distributed`; started by torchrun, or as a single process for the reference.

torchrun --nproc-per-node 2 tests/support/train_ranks.py OUT
"""

from __future__ import annotations

import copy
import json
import random
import sys
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import torch
from safetensors.torch import save_file
from torch import Tensor

from firth.align.advantages import GAE, AdvantageEstimator, GroupNormalized, LeaveOneOut
from firth.align.rewards import FunctionReward
from firth.align.rollouts import RolloutsConfig, RolloutSource
from firth.data.collate import Batches
from firth.model.config import decoder_config
from firth.model.model import LM
from firth.model.shard_tensors import gathered
from firth.objectives.objective import Objective
from firth.objectives.policy_gradient import GRPO, PPO, RLOO
from firth.training import muon, trainer
from firth.training.checkpoint import load
from firth.training.distributed import Parallel, Ranks, Replicas, join
from firth.training.logging import NullReporter
from firth.training.optimizer import OptimizerConfig
from firth.training.schedule import Budget, Schedule
from firth.training.sharding import Shards
from firth.training.step import SINGLE, step, validate
from firth.training.trainer import TrainerConfig, TrainingResult, train
from firth.types import Batch, Outputs
from tests.support.byte_tokenizer import ByteTokenizer
from tests.support.training import Chains, WithAccuracy, small_batches, small_model


class NanOnRank1(WithAccuracy):
    """The second loss on rank 1 is NaN."""

    calls = 0
    rank = 0

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        terms = super().loss(model, outputs, batch)
        type(self).calls += 1
        if type(self).calls == 2 and self.rank == 1:
            terms["tokens"] = terms["tokens"] / 0
        return terms


class InfiniteGradientOnRank1(NanOnRank1):
    """The second loss on rank 1 is finite, and its gradient infinite."""

    calls = 0

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        terms = WithAccuracy.loss(self, model, outputs, batch)
        type(self).calls += 1
        if type(self).calls == 2 and self.rank == self.bad_rank:
            terms["tokens"].register_hook(lambda gradient: gradient * float("inf"))
        return terms

    bad_rank = 1


def short_run(
    directory: Path, ranks: Ranks, model: LM, steps: int, objective: WithAccuracy, accumulate: int,
    optimizer: Literal["adamw", "muon"] = "adamw", shards: Shards | None = None,
) -> TrainingResult:  # fmt: skip
    def evaluate(model: LM, _: int) -> dict[str, float]:
        batches = small_batches(Chains(), rank=ranks.rank, world=ranks.world).all_batches()
        filler = [] if shards is None else small_batches(Chains(), rank=ranks.rank, world=ranks.world).filler()
        return validate(model, objective, batches, reduce=ranks.sum, parallel=shards or SINGLE, filler=filler)

    return train(
        model, objective, small_batches(Chains(), accumulate, ranks.rank, ranks.world), directory,
        budget=Budget(max_steps=steps), optimizer=OptimizerConfig(optimizer, lr=1e-3), schedule=Schedule("constant", warmup_ratio=0.0),
        config=TrainerConfig(save_every=0, precision="fp32"), evaluate=evaluate, ranks=ranks, reporter=NullReporter(), shards=shards,
    )  # fmt: skip


def deferred_skips(out: Path, ranks: Ranks) -> dict[str, list[float]]:
    """Return skipped steps, steps of AdamW, and the largest difference of a weight to a run that reads every step.

    Three steps, of which the second has an infinite gradient on rank 1, for each optimizer, with copies of the model and with shards.
    """
    found: dict[str, list[float]] = {}
    ways = ("copies", "shards") if ranks.world > 1 else ("copies",)
    for way in ways:
        for name in ("adamw", "muon"):
            weights = []
            for deferred in (False, True):
                InfiniteGradientOnRank1.calls, InfiniteGradientOnRank1.rank = 0, ranks.rank
                InfiniteGradientOnRank1.bad_rank = ranks.world - 1
                model = small_model(dropout=0.0)
                shards = Shards(model, ranks, ranks.world, torch.device("cpu")) if way == "shards" else None
                directory = out / f"{way}-{name}-{deferred}"
                with patch.object(trainer, "defers_reads", lambda device, deferred=deferred: deferred):
                    result = short_run(directory, ranks, model, 3, InfiniteGradientOnRank1(), 1, name, shards)  # type: ignore[arg-type]
                weights.append(torch.cat([gathered(p).detach().flatten() for p in model.parameters()]))
            saved = load(directory / "checkpoints" / "step-000003").files["optimizer"]
            steps = {x.item() for key, x in saved.items() if key.startswith("step/")}
            found[f"{way} {name}"] = [result.skipped, *steps, (weights[0] - weights[1]).abs().max().item()]
    return found


def parallel(model: torch.nn.Module, ranks: Ranks) -> Parallel:
    """Return what sums the gradients of a model over the ranks."""
    return Replicas(list(model.parameters()), ranks) if ranks.world > 1 else Parallel()


def rollout_gradients(out: Path, ranks: Ranks, accumulate: int) -> None:
    """Write NAME.safetensors with the rollouts and the gradient of a step on them, for each policy-gradient objective."""
    tokenizer = ByteTokenizer()
    config = decoder_config(
        vocab_size=tokenizer.vocab.size, hidden_size=16, num_layers=1, num_heads=2, max_positions=32
    )
    prompts = [tokenizer.encode(text) for text in ("a", "bcd", "ef", "ghij")]
    objectives: dict[str, tuple[Objective, AdvantageEstimator]] = {
        "ppo": (PPO(), GAE()), "grpo": (GRPO(loss_type="grpo"), GroupNormalized()), "rloo": (RLOO(), LeaveOneOut()),
    }  # fmt: skip
    for name, (objective, estimator) in objectives.items():
        torch.manual_seed(3)
        model = LM(config, objective.heads(config))
        source = RolloutSource(
            prompts, tokenizer, FunctionReward(lambda text: float(text.count("e") + len(text) % 3)), copy.deepcopy(model),  # type: ignore[arg-type]
            config=RolloutsConfig(rollout_size=16, num_generations=4, max_new_tokens=7), steps=1, stops=list(range(7, 30)),
            advantage_estimator=estimator, seed=2, ranks=ranks,
        )  # fmt: skip
        source.prepare(model, 0)
        batches = Batches(
            source, objective, tokenizer.vocab, batch_size=16, seed=0, gradient_accumulation_steps=accumulate, rank=ranks.rank,
            world=ranks.world,
        )  # fmt: skip
        step(model, objective, batches.batches(0), ranks.sum, parallel=parallel(model, ranks))
        found = {f"gradient {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}
        found |= {f"rollout {n}": torch.from_numpy(x) for n, x in source.state().items()}
        if ranks.first:
            save_file(found, out / f"{name}.safetensors")


def random_rewards(ranks: Ranks) -> dict[str, float]:
    """Return how often all ranks call a random reward for 13 answers, and the most that two ranks differ in what they train on."""
    tokenizer, rng, calls = ByteTokenizer(), random.Random(ranks.rank), 0

    def reward(text: str) -> float:
        nonlocal calls
        calls += 1
        return rng.random()

    config = decoder_config(
        vocab_size=tokenizer.vocab.size, hidden_size=16, num_layers=1, num_heads=2, max_positions=32
    )
    torch.manual_seed(3)
    model = LM(config, RLOO().heads(config))
    source = RolloutSource(
        [tokenizer.encode("a")], tokenizer, FunctionReward(reward), copy.deepcopy(model), steps=1, ranks=ranks, seed=2,  # type: ignore[arg-type]
        config=RolloutsConfig(rollout_size=13, max_new_tokens=5), stops=list(range(7, 30)),
    )  # fmt: skip
    source.prepare(model, 0)
    found = ranks.gather(torch.from_numpy(source.state()["per_token"]))
    return {
        "reward_calls": ranks.sum(torch.tensor([calls])).item(),
        "advantage_difference": (found - found[0]).abs().max().item(),
    }


def run_all(out: Path, ranks: Ranks, accumulate: int) -> None:
    """Write gradients.safetensors, results.json and the run directories into `out`."""
    torch.set_num_threads(1)
    model, objective = small_model(dropout=0.0), WithAccuracy()
    batches = small_batches(Chains(), accumulate, ranks.rank, ranks.world).batches(0)
    means = step(model, objective, batches, ranks.sum, parallel=parallel(model, ranks))
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if ranks.first:
        save_file(gradients, out / "gradients.safetensors")

    rollout_gradients(out, ranks, accumulate)
    plain = short_run(out / "plain", ranks, small_model(dropout=0.0), 5, objective, accumulate)

    NanOnRank1.rank = ranks.rank
    nan_model = small_model(dropout=0.0)
    with_nan = short_run(out / "nan", ranks, nan_model, 3, NanOnRank1(), 1)
    flat = torch.cat([p.detach().flatten() for p in nan_model.parameters()])
    gathered = ranks.gather(flat)

    # One parameter that rank 1 does not use and one that no rank uses, in a bucket with one that all use.
    used, unused, common = (
        torch.nn.Parameter(torch.ones(3)),
        torch.nn.Parameter(torch.ones(2)),
        torch.nn.Parameter(torch.ones(1)),
    )
    loss = (2 * used).sum() + common.sum() if ranks.first else common.sum()
    parallel(torch.nn.ParameterList([used, unused, common]), ranks).backward(loss, last=True)

    late = deferred_skips(out, ranks)
    rewarded = random_rewards(ranks)
    matrices = torch.randn(5, 8, 24, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    dealt = ranks.dealt(muon.orthogonalize, matrices)
    muon_difference = (dealt.float() - muon.orthogonalize(matrices).float()).abs().max()

    whole, resumed = (small_model(dropout=0.3) for _ in range(2))
    torch.manual_seed(1)
    short_run(out / "whole", ranks, whole, 6, objective, accumulate)
    torch.manual_seed(1)
    short_run(out / "resumed", ranks, resumed, 3, objective, accumulate)
    torch.manual_seed(99)
    short_run(out / "resumed", ranks, small_model(dropout=0.3, seed=5), 6, objective, accumulate)
    if ranks.first:
        results = {
            "step": {k: v.item() for k, v in means.items()}, "trained": plain.metrics, "tokens": plain.tokens,
            "skipped": with_nan.skipped, "max_difference": (gathered - gathered[0]).abs().max().item(),
            "finite": bool(torch.isfinite(flat).all()), "used": used.grad.tolist(), "unused": unused.grad is None,
            "muon_difference": muon_difference.item(), "late": late,
        } | rewarded  # fmt: skip
        (out / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    run_all(Path(sys.argv[1]), join(), accumulate=2)
    torch.distributed.destroy_process_group()
