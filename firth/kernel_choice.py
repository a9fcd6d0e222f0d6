"""Choose among several implementations of a computation by measuring them once on this machine.

The speed of a kernel depends on the CPU's instructions and on torch's version, and neither states it. So a `Kernel` names its
implementations, each with a small typical workload. The first process that needs one runs them alternately and takes the minimum
time of each. The result is stored in CACHE/kernels.json under the CPU's model, the limits set on its instructions, the number of
threads and torch's version; `firth doctor` prints all of them.

    FIRTH_KERNELS=attention-bf16=sdpa,muon=fp32    forces some of them, without a measurement
    FIRTH_KERNELS=first                            the first implementation of each, the baseline

With several ranks the choices of rank 0 hold for all (`table`, `use`): replicas with different kernels would diverge.

>>> Kernel("doctest-sum", {"one": lambda: lambda: 1, "other": lambda: lambda: 2}).name
'doctest-sum'
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import torch

from firth.io.atomic import cache_directory, write_text
from firth.io.json_files import read_json
from firth.types import UserError

MARGIN = 1.1
"""Speedup over the first implementation that is needed to replace it; less is within the noise."""

MEASURE_SECONDS, MIN_RUNS = 0.03, 5
"""Seconds spent on each implementation of a kernel, and minimum number of its runs: other load slows single runs."""

FORCE = "FIRTH_KERNELS"

LIMITS = ("ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
"""Environment variables that keep libraries from using some instructions."""

CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16")
"""Instructions that decide which kernel is fastest; virtual machines often hide the model name."""

Workload = Callable[[], object]

KERNELS: dict[str, Kernel] = {}
"""Name -> kernel, for all imported modules."""

LIMITATIONS: list[Callable[[], str]] = []
"""Functions that return what keeps some implementations from running here, or an empty text. Modules that have such ones add to it."""

_chosen: dict[str, str] = {}


@dataclass(frozen=True)
class Kernel:
    """A computation with several implementations.

    Args:
        name: Its name in `FIRTH_KERNELS`, the file and `firth doctor`.
        choices: Name of an implementation -> a function that prepares a typical workload and returns it. The first is the baseline, used
            unless it does not run here or another is MARGIN times as fast.
    """

    name: str
    choices: Mapping[str, Callable[[], Workload]]

    def __post_init__(self) -> None:
        KERNELS[self.name] = self

    def choice(self) -> str:
        """Return the name of the implementation to run; the first call in a process may measure it."""
        found = _chosen.get(self.name)
        return found if found is not None else _choose(self)

    def measure(self) -> dict[str, float]:
        """Return the minimum seconds of each implementation, of those that run here."""
        # Independent of the caller's mode: tensors made in inference mode cannot be trained.
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
            workloads: dict[str, Workload] = {}
            failed = RuntimeError(f"the kernel {self.name} has no implementation")
            for name, prepare in self.choices.items():
                try:
                    workloads[name] = prepare()
                    workloads[name]()  # warm-up: the first call creates primitives and fills caches
                except RuntimeError as error:  # no such kernel in this build of torch, or for this CPU
                    workloads.pop(name, None)
                    failed = error
            if not workloads:
                raise failed
            least = dict.fromkeys(workloads, float("inf"))
            end = time.perf_counter() + MEASURE_SECONDS * len(workloads)
            runs = 0
            while time.perf_counter() < end or runs < MIN_RUNS:
                runs += 1
                for name, work in workloads.items():
                    start = time.perf_counter()
                    work()
                    least[name] = min(least[name], time.perf_counter() - start)
        return least


def _choose(kernel: Kernel) -> str:
    forced = _forced()
    if kernel.name in forced:
        chosen = forced[kernel.name]
    else:
        times = seconds(kernel)
        plain, quickest = next(iter(times)), min(times, key=lambda name: times[name])
        chosen = quickest if times[quickest] * MARGIN < times[plain] else plain
    _chosen[kernel.name] = chosen
    return chosen


def seconds(kernel: Kernel) -> dict[str, float]:
    """Return the seconds of each implementation on this machine, from the file or measured now and stored."""
    stored = _read().get(kernel.name)
    found: dict[str, float] = stored if isinstance(stored, dict) else {}
    valid = all(isinstance(x, float) and 0 < x < float("inf") for x in found.values())
    if not found or not valid or not found.keys() <= kernel.choices.keys():
        found = kernel.measure()
        _write(kernel.name, found)
    return found


def _forced() -> dict[str, str]:
    """Return the choices that FIRTH_KERNELS forces.

    Raises:
        UserError: It names an unknown implementation.
    """
    text = os.environ.get(FORCE, "").strip()
    if text == "first":
        return {name: next(iter(kernel.choices)) for name, kernel in KERNELS.items()}
    forced = dict(pair.strip().partition("=")[::2] for pair in text.split(",") if pair.strip())
    for name, choice in forced.items():
        if name in KERNELS and choice not in KERNELS[name].choices:
            raise UserError(f"{FORCE}: {name} is one of {', '.join(KERNELS[name].choices)}, and not {choice!r}")
    return forced


def check_forced() -> None:
    """Check FIRTH_KERNELS; every module with kernels must be imported before.

    Raises:
        UserError: It names an unknown kernel or implementation.
    """
    for name in _forced():
        if name not in KERNELS:
            raise UserError(f"{FORCE}: there is no kernel {name!r}; there are {', '.join(sorted(KERNELS))}")


@once
def machine() -> str:
    """Return what the speed of a kernel depends on: CPU, limits on its instructions, threads, torch."""
    limits = [f"{name}={os.environ[name]}" for name in LIMITS if name in os.environ]
    return "; ".join((cpu(), *limits, f"{torch.get_num_threads()} threads", f"torch {torch.__version__}"))


@once
def cpu() -> str:
    """Return the CPU's model and its relevant instructions."""
    model = platform.processor() or platform.machine()
    listing = Path("/proc/cpuinfo")
    if listing.exists():
        pairs = [line.partition(":")[::2] for line in listing.read_text("utf-8", "replace").splitlines()]
        facts = {name.strip(): value.strip() for name, value in pairs}
        model = facts.get("model name", model)
        flags = facts.get("flags", "").split()
        model = " ".join((model, *(flag for flag in CPU_FLAGS if flag in flags)))
    return model


def _conditions() -> str:
    """Return the key of measurements: the machine, and what keeps implementations from running, such as a compiler that is gone."""
    return "; ".join((machine(), *filter(None, (limitation() for limitation in LIMITATIONS))))


def _file() -> Path:
    return cache_directory() / "kernels.json"


def _read() -> dict[str, Any]:
    """Return the measurements of this machine; empty if the file cannot be used, so that it is written again."""
    try:
        found = read_json(_file()).get(_conditions())
    except (UserError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(name: str, measured: Mapping[str, float]) -> None:
    """Store the seconds of one kernel. An unwritable cache is no error: the next process measures again."""
    try:
        content = read_json(_file())
    except (UserError, OSError):
        content = {}
    key = _conditions()
    found = content.get(key)
    content[key] = (found if isinstance(found, dict) else {}) | {name: dict(measured)}
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        write_text(_file(), json.dumps(content, indent=1, sort_keys=True))
    except (UserError, OSError):
        return


def table() -> dict[str, str]:
    """Return the choice of every kernel, measuring those that are unknown."""
    return {name: kernel.choice() for name, kernel in sorted(KERNELS.items())}


def use(choices: Mapping[str, str]) -> None:
    """Use these choices in this process (those of another rank)."""
    _chosen.update(choices)


@contextmanager
def forced(choices: Mapping[str, str]) -> Iterator[None]:
    """Use these choices within the block."""
    before = dict(_chosen)
    _chosen.update(choices)
    try:
        yield
    finally:
        _chosen.clear()
        _chosen.update(before)
