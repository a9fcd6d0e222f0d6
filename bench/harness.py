"""Speed comparison of programs on a machine that is never quite idle.

Absolute speeds drift with the machine; ratios measured within a second do not. Every candidate therefore runs in a process
of its own (own allocator, threads and peak memory). All processes stay alive for the whole comparison and take turns: in
each round every candidate does the same amount of work while the others sleep. The ratio of two candidates is the median
over rounds of the ratio *within* a round.

A candidate is a function that works forever and calls `end_sample(units)` at the end of each sample:

    def loop(end_sample):
        for batch in batches:
            train_on(batch)
            end_sample(batch.numel())            # sleeps here while the other candidates work

    report = compare({"ours": loop, "theirs": other}, rounds=9, peer="theirs", unit="tokens")

A sample is noisy, and measured again, when other processes used more than 3% of the machine meanwhile (/proc/stat against
the candidate's own CPU time). Without /proc/stat no sample counts as noisy, and the report says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from firth import openmp

EndSample = Callable[[float], None]
"""Reports the units of work done since the last call; returns when the next sample starts."""

Candidate = Callable[[EndSample], None]

MAX_OTHER_LOAD = 0.03
"""Largest fraction of the machine's CPU time that other processes may use during a clean sample."""


@dataclass(frozen=True)
class Sample:
    """Measurement of one sample.

    Args:
        units: Units of work done.
        seconds: Wall time, or CPU seconds of the process on a shared machine.
        others: Fraction of the machine that other processes used; None if unknown.
    """

    units: float
    seconds: float
    others: float | None

    @property
    def noisy(self) -> bool:
        return self.others is not None and self.others > MAX_OTHER_LOAD

    @property
    def rate(self) -> float:
        return self.units / self.seconds


@dataclass
class Report:
    """Result of `compare`.

    Args:
        unit: Unit of work, plural.
        peer: Candidate that ratios refer to.
        shared: Whether the machine had other work (see `compare`).
        rounds: {candidate: Sample} of each round in which every sample was clean.
        discarded: Number of noisy samples.
        peak_mb: Peak resident size of each process.
        machine: Facts of `machine`.
    """

    unit: str
    peer: str
    shared: bool = False
    rounds: list[dict[str, Sample]] = field(default_factory=list)
    discarded: int = 0
    peak_mb: dict[str, float] = field(default_factory=dict)
    machine: dict[str, object] = field(default_factory=dict)

    def rates(self, name: str) -> list[float]:
        return [r[name].rate for r in self.rounds]

    def ratio(self, name: str, peer: str | None = None) -> tuple[float, float, float]:
        """Return the median, minimum and maximum over rounds of rate(name) / rate(peer)."""
        ratios = [r[name].rate / r[peer or self.peer].rate for r in self.rounds]
        return statistics.median(ratios), min(ratios), max(ratios)

    def table(self, ours: str) -> str:
        """Return a Markdown table of speed, seconds per sample, peak memory, and the speedup of `ours` over each."""
        if not self.rounds:
            return "There was no clean round: other processes used the machine."
        lines = [
            f"| candidate | {self.unit}/s, median | best | seconds per sample, median (min) | peak MB "
            f"| speedup of {ours} |",
            "|---|---|---|---|---|---|",
        ]
        for name in self.rounds[0]:
            seconds = [r[name].seconds for r in self.rounds]
            rates, (middle, low, high) = self.rates(name), self.ratio(ours, name)
            lines.append(
                f"| {name} | {statistics.median(rates):,.0f} | {max(rates):,.0f} "
                f"| {statistics.median(seconds):.2f} ({min(seconds):.2f}) | {self.peak_mb[name]:,.0f} "
                f"| {'' if name == ours else f'**{middle:.2f}x** ({low:.2f} to {high:.2f})'} |"
            )
        kept = f"{len(self.rounds)} clean rounds, {self.discarded} noisy samples discarded."
        if self.shared:
            kept = f"{len(self.rounds)} rounds on a shared machine: seconds are the CPU seconds of each process."
        return "\n".join([*lines, "", kept, describe(self.machine)])

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1))


def compare(
    candidates: Mapping[str, Candidate],
    *,
    rounds: int,
    peer: str,
    unit: str = "tokens",
    warmup: int = 1,
    patience: int = 4,
    shared: bool = False,
) -> Report:
    """Run the candidates in turns until there are `rounds` clean rounds, or rounds * patience were tried.

    The order within a round rotates, so that no candidate always follows the same other one.

    Args:
        candidates: Top-level functions; each is started in a fresh process.
        rounds: Clean rounds to collect.
        peer: Candidate that ratios refer to.
        unit: Unit of work, plural.
        warmup: Samples of each candidate that are not timed.
        patience: Rounds tried for each clean one, at most.
        shared: The machine has other work: no sample is noisy, and each is timed by the CPU seconds of its process. This
            is fair for programs of one thread each; waiting does not count.
    """
    report = Report(unit=unit, peer=peer, shared=shared)
    workers = {}
    for name, candidate in candidates.items():
        with _waiting_as(name.startswith("firth")):
            workers[name] = Worker(name, candidate)
    try:
        for worker in workers.values():
            for _ in range(warmup):
                worker.measure()
        report.machine = machine()
        names = list(workers)
        for tried in range(rounds * patience):
            order = names[tried % len(names) :] + names[: tried % len(names)]
            samples = {name: workers[name].measure(shared) for name in order}
            noisy = sum(s.noisy for s in samples.values())
            report.discarded += noisy
            if not noisy:
                report.rounds.append({name: samples[name] for name in names})
            progress(f"round {len(report.rounds)}/{rounds}", samples)
            if len(report.rounds) == rounds:
                break
    finally:
        report.peak_mb = {name: worker.stop() for name, worker in workers.items()}
    return report


def progress(what: str, samples: Mapping[str, Sample]) -> None:
    """Print one line to standard error: the rate of each candidate, with `!` after a noisy one."""
    shown = "  ".join(f"{n} {s.rate:,.0f}{'!' if s.noisy else ''}" for n, s in samples.items())
    print(f"{what}  {shown}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _waiting_as(ours: bool) -> Iterator[None]:
    """Set the OpenMP wait policy of processes started inside: that of `firth.openmp` for firth, else the default."""
    before = dict(os.environ)
    for name in ("GOMP_SPINCOUNT", "KMP_BLOCKTIME") if openmp.EFFECTIVE else ():
        os.environ.pop(name, None)
    if ours:
        openmp.set_wait_policy(os.environ, ())
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


class Worker:
    """Handle of a candidate in its own process."""

    def __init__(self, name: str, candidate: Candidate) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, (self.line, child) = name, context.Pipe()
        self.process = context.Process(target=serve, args=(child, candidate), daemon=True)
        self.process.start()
        child.close()

    def measure(self, shared: bool = False) -> Sample:
        """Wake the candidate and wait until its sample is done. `shared` is that of `compare`."""
        before = busy_seconds()
        try:
            self.line.send("go")
            units, seconds, own = self.line.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"the candidate {self.name!r} ended before its sample was over (see above)") from None
        after = busy_seconds()
        if shared:
            return Sample(units, own, None)
        return Sample(units, seconds, other_load(before, after, own, seconds))

    def stop(self) -> float:
        """End the process; return its peak resident size in MB (0 if it had died)."""
        peak = 0.0
        with contextlib.suppress(EOFError, BrokenPipeError):
            self.line.send("stop")
            peak = self.line.recv()
        self.process.join(10)
        self.process.kill()
        return peak


class ComparisonOver(BaseException):
    """Unwinds a candidate when the comparison is over. Not an Exception, so that no trainer catches it."""


def serve(line: Connection, candidate: Candidate) -> None:
    """Run a candidate in its process and time each sample."""
    started: list[float] = []

    def end_sample(units: float) -> None:
        if started:
            wall, cpu = time.perf_counter() - started[0], time.process_time() - started[1]
            line.send((units, wall, cpu))
        try:
            order = line.recv()
        except EOFError:  # the parent process was killed
            raise ComparisonOver from None
        if order == "stop":
            line.send(peak_mb())
            raise ComparisonOver
        started[:] = time.perf_counter(), time.process_time()

    try:
        end_sample(0)  # the first sample includes the setup: it is part of the warmup and never timed
        candidate(end_sample)
    except ComparisonOver:
        pass


def peak_mb() -> float:
    """Return the peak resident size of this process so far, in MB (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def resident(field: str) -> int:
    """Return VmRSS (the resident size now), RssAnon (without pages of files) or VmHWM (its peak) of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024


def reset_peak() -> None:
    """Let VmHWM count from now on."""
    Path("/proc/self/clear_refs").write_text("5")


def busy_seconds() -> float | None:
    """Return the busy CPU seconds of the whole machine since boot (stolen time included); None if unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, fields[:8])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def other_load(before: float | None, after: float | None, own: float, seconds: float) -> float | None:
    """Return the fraction of the machine's CPU time that other processes used, 0 to 1; None if unknown."""
    if before is None or after is None:
        return None
    return max(0.0, (after - before - own) / (seconds * (os.cpu_count() or 1)))


# ------------------------------------------------------------------------------------------- the command line


def arguments(about: str | None, names: Iterable[str]) -> argparse.ArgumentParser:
    """Return a parser with the options that all comparisons have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=list(names), help="a subset of the candidates")
    parser.add_argument("--save", type=Path, help="write every sample as JSON")
    parser.add_argument(
        "--shared", action="store_true", help="the machine has other work: time by CPU seconds, one thread each"
    )
    parser.add_argument("--check", action="store_true", help="assert that the comparison is fair; no timing")
    return parser


def command(args: argparse.Namespace, candidates: Mapping[str, Candidate], unit: str = "tokens") -> None:
    """Compare the selected candidates and print the table; ratios are of the last candidate, which is firth."""
    chosen = {name: candidates[name] for name in (args.only or candidates)}
    report = compare(chosen, rounds=args.rounds, peer=next(iter(chosen)), unit=unit, shared=args.shared)
    if args.save:
        report.save(args.save)
    print(report.table(list(chosen)[-1]))


# ------------------------------------------------------------------------------------------- the machine


def machine() -> dict[str, object]:
    """Return facts of this machine with the rates that bound every program: GEMM in both precisions, memory."""
    import torch

    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gemm_fp32_gflops": round(gemm_rate(torch.float32) / 1e9),
        "gemm_bf16_gflops": round(gemm_rate(torch.bfloat16) / 1e9),
        "memory_gb_s": round(memory_rate() / 1e9, 1),
    }


def describe(facts: Mapping[str, object]) -> str:
    """Return the machine in one line."""
    return (
        "{cpu}, {cores} cores, torch {torch} on {threads} threads; measured GEMM {gemm_fp32_gflops} GFLOP/s fp32, "
        "{gemm_bf16_gflops} bf16; memory {memory_gb_s} GB/s."
    ).format(**facts)


def cpu_name() -> str:
    """Return the name of the processor, and the matrix instructions that decide between fp32 and bf16."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    instructions = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{facts.get('model name', platform.machine())} ({' '.join(instructions)})"


def gemm_rate(dtype: object, repeats: int = 7) -> float:
    """Return FLOP/s of one linear layer of the benchmark's model, (4096, 384) x (384, 1536), the best of several."""
    import torch

    a, b = torch.randn(4096, 384).to(dtype), torch.randn(1536, 384).to(dtype)  # type: ignore[call-overload]
    inner = 8

    def once() -> None:
        for _ in range(inner):
            torch.nn.functional.linear(a, b)

    return 2 * 4096 * 384 * 1536 * inner / fastest(once, repeats)


def memory_rate(repeats: int = 7) -> float:
    """Return bytes/s of reading 256 MB in a matrix-vector product, as generation at batch size 1 does."""
    import torch

    matrix, vector = torch.randn(8192, 8192), torch.randn(8192)
    return matrix.numel() * 4 / fastest(lambda: torch.mv(matrix, vector), repeats)


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Return the seconds of the fastest of `repeats` calls, after one that is not timed."""
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


if __name__ == "__main__":
    print(describe(machine()))
