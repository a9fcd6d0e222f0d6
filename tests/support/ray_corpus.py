"""Prepare a corpus on a Ray of two CPUs on this machine: `python tests/support/ray_corpus.py FOLDER OUT [--kill WHAT] [--limit SECONDS]`.

FOLDER has text/ and tokenizer/. The session of the process holds all processes of Ray, so that a caller can end them.
"""

from __future__ import annotations

import argparse
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader

from firth.data.datatrove_steps import FirthTokens

TASKS = 3


class KillOnce(PipelineStep):
    """Kills processes at the fifth document of rank 1, the first time.

    Args:
        marker: File that says that it has happened.
        what: "worker": the process of Ray and its child, which runs the task; "parent": that of Ray alone; "task": the child alone.
    """

    name, type = "kill once", "Test"

    def __init__(self, marker: str, what: str) -> None:
        super().__init__()
        self.marker, self.what = marker, what

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Any:
        for number, document in enumerate(data):
            if rank == 1 and number == 5 and not os.path.exists(self.marker):
                with open(self.marker, "w") as file:
                    file.write(self.what)
                self._kill()
            yield document

    def _kill(self) -> None:
        if self.what == "worker":
            os.killpg(os.getppid(), signal.SIGKILL)  # Ray makes each worker the leader of a process group
        os.kill(os.getppid() if self.what == "parent" else os.getpid(), signal.SIGKILL)


def steps(folder: Path, out: Path, *between: PipelineStep) -> list[PipelineStep]:
    """Return the steps that read the text and write the parts."""
    reader = JsonlReader(str(folder / "text"), doc_progress=False)
    return [reader, *between, FirthTokens(str(out), str(folder / "tokenizer"), 0.1)]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--kill", choices=("worker", "parent", "task"))
    parser.add_argument("--limit", type=int, help="seconds of a task")
    args = parser.parse_args()

    import ray
    from datatrove.executor import RayPipelineExecutor

    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as place:  # a short path
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, _temp_dir=place)
        try:
            kill = [KillOnce(str(args.out / "killed"), args.kill)] if args.kill else []
            started = time.monotonic()
            RayPipelineExecutor(
                steps(args.folder, args.out, *kill), tasks=TASKS, workers=2, time=args.limit, mem_per_cpu_gb=0.25,
                logging_dir=str(args.out / "logs"),
            ).run()  # fmt: skip
            print(f"ended after {time.monotonic() - started:.1f} s")
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main()
