"""Training steps per second on a quiet machine and beside one busy process, for ways in which OpenMP's threads wait.

    python -m bench.busy                              # every policy
    python -m bench.busy --recipe roberta             # another tiny recipe
    python -m bench.busy --only default firth --rounds 9

Each policy is a process of its own that trains a tiny recipe by `firth.train.trainer.train`. They work in turns, and each round
has a quiet half and a half beside a Python process that spins for ever. The policies are environment variables, which
OpenMP reads when it is loaded: `default` is what libgomp does by itself, `firth` is what firth sets.
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
"""What a process inherits from nobody but its policy."""

STEPS_PER_SAMPLE = 10
"""Steps in a turn."""


def candidate(end_sample: EndSample, recipe: str) -> None:
    """Train a tiny recipe; the turn ends after SHARE steps."""
    from bench.causal import firth_run
    from bench.objectives import prepared
    from firth.model.model import LM

    plan, objective, batches = prepared(recipe)
    assert plan.model is not None
    firth_run(end_sample, "muon", lambda _: STEPS_PER_SAMPLE, (LM(plan.model, objective.heads(plan.model)), objective, batches), STEPS_PER_SAMPLE)


@contextmanager
def environment(policy: Mapping[str, str]) -> Iterator[None]:
    """The environment of a process that is started inside."""
    before = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    os.environ.update(policy)
    try:
        yield
    finally:
        for name in policy:
            del os.environ[name]
        os.environ.update(before)


@contextmanager
def busy_process() -> Iterator[None]:
    """Another process that always computes."""
    spinning = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.1)
        yield
    finally:
        spinning.kill()
        spinning.wait()


def table(quiet: Mapping[str, list[float]], busy: Mapping[str, list[float]]) -> str:
    """Markdown: median steps per second in both halves, each as a share of the first policy's on the quiet machine."""
    whole = statistics.median(quiet[next(iter(quiet))])
    lines = [
        "| threads wait | quiet, steps/s | of the default | beside one busy process, steps/s | of the default, quiet |",
        "|---|---|---|---|---|",
    ]
    for name in quiet:
        cells = [
            f"{statistics.median(rates):.1f} | {statistics.median(rates) / whole:.0%}"
            for rates in (quiet[name], busy[name])
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=list(POLICIES), help="a subset of the policies")
    parser.add_argument("--recipe", default="gpt", help="a recipe that has a tiny size")
    given = parser.parse_args()
    names = list(given.only or POLICIES)
    workers: dict[str, Worker] = {}
    quiet: dict[str, list[float]] = {name: [] for name in names}
    busy: dict[str, list[float]] = {name: [] for name in names}
    dirty = 0
    try:
        for name in names:
            with environment(POLICIES[name]):
                workers[name] = Worker(name, partial(candidate, recipe=given.recipe))
            workers[name].share()
        for number in range(given.rounds):
            order = names[number % len(names) :] + names[: number % len(names)]
            samples: dict[str, Sample] = {name: workers[name].share() for name in order}
            for name, sample in samples.items():
                dirty += sample.noisy
                if not sample.noisy:
                    quiet[name].append(sample.rate)
            progress(f"round {number + 1}/{given.rounds}, quiet", samples)
            with busy_process():
                samples = {name: workers[name].share() for name in order}
            for name, sample in samples.items():
                busy[name].append(sample.rate)
            progress(f"round {number + 1}/{given.rounds}, busy", samples)
    finally:
        for worker in workers.values():
            worker.stop()
    if not all(quiet.values()):
        sys.exit("No clean sample of one of them: the machine was busy with something else.")
    print(table(quiet, busy))
    print(
        f"\n{given.recipe}, {given.rounds} rounds, {dirty} dirty quiet samples left out; {cpu_name()}, {os.cpu_count()} cores."
    )


if __name__ == "__main__":
    main()
