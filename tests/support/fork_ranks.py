"""Run `firth` commands as ranks that are forked from one process, so that torch is imported only once.

    python tests/support/fork_ranks.py JOBS.json

JOBS.json holds a list of jobs that run one after another: {"name", "world", "arguments", "hook", "env", "patience"}. `hook` names
a function here that each rank calls with its rank before the command; `env` is added to the environment. The output of rank R
goes to NAME-R.txt in the directory of JOBS.json, and outcomes.json has {"codes": exit codes by rank, "seconds"} of each job.
After a rank has failed, the others have `patience` seconds to end; then they are killed, and their code is -9.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # an optimizer imports it, which takes seconds in every rank otherwise
import torch.distributed as dist

import firth.runs.run as run_module
from firth import cli
from firth.align.rollouts import RolloutSource
from firth.io import integrity
from firth.model.model import LM
from firth.objectives.causal_lm import CausalLM
from firth.training import checkpoint, sharded_checkpoint, trainer
from firth.training.sharding import Shards
from firth.types import UserError

PATIENCE_SECONDS = 8.0


def nothing(rank: int) -> None:
    """No hook."""


def slow_first(rank: int) -> None:
    """Rank 0 prepares its tokenizer for longer than the process group's timeout."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    make = run_module.tokenizer_of

    def slowly(*arguments: Any) -> Any:
        time.sleep(4.5 if rank == 0 else 0)
        return make(*arguments)

    run_module.tokenizer_of = slowly


def failing_first(rank: int) -> None:
    """Rank 0 fails while it prepares its tokenizer."""

    def fail(*_: Any) -> Any:
        raise UserError("this is not a text file")

    if rank == 0:
        run_module.tokenizer_of = fail


def stopped_second(rank: int) -> None:
    """Rank 1 is stopped after its first step, as by SIGSTOP from outside."""
    step = trainer._Run._step

    def stop(run: Any, *arguments: Any) -> Any:
        if rank == 1 and run.state.step == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        return step(run, *arguments)

    trainer._Run._step = stop  # type: ignore[method-assign]


def killed_in_save(rank: int) -> None:
    """Rank 0 is killed in the middle of a file of its second checkpoint."""
    write = checkpoint._write

    def write_half(path: Path, blocks: Any) -> Any:
        if rank == 0 and path.parent.name == "step-000002.partial" and path.name == "optimizer.safetensors":
            path.write_bytes(b"".join(blocks)[:1000])
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, blocks)

    checkpoint._write = write_half


def killed_in_shards(rank: int) -> None:
    """Rank 1 is killed when the parts of the second checkpoint are written, before their hashes are."""
    gather = sharded_checkpoint._gather_digests

    def gather_or_die(directory: Path, ranks: Any) -> Any:
        if rank == 1 and directory.parent.name == "step-000002.partial":
            os.kill(os.getpid(), signal.SIGKILL)
        return gather(directory, ranks)

    sharded_checkpoint._gather_digests = gather_or_die


def failing_source(rank: int) -> None:
    """The source of rank 1 fails after the rollouts of the second step, which the other rank has."""
    prepare = RolloutSource.prepare

    def prepare_or_fail(source: RolloutSource, model: LM, step: int) -> Any:
        found = prepare(source, model, step)
        if rank == 1 and step == 1:
            raise UserError("this rank has no more memory")
        return found

    RolloutSource.prepare = prepare_or_fail  # type: ignore[method-assign]


def failing_pass(rank: int) -> None:
    """The second loss of rank 1 fails, while the other rank waits for its shards."""
    loss, calls = CausalLM.loss, 0

    def loss_or_fail(objective: CausalLM, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 2:
            raise UserError("this rank has failed in its step")
        return loss(objective, *arguments)

    CausalLM.loss = loss_or_fail  # type: ignore[method-assign]


def count_gathers(rank: int) -> None:
    """Print how often the whole model is gathered before and until the end of training, and which files are hashed."""
    whole, train, calls, digest = Shards.whole, trainer.train, 0, hashlib.file_digest

    def printed(file: Any, name: str) -> Any:
        print(f"hashed {file.name}")
        return digest(file, name)

    hashlib.file_digest = printed  # type: ignore[assignment]
    integrity.SETTLED_SECONDS = 0.0

    def counted(shards: Shards) -> Any:
        nonlocal calls
        calls += 1
        return whole(shards)

    def train_after_print(model: LM, *arguments: Any, **options: Any) -> Any:
        print(f"gathered {calls} times before training")
        result = train(model, *arguments, **options)
        print(f"gathered {calls} times in all")
        return result

    Shards.whole = counted  # type: ignore[method-assign]
    trainer.train = train_after_print


def deferred(rank: int) -> None:
    """The host reads no step, as on a GPU."""
    trainer.defers_reads = lambda device: True


def deferred_nan(rank: int) -> None:
    """The host reads no step, and the third and fourth loss of rank 1 are NaN."""
    deferred(rank)
    loss, calls = CausalLM.loss, 0

    def loss_or_nan(objective: CausalLM, model: LM, *arguments: Any) -> Any:
        nonlocal calls
        terms = loss(objective, model, *arguments)
        calls += model.training
        if rank == 1 and model.training and calls in (3, 4):
            terms["tokens"] = terms["tokens"] * float("nan")
        return terms

    CausalLM.loss = loss_or_nan  # type: ignore[method-assign]


def deferred_interrupt(rank: int) -> None:
    """The host reads no step, and rank 1 gets Ctrl-C before the sixth."""
    deferred(rank)
    step = trainer._Run._step

    def interrupted(run: Any, *arguments: Any) -> Any:
        if rank == 1 and run.state.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(run, *arguments)

    trainer._Run._step = interrupted  # type: ignore[method-assign]


def full_disk(rank: int) -> None:
    """Rank 1 cannot write its parts of the checkpoint of step 8."""
    write = sharded_checkpoint.write

    def limited(place: Path, tensors: Any, ranks: Any) -> Any:
        if rank == 1 and place.name == "step-000008.partial":
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        return write(place, tensors, ranks)

    sharded_checkpoint.write = limited


HOOKS = {
    hook.__name__: hook
    for hook in (
        nothing,
        slow_first,
        failing_first,
        stopped_second,
        killed_in_save,
        killed_in_shards,
        failing_source,
        failing_pass,
        count_gathers,
        deferred,
        deferred_nan,
        deferred_interrupt,
        full_disk,
    )
}


def free_port() -> int:
    """Return an unused TCP port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def start(job: dict[str, Any], rank: int, port: int, out: Path) -> int:
    """Fork one rank of a job and return its process id. A world of 1 is a process without a process group."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()  # in a shell's process group, a stopped rank would be continued when another one ends
        handle = os.open(out / f"{job['name']}-{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        torch.set_num_threads(1)
        if job["world"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["world"]),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | job.get("env", {})  # fmt: skip
        HOOKS[job.get("hook", "nothing")](rank)
        sys.argv = ["firth", *job["arguments"]]
        code = 0
        cli.main()
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 70
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run all ranks of a job until they end."""
    port, start_time = free_port(), time.monotonic()
    waiting = {start(job, rank, port, out): rank for rank in range(job["world"])}
    codes: dict[int, int] = {}
    failed = float("inf")
    while waiting:
        for pid, rank in list(waiting.items()):
            if time.monotonic() - failed > job.get("patience", PATIENCE_SECONDS):
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[rank] = os.waitstatus_to_exitcode(status)
                failed = min(failed, time.monotonic()) if codes[rank] else failed
                del waiting[pid]
        time.sleep(0.01)
    return {"codes": [codes[rank] for rank in range(job["world"])], "seconds": time.monotonic() - start_time}


if __name__ == "__main__":
    jobs = Path(sys.argv[1])
    outcomes = {job["name"]: run(job, jobs.parent) for job in json.loads(jobs.read_text())}
    (jobs.parent / "outcomes.json").write_text(json.dumps(outcomes))
