"""Run `firth` commands as ranks that are forked from one process, so that torch is imported once for all of them.

    python tests/fork_ranks.py JOBS.json

JOBS.json holds a list of jobs that run one after another: {"name", "world", "arguments", "hook", "seconds"}. `hook` names
a function here that each rank calls with its number before the command. What rank R of a job prints goes to
NAME-R.txt beside JOBS.json, and outcomes.json holds for each job {"codes": exit codes by rank, "seconds"}; a rank that is
still there after `seconds` is killed, and its code is -9.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from firth import cli


def nothing(rank: int) -> None:
    """No hook."""


HOOKS = {hook.__name__: hook for hook in (nothing,)}


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def start(job: dict[str, Any], rank: int, port: int, out: Path) -> int:
    """Fork one rank of a job; its process id. A world of 1 is a plain process that is no rank."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        handle = os.open(out / f"{job['name']}-{rank}.txt", os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        torch.set_num_threads(1)
        if job["world"] > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["world"]),
                           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # fmt: skip
        HOOKS[job.get("hook", "nothing")](rank)
        sys.argv = ["firth", *job["arguments"]]
        code = 0
        cli.main()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    except BaseException:
        traceback.print_exc()
        code = 70
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(job: dict[str, Any], out: Path) -> dict[str, Any]:
    """Run all ranks of a job to their end."""
    port, began = free_port(), time.monotonic()
    waiting = {start(job, rank, port, out): rank for rank in range(job["world"])}
    codes: dict[int, int] = {}
    while waiting:
        for pid, rank in list(waiting.items()):
            if time.monotonic() - began > job.get("seconds", 60):
                os.kill(pid, signal.SIGKILL)
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                codes[rank] = os.waitstatus_to_exitcode(status)
                del waiting[pid]
        time.sleep(0.01)
    return {"codes": [codes[rank] for rank in range(job["world"])], "seconds": time.monotonic() - began}


if __name__ == "__main__":
    jobs = Path(sys.argv[1])
    outcomes = {job["name"]: run(job, jobs.parent) for job in json.loads(jobs.read_text())}
    (jobs.parent / "outcomes.json").write_text(json.dumps(outcomes))
