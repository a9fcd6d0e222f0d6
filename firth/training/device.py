"""The device of a run, its precision, the memory of the machine, and settings of the process that speed up training on a CPU.

Precision: bf16 or fp32, whichever is faster. That a CPU supports bf16 does not mean that it is fast: without avx512_bf16 or
amx it is emulated, and a matrix product takes four times as long as in fp32. So a small product is timed in both, once per
machine and number of threads (about 200 ms).

Process: malloc keeps freed memory, and denormals are flushed to zero. `train` applies both for the rest of the process.

Model FLOPs utilization (Chowdhery 2022, appendix B) is counted FLOPs per second over the peak. The peak is measured once per
machine, precision and number of threads and kept in CACHE/speed.json; later measurements (`firth doctor`) only raise it,
since other work on the machine can only lower one.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from firth import kernel_choice
from firth.io.atomic import cache_directory, write_text
from firth.io.json_files import read_json
from firth.types import UserError

Precision = Literal["auto", "fp32", "bf16"]

MIN_SPEEDUP = 1.2
"""bf16 must be this many times as fast as fp32 to be chosen, because of the cost of casts around the products."""


def default_device() -> torch.device:
    """Return the device of this process: cuda, mps or cpu.

    A rank takes the GPU of its local number (LOCAL_RANK, which torchrun sets) and makes it the current one.

    Raises:
        UserError: There is no GPU of that number.
    """
    if torch.cuda.is_available():
        local = os.environ.get("LOCAL_RANK")
        if local is not None:
            count = torch.cuda.device_count()
            if int(local) >= count:
                raise UserError(
                    f"process {local} of this machine has no GPU of its own: torch sees {count}; start at most {count} "
                    f"(torchrun --nproc-per-node {count}), or make more visible with CUDA_VISIBLE_DEVICES"
                )
            torch.cuda.set_device(int(local))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(wanted: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
    """Return the precision to train in: `wanted`, or for "auto" the faster one on `device`."""
    if wanted != "auto":
        return wanted
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    if device.type == "mps":
        return "fp32"
    speed = measured_speed()
    return "bf16" if speed["bf16"] > MIN_SPEEDUP * speed["fp32"] else "fp32"


@cache
def measured_speed(size: int = 512, seconds: float = 0.2) -> dict[str, float]:
    """Return the FLOP/s of a matrix product on the CPU in fp32 and bf16, as recorded for this machine or measured now.

    Products of both alternate, so that other work on the machine slows both alike. The result is recorded
    (`measured_speed`), so that all runs on a machine choose alike.

    Args:
        size: Rows and columns of the matrices.
        seconds: Time to measure.
    """
    names: dict[str, str] = {name: f"product of {size} cpu {name}" for name in PRECISIONS}
    known = {name: value for name, key in names.items() if (value := recorded_speed(key)) is not None}
    if len(known) == len(names):
        return known
    matrices = {"fp32": torch.ones(size, size), "bf16": torch.ones(size, size, dtype=torch.bfloat16)}
    best = {}
    for name, x in matrices.items():
        x @ x  # the first product sets up threads and kernels
        best[name] = float("inf")
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or float("inf") in best.values():
        for name, x in matrices.items():
            start = time.perf_counter()
            x @ x
            best[name] = min(best[name], time.perf_counter() - start)
    found = {name: 2 * size**3 / least for name, least in best.items()}
    for name, key in names.items():
        record_speed(key, found[name])
    return found


def defers_reads(device: torch.device) -> bool:
    """Return whether the host would wait for the device if it read the loss of every step."""
    return device.type == "cuda"


def casts(precision: Literal["fp32", "bf16"], device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Return the context of a forward pass: no-op for fp32, autocast over fp32 master weights for bf16."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4  # malloc.h
_GLIBC = platform.libc_ver()[0] == "glibc"
KEPT_MEMORY = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20)) if _GLIBC else ()
"""Parameters of malloc with which it keeps freed memory."""


def keep_freed_memory() -> bool:
    """Let malloc keep freed memory instead of returning it to the kernel. Returns True on success (glibc only).

    glibc allocates blocks over 128 kB with `mmap` and returns them to the kernel when they are freed. A training step allocates
    the same activations again and again, and each time every page is faulted in and zeroed. With this setting they are reused.
    """
    return _GLIBC and all(ctypes.CDLL(None).mallopt(*setting) for setting in KEPT_MEMORY)


def return_freed_memory() -> bool:
    """Let malloc return freed blocks of 1 MB or more to the kernel at once. Returns True on success (glibc only).

    Sharded training gathers and frees whole blocks. Kept and fragmented, they can take more memory than sharding saves.
    """
    return _GLIBC and bool(ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 1 << 20))


def trim_freed_memory() -> bool:
    """Return all freed pages to the kernel once. Returns True if there were any (glibc only)."""
    return _GLIBC and bool(ctypes.CDLL(None).malloc_trim(0))


def flush_denormals(on: bool = True) -> bool:
    """Flush numbers below 1.2e-38 to 0 on every thread of torch. Returns True if the processor can.

    x86 computes with such numbers in microcode, about a hundred cycles each. A confident model produces them in its backward
    pass, as products of tiny probabilities and tiny gradients: a T5 drops to half of its speed within 200 steps. GPUs and
    vendors' fast modes flush them too.

    `torch.set_flush_denormal` applies to the calling thread and threads that it starts later. OpenMP's threads may exist
    already, so it is called in each, through the entry point that the libraries of gcc and Intel share.
    """
    supported: bool = torch.set_flush_denormal(on)
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if _GLIBC else None
    if supported and parallel is not None:

        def in_each_thread(_: object) -> None:
            torch.set_flush_denormal(on)

        parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(in_each_thread), None, torch.get_num_threads(), 0)
    return supported


def memory() -> tuple[int, int]:
    """Return total and available main memory in bytes; both the total if the system does not say."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if sys.platform != "linux":
        return total, total
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    for limit, used in _CGROUPS:
        if Path(limit).exists() and (text := Path(limit).read_text().strip()) != "max" and int(text) < total:
            total = int(text)
            free = min(free, total - int(Path(used).read_text()) + _cached(Path(used).with_name("memory.stat")))
    return total, free


def _cached(stat: Path) -> int:
    """Return the bytes of file cache in a control group, which count as used but are released on demand."""
    if not stat.exists():
        return 0
    found = dict(line.split(" ", 1) for line in stat.read_text().splitlines())
    return int(found.get("file", found.get("total_cache", 0)))


_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""Memory limit and usage of a container, in both versions of Linux control groups."""


PrecisionName = Literal["fp32", "bf16"]
PRECISIONS: tuple[PrecisionName, ...] = ("fp32", "bf16")

PRODUCT_SIZES = {"cpu": 1024, "mps": 2048, "cuda": 8192}
"""Device -> rows and columns of the matrices whose product is timed."""

SPEED_FILE = "speed.json"
"""File of the cache with speeds."""

MEASURE_SECONDS, MIN_RUNS = 0.3, 3
"""Seconds spent on the peak, and the fewest products."""


@cache
def machine_peak(device: str, precision: PrecisionName) -> float:
    """Return the peak FLOP/s of this machine in a matrix product; measured if it is not known.

    Args:
        device: Type of the device: cpu, cuda or mps.
        precision: Precision of the product.
    """
    known = recorded_speed(f"peak {device} {precision}")
    return known if known is not None else measure_peak(device, precision)


def measure_peak(device: str, precision: PrecisionName) -> float:
    """Measure the peak FLOP/s and return the highest that was ever measured on this machine."""
    size = PRODUCT_SIZES[device]
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
    peak = max(2 * size**3 / best, recorded_speed(name) or 0.0)
    record_speed(name, peak)
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


@cache
def _machine() -> str:
    """Return what a speed depends on: `kernel_choice.machine`, and the name of the GPU."""
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return kernel_choice.machine() + gpu


def recorded_speed(name: str) -> float | None:
    """Return a recorded speed of this machine, or None."""
    value = recorded_in(SPEED_FILE, name)
    return value if isinstance(value, float) and 0 < value < math.inf else None


def record_speed(name: str, speed: float) -> None:
    """Record a speed of this machine."""
    record_in(SPEED_FILE, name, speed)


def _content(file: str) -> dict[str, Any]:
    """Return what is recorded of all machines; {} if the file cannot be used, so that it is written again."""
    try:
        return read_json(cache_directory() / file)
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
        cache_directory().mkdir(parents=True, exist_ok=True)
        write_text(cache_directory() / file, json.dumps(content, indent=1, sort_keys=True))
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
