"""Speed of this machine: its peak in a matrix product, which utilization is measured against, and measured training speeds.

Model FLOPs utilization (Chowdhery 2022, appendix B) is counted FLOPs per second over the peak. The peak is measured once per
machine, precision and number of threads and kept in CACHE/speed.json; later measurements (`firth doctor`) only raise it,
since other work on the machine can only lower one.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from functools import cache as once
from pathlib import Path
from typing import Any, Literal

import torch

from firth import kernel_choice
from firth.io.atomic import write_text
from firth.io.cache import cache
from firth.io.json_files import read_json
from firth.types import UserError

PrecisionName = Literal["fp32", "bf16"]
PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "bf16")

SIZES = {"cpu": 1024, "mps": 2048, "cuda": 8192}
"""Device -> rows and columns of the matrices whose product is timed."""

FILE = "speed.json"
"""File of the cache with speeds."""

MEASURE_SECONDS, MIN_RUNS = 0.3, 3
"""Seconds spent on the peak, and the fewest products."""


@once
def machine_peak(device: str, precision: PrecisionName) -> float:
    """Return the peak FLOP/s of this machine in a matrix product; measured if it is not known.

    Args:
        device: Type of the device: cpu, cuda or mps.
        precision: Precision of the product.
    """
    known = recorded(f"peak {device} {precision}")
    return known if known is not None else measure_peak(device, precision)


def measure_peak(device: str, precision: PrecisionName) -> float:
    """Measure the peak FLOP/s and return the highest that was ever measured on this machine."""
    size = SIZES[device]
    x = torch.ones(size, size, dtype=torch.bfloat16 if precision == "bf16" else torch.float32, device=device)
    best, end, runs = math.inf, time.perf_counter() + MEASURE_SECONDS, 0
    with torch.inference_mode(), torch.autocast(device, enabled=False):
        x @ x  # the first product sets up threads and kernels
        _wait(device)
        while time.perf_counter() < end or runs < MIN_RUNS:
            start = time.perf_counter()
            x @ x
            _wait(device)
            best, runs = min(best, time.perf_counter() - start), runs + 1
    name = f"peak {device} {precision}"
    peak = max(2 * size**3 / best, recorded(name) or 0.0)
    record(name, peak)
    return peak


def _wait(device: str) -> None:
    """Wait until the device has finished."""
    if device == "cuda":
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


def utilization(flops_per_second: float, device: str, precision: PrecisionName, devices: int = 1) -> float:
    """Return model FLOPs utilization: counted FLOP/s over the peak of all devices."""
    return flops_per_second / (machine_peak(device, precision) * devices)


@once
def _machine() -> str:
    """Return what a speed depends on: `kernel_choice.machine`, and the name of the GPU."""
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return kernel_choice.machine() + gpu


def recorded(name: str) -> float | None:
    """Return a recorded speed of this machine, or None."""
    value = recorded_in(FILE, name)
    return value if isinstance(value, float) and 0 < value < math.inf else None


def record(name: str, speed: float) -> None:
    """Record a speed of this machine."""
    record_in(FILE, name, speed)


def _content(file: str) -> dict[str, Any]:
    """Return what is recorded of all machines; {} if the file cannot be used, so that it is written again."""
    try:
        return read_json(cache() / file)
    except (UserError, OSError):
        return {}


def recorded_in(file: str, name: str) -> Any:
    """Return what a file of the cache has recorded of this machine by some name, or None."""
    found = _content(file).get(_machine())
    return found.get(name) if isinstance(found, dict) else None


def record_in(file: str, name: str, value: Any) -> None:
    """Record a value of this machine in a file of the cache. An unwritable cache is no error: the next process measures again."""
    content = _content(file)
    found = content.get(_machine())
    content[_machine()] = (found if isinstance(found, dict) else {}) | {name: value}
    try:
        cache().mkdir(parents=True, exist_ok=True)
        write_text(cache() / file, json.dumps(content, indent=1, sort_keys=True))
    except (UserError, OSError):
        return


BUSY_SHARE = 0.1
"""Share of the usable cores that other processes may use before the machine counts as busy."""


def usable_cores() -> int:
    """Return the number of cores that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class LoadMeter:
    """Measures how many of the usable cores other processes use, from its creation on (Linux)."""

    def __init__(self) -> None:
        self._start, self._busy, self._own = time.perf_counter(), _busy_seconds(), time.process_time()

    def cores(self) -> float:
        """Return the cores that others used on average; 0 on other systems than Linux."""
        others = _busy_seconds() - self._busy - (time.process_time() - self._own)
        return max(0.0, others / (time.perf_counter() - self._start))


def _busy_seconds() -> float:
    """Return the busy seconds of the usable cores since boot, including stolen time; 0 on other systems than Linux."""
    if sys.platform != "linux":
        return 0.0
    usable = {f"cpu{n}" for n in os.sched_getaffinity(0)}
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
    ticks = 0
    for name, *numbers in rows:
        if name in usable:
            user, nice, system, _idle, _wait, irq, soft, steal = map(int, numbers[:8])
            ticks += user + nice + system + irq + soft + steal
    return ticks / os.sysconf("SC_CLK_TCK")
