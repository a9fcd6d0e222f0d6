"""Prepare a corpus with datatrove on this machine, on Ray or on Slurm; run it again to resume.

    firth tokenizer train SAMPLE --out tokenizer
    python examples/cluster/prepare.py text/ corpus/ tokenizer/ --on local --tasks 8 --workers 4
    python examples/cluster/prepare.py text/ corpus/ tokenizer/ --on ray --tasks 64         # in a Ray job
    python examples/cluster/prepare.py text/ corpus/ tokenizer/ --on slurm --tasks 64 --partition cpu

The text is JSONL with a field "text". The two filters are an example: datatrove has language models (name a local file), quality filters,
MinHash deduplication and removal of personal data, which go to the same place.
"""

from __future__ import annotations

import argparse
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.filters import LambdaFilter
from datatrove.pipeline.readers import JsonlReader

from firth.data.datatrove_steps import FirthManifest, FirthTokens


def long_enough(document: Any) -> bool:
    """Keep documents of 200 characters or more."""
    return len(document.text) >= 200


def not_a_list(document: Any) -> bool:
    """Drop documents in which most lines are shorter than 20 characters."""
    lines = document.text.splitlines()
    return sum(len(line) < 20 for line in lines) <= len(lines) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", help="a directory of JSONL files, plain or compressed")
    parser.add_argument("out", help="the directory of the corpus, which all machines see")
    parser.add_argument("tokenizer", help="the directory of the tokenizer, which all machines see")
    parser.add_argument("--on", choices=("local", "ray", "slurm"), default="local")
    parser.add_argument("--tasks", type=int, default=8, help="parts of the corpus")
    parser.add_argument("--workers", type=int, default=-1, help="tasks at a time")
    parser.add_argument("--partition", default="cpu", help="partition of Slurm")
    parser.add_argument("--time", default="24:00:00", help="time limit of a task on Ray or Slurm")
    args = parser.parse_args()

    steps = [
        JsonlReader(args.text), LambdaFilter(long_enough), LambdaFilter(not_a_list), FirthTokens(args.out, args.tokenizer),
    ]  # fmt: skip
    last = [FirthManifest(args.out, args.tokenizer, args.tasks)]
    logs = f"{args.out}/logs"
    if args.on == "slurm":
        limits = {"time": args.time, "partition": args.partition}
        tokens = SlurmPipelineExecutor(
            steps, tasks=args.tasks, workers=args.workers, logging_dir=f"{logs}/tokens", **limits
        )
        SlurmPipelineExecutor(last, tasks=1, logging_dir=f"{logs}/manifest", depends=tokens, **limits).run()
        return
    options = {"tasks": args.tasks, "workers": args.workers, "logging_dir": f"{logs}/tokens"}
    if args.on == "ray":
        hours, minutes, seconds = map(int, args.time.split(":"))
        RayPipelineExecutor(steps, **options, time=3600 * hours + 60 * minutes + seconds).run()
    else:
        LocalPipelineExecutor(steps, **options).run()
    LocalPipelineExecutor(last, logging_dir=f"{logs}/manifest").run()


if __name__ == "__main__":
    main()
