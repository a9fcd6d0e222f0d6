"""Measuring one program beside another on a machine that is never quite quiet.

Absolute speeds drift with the machine; ratios taken a second apart do not. So every contender lives in a process
of its own (its allocator, its threads and its peak memory are its own), all of them stay alive for the whole run,
and they work in turns: round after round each does the same share of work while the others sleep. The ratio of two
contenders is the median over rounds of the ratio *within* a round.

A contender is a function that works for ever and calls `turn(units)` whenever a share is done:

    def loop(turn):
        for batch in batches:
            train_on(batch)
            turn(batch.numel())                  # sleeps here while the others have their turn

    report = compare({"ours": loop, "theirs": other}, rounds=9, peer="theirs", unit="tokens")

A share is dirty, and measured again, when somebody else had more than 3% of the machine meanwhile (/proc/stat against
the contender's own CPU time; where there is no /proc/stat nothing can be told dirty, and the report says so).
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

Turn = Callable[[float], None]
Contender = Callable[[Turn], None]

DIRTY = 0.03
"""Largest share of the machine's CPU time that others may have used during a clean sample."""


@dataclass(frozen=True)
class Sample:
    """One share of work: units done, wall seconds, the share of the machine that others used (None: unknown)."""

    units: float
    seconds: float
    others: float | None

    @property
    def dirty(self) -> bool:
        return self.others is not None and self.others > DIRTY

    @property
    def rate(self) -> float:
        return self.units / self.seconds


@dataclass
class Report:
    """What `compare` found. rounds: one {contender: Sample} per round in which every sample was clean."""

    unit: str
    peer: str
    shared: bool = False
    rounds: list[dict[str, Sample]] = field(default_factory=list)
    thrown_away: int = 0
    peak_mb: dict[str, float] = field(default_factory=dict)
    machine: dict[str, object] = field(default_factory=dict)

    def rates(self, name: str) -> list[float]:
        return [r[name].rate for r in self.rounds]

    def ratio(self, name: str, peer: str | None = None) -> tuple[float, float, float]:
        """Median, least and greatest over rounds of rate(name) / rate(peer)."""
        ratios = [r[name].rate / r[peer or self.peer].rate for r in self.rounds]
        return statistics.median(ratios), min(ratios), max(ratios)

    def table(self, ours: str) -> str:
        """Markdown: speed, seconds per share, peak memory, and how many times faster `ours` is than each."""
        if not self.rounds:
            return "No clean round: the machine was busy with something else."
        lines = [
            f"| contender | {self.unit}/s, median | best | seconds a share, median (min) | peak MB "
            f"| {ours} against it |",
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
        kept = f"{len(self.rounds)} clean rounds, {self.thrown_away} dirty samples thrown away."
        if self.shared:
            kept = f"{len(self.rounds)} rounds on a machine that others used too: seconds are each process's own CPU seconds."
        return "\n".join([*lines, "", kept, describe(self.machine)])

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1))


def compare(
    contenders: Mapping[str, Contender],
    *,
    rounds: int,
    peer: str,
    unit: str = "tokens",
    warmup: int = 1,
    patience: int = 4,
    shared: bool = False,
) -> Report:
    """Let the contenders work in turns until `rounds` clean rounds are in, or rounds * patience have been tried.

    contenders: top-level functions (each is started in a fresh process). warmup: shares done by each before any is
    timed. The order within a round moves by one each round, so that none always follows the same other. shared: the machine
    has other work: no sample is dirty, and each is timed by the CPU seconds of its own process. That is fair to programs
    of one thread each; who waits for others does not count it.
    """
    report = Report(unit=unit, peer=peer, shared=shared)
    workers = {}
    for name, contender in contenders.items():
        with _waiting_as(name.startswith("firth")):
            workers[name] = Worker(name, contender)
    try:
        for worker in workers.values():
            for _ in range(warmup):
                worker.share()
        report.machine = machine()
        names = list(workers)
        for tried in range(rounds * patience):
            order = names[tried % len(names) :] + names[: tried % len(names)]
            samples = {name: workers[name].share(shared) for name in order}
            dirty = sum(s.dirty for s in samples.values())
            report.thrown_away += dirty
            if not dirty:
                report.rounds.append({name: samples[name] for name in names})
            progress(f"round {len(report.rounds)}/{rounds}", samples)
            if len(report.rounds) == rounds:
                break
    finally:
        report.peak_mb = {name: worker.stop() for name, worker in workers.items()}
    return report


def progress(what: str, samples: Mapping[str, Sample]) -> None:
    """One line on standard error: each contender's rate, `!` behind a dirty one."""
    shown = "  ".join(f"{n} {s.rate:,.0f}{'!' if s.dirty else ''}" for n, s in samples.items())
    print(f"{what}  {shown}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _waiting_as(ours: bool) -> Iterator[None]:
    """Let a process that is started inside wait for work as its users' do: firth's by `firth.openmp`, others' by default."""
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
    """A contender in its own process, seen from outside."""

    def __init__(self, name: str, contender: Contender) -> None:
        context = multiprocessing.get_context("spawn")
        self.name, (self.line, theirs) = name, context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, contender), daemon=True)
        self.process.start()
        theirs.close()

    def share(self, shared: bool = False) -> Sample:
        """One turn: wakes the contender, waits until its share is done. shared: as of `compare`."""
        before = busy()
        try:
            self.line.send("go")
            units, seconds, own = self.line.recv()
        except (EOFError, BrokenPipeError):
            raise RuntimeError(f"the contender {self.name!r} ended before its turn was over (see above)") from None
        after = busy()
        if shared:
            return Sample(units, own, None)
        return Sample(units, seconds, others(before, after, own, seconds))

    def stop(self) -> float:
        """Ends the process; its peak resident size in MB (0 if it had died)."""
        peak = 0.0
        with contextlib.suppress(EOFError, BrokenPipeError):
            self.line.send("stop")
            peak = self.line.recv()
        self.process.join(10)
        self.process.kill()
        return peak


class Over(BaseException):
    """Unwinds a contender when the comparison is over: not an Exception, so that no trainer catches it."""


def serve(line: Connection, contender: Contender) -> None:
    """The inside of a contender's process: time what passes between two turns."""
    began: list[float] = []

    def turn(units: float) -> None:
        if began:
            wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
            line.send((units, wall, cpu))
        try:
            order = line.recv()
        except EOFError:  # whoever compares us was killed
            raise Over from None
        if order == "stop":
            line.send(peak_mb())
            raise Over
        began[:] = time.perf_counter(), time.process_time()

    try:
        turn(0)  # the first share includes the set-up: it is part of the warm-up and never timed
        contender(turn)
    except Over:
        pass


def peak_mb() -> float:
    """Peak resident size of this process so far, in MB (10^6 bytes)."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def busy() -> float | None:
    """CPU seconds that the whole machine has been busy since it started (stolen time included); None if unknown."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, fields[:8])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def others(before: float | None, after: float | None, own: float, seconds: float) -> float | None:
    """The share of the machine's CPU time that was not this process's: 0 to 1."""
    if before is None or after is None:
        return None
    return max(0.0, (after - before - own) / (seconds * (os.cpu_count() or 1)))


# ------------------------------------------------------------------------------------------- the command line


def arguments(about: str | None, names: Iterable[str]) -> argparse.ArgumentParser:
    """The options that the comparisons share."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", nargs="*", choices=list(names), help="a subset of the contenders")
    parser.add_argument("--save", type=Path, help="write every sample as JSON")
    parser.add_argument(
        "--shared", action="store_true", help="others use this machine: time by CPU seconds, one thread each"
    )
    parser.add_argument("--check", action="store_true", help="assert what makes it fair; no timing")
    return parser


def command(given: argparse.Namespace, everyone: Mapping[str, Contender], unit: str = "tokens") -> None:
    """Compare what was asked for and print the table; ratios are of the contender named last, which is firth."""
    chosen = {name: everyone[name] for name in (given.only or everyone)}
    report = compare(chosen, rounds=given.rounds, peer=next(iter(chosen)), unit=unit, shared=given.shared)
    if given.save:
        report.save(given.save)
    print(report.table(list(chosen)[-1]))


# ------------------------------------------------------------------------------------------- the machine


def machine() -> dict[str, object]:
    """What the numbers were measured on, with the rates that bound them: GEMM in both precisions, memory."""
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
    """The machine in one line of a report."""
    return (
        "{cpu}, {cores} cores, torch {torch} on {threads} threads; measured GEMM {gemm_fp32_gflops} GFLOP/s fp32, "
        "{gemm_bf16_gflops} bf16; memory {memory_gb_s} GB/s."
    ).format(**facts)


def cpu_name() -> str:
    """The processor's name as the system gives it, and the matrix instructions that decide between fp32 and bf16."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    wanted = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{facts.get('model name', platform.machine())} ({' '.join(wanted)})"


def gemm_rate(dtype: object, repeats: int = 7) -> float:
    """FLOP/s of one linear layer of the benchmark's model: (4096, 384) x (384, 1536). The best of several."""
    import torch

    a, b = torch.randn(4096, 384).to(dtype), torch.randn(1536, 384).to(dtype)  # type: ignore[call-overload]
    inner = 8

    def once() -> None:
        for _ in range(inner):
            torch.nn.functional.linear(a, b)

    return 2 * 4096 * 384 * 1536 * inner / fastest(once, repeats)


def memory_rate(repeats: int = 7) -> float:
    """Bytes/s of reading 256 MB through a matrix-vector product, as generation at batch 1 does."""
    import torch

    matrix, vector = torch.randn(8192, 8192), torch.randn(8192)
    return matrix.numel() * 4 / fastest(lambda: torch.mv(matrix, vector), repeats)


def fastest(work: Callable[[], object], repeats: int) -> float:
    """Seconds of the quickest of `repeats` calls, after one that is not timed."""
    work()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


if __name__ == "__main__":
    print(describe(machine()))
