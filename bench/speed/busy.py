"""Training steps per second on a quiet machine and with one busy process, by wait policy of OpenMP's threads.

    python -m bench.speed.busy                              # every policy
    python -m bench.speed.busy --recipe roberta             # another tiny recipe
    python -m bench.speed.busy --only default firth --rounds 9

Each policy is a process of its own that trains a tiny recipe with `firth.training.trainer.train`. They run in turns, and each
round has a quiet half and a half with a Python process that spins forever. The policies are environment variables, which
OpenMP reads when it is loaded: `default` is libgomp's default, `firth` is what firth sets.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

from bench.harness import EndSample, Sample, Worker, cpu_name, progress
from firth import openmp

SPINS = (1000, 2000, 10_000, 20_000, 50_000, 100_000)

POLICIES: dict[str, dict[str, str]] = {
    "default": {"GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"},
    **{f"{n} spins": {"GOMP_SPINCOUNT": str(n)} for n in SPINS},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
    "firth": {},
}
"""Name of a policy -> the environment variables of its process."""

VARIABLES = frozenset({"OMP_NUM_THREADS", *openmp.GNU_VARIABLES, *openmp.LLVM_VARIABLES})
"""Variables that a process gets from its policy alone."""

STEPS_PER_SAMPLE = 10
"""Steps per sample."""


def candidate(end_sample: EndSample, recipe: str) -> None:
    """Train a tiny recipe; a sample is STEPS_PER_SAMPLE steps."""
    from bench.speed.causal import firth_run
    from bench.speed.objectives import prepare
    from firth.model.model import LM

    resolved, objective, batches = prepare(recipe)
    assert resolved.model is not None
    model = LM(resolved.model, objective.heads(resolved.model))
    firth_run(end_sample, "muon", lambda _: STEPS_PER_SAMPLE, (model, objective, batches), STEPS_PER_SAMPLE)


@contextmanager
def environment(policy: Mapping[str, str]) -> Iterator[None]:
    """Set the environment of processes started inside."""
    before = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    os.environ.update(policy)
    try:
        yield
    finally:
        for name in policy:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def background_load() -> Iterator[None]:
    """Run another process that always computes."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.1)
        yield
    finally:
        process.kill()
        process.wait()


def table(quiet: Mapping[str, list[float]], loaded: Mapping[str, list[float]]) -> str:
    """Return a Markdown table of median steps per second in both halves, and their ratio to the first policy, quiet."""
    baseline = statistics.median(quiet[next(iter(quiet))])
    lines = [
        "| wait policy | quiet, steps/s | of the default | with one busy process, steps/s | of the default, quiet |",
        "|---|---|---|---|---|",
    ]
    for name in quiet:
        cells = [
            f"{statistics.median(rates):.1f} | {statistics.median(rates) / baseline:.0%}"
            for rates in (quiet[name], loaded[name])
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=list(POLICIES), help="a subset of the policies")
    parser.add_argument("--recipe", default="gpt", help="a recipe with a tiny size")
    args = parser.parse_args()
    names = list(args.only or POLICIES)
    workers: dict[str, Worker] = {}
    quiet: dict[str, list[float]] = {name: [] for name in names}
    loaded: dict[str, list[float]] = {name: [] for name in names}
    noisy = 0
    try:
        for name in names:
            with environment(POLICIES[name]):
                workers[name] = Worker(name, partial(candidate, recipe=args.recipe))
            workers[name].measure()
        for number in range(args.rounds):
            order = names[number % len(names) :] + names[: number % len(names)]
            samples: dict[str, Sample] = {name: workers[name].measure() for name in order}
            for name, sample in samples.items():
                noisy += sample.noisy
                if not sample.noisy:
                    quiet[name].append(sample.rate)
            progress(f"round {number + 1}/{args.rounds}, quiet", samples)
            with background_load():
                samples = {name: workers[name].measure() for name in order}
            for name, sample in samples.items():
                loaded[name].append(sample.rate)
            progress(f"round {number + 1}/{args.rounds}, busy", samples)
    finally:
        for worker in workers.values():
            worker.stop()
    if not all(quiet.values()):
        sys.exit("A policy has no clean sample: other processes used the machine.")
    print(table(quiet, loaded))
    print(
        f"\n{args.recipe}, {args.rounds} rounds, {noisy} noisy quiet samples discarded; {cpu_name()}, {os.cpu_count()} cores."
    )


if __name__ == "__main__":
    main()
