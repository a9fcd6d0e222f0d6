"""Peak memory of a process that trains a decoder of 100 M parameters, by number of processes and way of sharding.

    python -m bench.speed.shard            # three minutes; needs 8 GB

Each row is a run of torchrun on this machine: fp32, AdamW, three steps of 8 rows of 64 tokens over all processes. A process counts
its own peak resident size from the moment before the model is built, less its size then (Python, PyTorch). Weights, gradients
and two moments take 16 bytes per parameter without sharding. "Built" is the peak while the model is built and initialized,
before the first step. Two more peaks are counted afterwards, beyond the size of the process then: of a validation, which runs
on the shards, and of gathering the whole model, as for rollouts, samples and tasks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from bench.harness import cpu_name, reset_peak, resident
from firth.data.collate import collate
from firth.model.config import decoder_config
from firth.model.init import record_init
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.training.distributed import DistributedConfig, Parallel, Replicas, join
from firth.training.optimizer import Optimizer, OptimizerConfig
from firth.training.step import SINGLE, step, validate

RUNS = [(1, "none"), (2, "none"), (2, "full"), (4, "none"), (4, "full")]
"""(processes, way of `distributed.shard`)"""

CONFIG = decoder_config(vocab_size=16384, hidden_size=768, num_layers=12, num_heads=12, max_positions=64)
ROWS, TOKENS, STEPS = 8, 64, 3


def train(way: str, out: Path) -> None:
    """Train on this rank and write its peaks."""
    torch.set_num_threads(1)
    ranks = join()
    from firth.training.sharding import Shards

    degree = DistributedConfig(way).degree(ranks)  # type: ignore[arg-type]
    ranks.sum(torch.zeros(1))
    start = resident("VmRSS")
    reset_peak()
    torch.manual_seed(0)
    objective = CausalLM()
    with record_init() if degree > 1 else nullcontext() as record:
        model = LM(CONFIG, objective.heads(CONFIG))
    count = sum(p.numel() for p in model.parameters())
    shards = Shards(model, ranks, degree, torch.device("cpu"), record=record) if degree > 1 else None
    built = resident("VmHWM") - start
    optimizer = Optimizer(OptimizerConfig("adamw", lr=1e-4), model, ranks=ranks, shards=shards)
    replicas = Replicas(optimizer.parameters, ranks) if ranks.world > 1 else Parallel()
    rows = range(ROWS * ranks.rank // ranks.world, ROWS * (ranks.rank + 1) // ranks.world)
    tokens = torch.randint(0, CONFIG.vocab_size, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(1)).numpy()
    batch = collate([{"tokens": tokens[i, :-1], "labels": tokens[i, 1:]} for i in rows])
    losses = []
    for _ in range(STEPS):
        losses.append(float(step(model, objective, [batch], ranks.sum, parallel=shards or replicas)["tokens"]))
        optimizer.clip_grad_norm()
        optimizer.step(1.0)
    peak = resident("VmHWM") - start
    model.eval()

    def beyond(work: Callable[[], object]) -> int:
        before = resident("VmRSS")
        reset_peak()
        work()
        return resident("VmHWM") - before

    @torch.no_grad()
    def gather() -> None:
        with model.whole():
            objective.loss(model, objective.forward(model, batch), batch)

    validated = beyond(lambda: validate(model, objective, [batch], reduce=ranks.sum, parallel=shards or SINGLE))
    gathered = beyond(gather)
    freed = resident("VmRSS") - start
    found = {
        "parameters": count, "built": built, "peak": peak, "losses": losses, "validated": validated, "gathered": gathered, "after": freed,
    }  # fmt: skip
    (out / f"{ranks.rank}.json").write_text(json.dumps(found))
    ranks.wait()
    if ranks.world > 1:
        torch.distributed.destroy_process_group()


def main() -> None:
    columns = (
        "processes",
        "distributed.shard",
        "peak MB of a process",
        "while built",
        "16 bytes per weight",
        "loss of step 3",
        "validation",
        "gathered",
        "afterwards",
    )
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for world, way in RUNS:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()}
            subprocess.run(
                [*command, "-m", "bench.speed.shard", way, folder],
                check=True,
                env=environment,
                stderr=subprocess.DEVNULL,
            )
            ranks = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
        names = ("peak", "built", "validated", "gathered", "after")
        peak, built, *rest = (max(rank[name] for rank in ranks) / 1e6 for name in names)
        held = 16 * ranks[0]["parameters"] / 1e6 / (world if way == "full" else 1)
        print(
            f"| {world} | {way} | {peak:,.0f} | {built:,.0f} | {held:,.0f} | {ranks[0]['losses'][-1]:.5f} | "
            + " | ".join(f"{size:,.0f}" for size in rest)
            + " |",
            flush=True,
        )
    print(f"\n{ranks[0]['parameters']:,} parameters. {cpu_name()}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        train(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
