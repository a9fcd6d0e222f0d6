"""What this machine is, and what to do about it: `firth doctor`.

Each row is a fact that decides how fast or whether firth runs here. The device is chosen as training chooses it, and
the precision by the measurement that training makes (`firth.train.precision`), so what is printed will happen.

    Python       3.11.2
    fp32         346 GFLOP/s in a matrix product on the CPU
    bf16         62 GFLOP/s in a matrix product on the CPU     5.6 times slower than fp32 on this CPU: training on it will use fp32
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from firth import kernels, openmp
from firth.generate import native_decoder, quantized
from firth.model import attention, cross_entropy, fused, native, relative_distance
from firth.objectives.word2vec import NEIGHBORS
from firth.train import muon, precision
from firth.train.cpu_setup import flush_denormals, keep_freed_memory
from firth.train.logging import short
from firth.train.sparse_adam import KERNEL as TABLE_ROWS
from firth.types import UserError


@dataclass(frozen=True)
class DoctorRow:
    """A fact, and what follows from it; `well` is False where something should be done."""

    name: str
    value: str
    advice: str = ""
    well: bool = True


def device() -> torch.device:
    """Return the device that this process computes on: cuda, mps or cpu.

    A rank takes the GPU of its number on the machine (LOCAL_RANK, which torchrun sets), and makes it the current one.

    Raises:
        UserError: There is no GPU of that number.
    """
    if torch.cuda.is_available():
        local = os.environ.get("LOCAL_RANK")
        if local is not None:
            count = torch.cuda.device_count()
            if int(local) >= count:
                raise UserError(
                    f"process {local} of this machine has no GPU of its own, for torch sees {count} here: start at most {count} "
                    f"(torchrun --nproc-per-node {count}), or show more with CUDA_VISIBLE_DEVICES"
                )
            torch.cuda.set_device(int(local))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def doctor(directory: Path | None = None) -> list[DoctorRow]:
    """All rows; disk space is that of `directory` (default: where we are). Takes about three tenths of a second."""
    return [
        _python(), _torch(), _cores(), _load(), _waiting(), *_precision(), *_kernels(), _memory(), _disk(directory or Path.cwd()),
        _device(),
    ]  # fmt: skip


def _python() -> DoctorRow:
    fine = sys.version_info >= (3, 11)
    return DoctorRow("Python", platform.python_version(), "" if fine else "install Python 3.11 or later", fine)


def _torch() -> DoctorRow:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    fine = version >= (2, 10)
    return DoctorRow("torch", torch.__version__, "" if fine else "install torch 2.10 or later", fine)


def _cores() -> DoctorRow:
    usable, threads = usable_cores(), torch.get_num_threads()
    value = f"{usable} usable of {os.cpu_count()}, {threads} threads for torch"
    if threads > usable:
        return DoctorRow(
            "cores", value, f"set OMP_NUM_THREADS={usable}: more threads than cores wait for each other", False
        )
    return DoctorRow("cores", value)


def usable_cores() -> int:
    """Cores that this process may run on, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


BUSY_SHARE = 0.1
"""Share of the usable cores that other processes may use before the machine counts as busy."""

LOAD_SECONDS = 0.2
"""How long the load is watched."""


def _load() -> DoctorRow:
    usable, others, waited = usable_cores(), other_load(), cpu_pressure()
    value = f"{others:.1f} of {usable} cores are used by other processes"
    if waited is not None:
        value += f"; in the last 10 seconds tasks waited for a core {waited:.0f}% of the time"
    if others <= BUSY_SHARE * usable:
        return DoctorRow("load", value)
    return DoctorRow(
        "load",
        value,
        "the machine is busy, and training will be slower; if it stays so, set OMP_WAIT_POLICY=PASSIVE",
        False,
    )


def other_load(seconds: float = LOAD_SECONDS) -> float:
    """Return how many of the usable cores other processes use, from a short watch; the load average where it is not Linux."""
    if sys.platform != "linux":
        return os.getloadavg()[0]
    began, before, own = time.perf_counter(), _busy_seconds(), time.process_time()
    time.sleep(seconds)
    busy = _busy_seconds() - before - (time.process_time() - own)
    return max(0.0, busy / (time.perf_counter() - began))


def _busy_seconds() -> float:
    """Return the seconds for which the usable cores have been busy since the start of the machine, stolen time included."""
    usable = {f"cpu{n}" for n in os.sched_getaffinity(0)}
    rows = [line.split() for line in Path("/proc/stat").read_text().splitlines() if line.startswith("cpu")]
    ticks = 0
    for name, *numbers in rows:
        if name in usable:
            user, nice, system, _idle, _wait, irq, soft, steal = map(int, numbers[:8])
            ticks += user + nice + system + irq + soft + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def cpu_pressure() -> float | None:
    """Return for what percentage of the last 10 seconds a task of this control group waited for a core; None: not measured."""
    for path in _PRESSURE:
        if Path(path).exists():
            some = Path(path).read_text().splitlines()[0].split()  # some avg10=1.23 avg60=... total=...
            return float(some[1].removeprefix("avg10="))
    return None


_PRESSURE = ("/sys/fs/cgroup/cpu.pressure", "/proc/pressure/cpu")
"""Pressure stall information: of the container's own control group where there is one, else of the machine."""


def _waiting() -> DoctorRow:
    library = openmp_library()
    names, chosen = openmp.GNU_VARIABLES, {"GOMP_SPINCOUNT": str(openmp.GOMP_SPINS)}
    if not library.startswith("libgomp"):
        names, chosen = openmp.LLVM_VARIABLES, {"KMP_BLOCKTIME": str(openmp.KMP_BLOCKTIME_MS)}
    given = {name: os.environ[name] for name in names if name in os.environ}
    value = f"{library}: " + (", ".join(f"{k}={v}" for k, v in given.items()) or "its default")
    if given == chosen and openmp.EFFECTIVE:
        return DoctorRow("waiting", value, "firth's choice: a waiting thread spins briefly and then sleeps")
    if given:
        return DoctorRow("waiting", value, "your environment decides how threads wait")
    return DoctorRow(
        "waiting",
        value,
        "torch was imported before firth, so waiting threads spin, which is slow beside other work: import firth first",
        False,
    )


def openmp_library() -> str:
    """Return the file name of the OpenMP library that torch uses: the one loaded, or else the one that it brings.

    Of several, libgomp is the one that another library was loaded in place of.
    """
    if sys.platform == "linux":
        paths = [Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line]
    else:
        paths = sorted((Path(torch.__file__).parent / "lib").glob("*omp*"))
    names = [path.name for path in paths if path.name.startswith(("libgomp", "libiomp", "libomp"))]
    return min(names, key=lambda name: name.startswith("libgomp"), default="not found")


def _precision() -> list[DoctorRow]:
    speed = precision.measured_speed()
    chosen = precision.choose("auto", torch.device("cpu"))
    ratio = speed["bf16"] / speed["fp32"]
    if chosen == "bf16":
        advice = f"training on the CPU will use bf16, {ratio:.1f} times as fast"
    elif ratio < 0.9:
        advice = f"{1 / ratio:.1f} times slower than fp32 on this CPU: training on it will use fp32"
    else:
        advice = "not worth its rounding on this CPU: training on it will use fp32"
    kept = keep_freed_memory()
    return [
        DoctorRow("fp32", f"{short(speed['fp32'])}FLOP/s in a matrix product on the CPU"),
        DoctorRow("bf16", f"{short(speed['bf16'])}FLOP/s in a matrix product on the CPU", advice),
        DoctorRow(
            "malloc", "glibc keeps freed memory for the next step" if kept else "not glibc: freed memory is returned"
        ),
        DoctorRow(
            "denormals",
            "are 0 in training" if flush_denormals() else "are computed with: this processor cannot skip them",
        ),
    ]


def _kernels() -> list[DoctorRow]:
    """Which implementation of each kernel this machine runs, and how much quicker it is than the plain one."""
    kernels.check_forced()
    missing = native.why_not()
    compiler = (
        DoctorRow("compiler", "none of use", f"{missing}: training works without, and is slower") if missing else None
    )
    rows = [compiler or DoctorRow("compiler", "native kernels are compiled")]
    tables = (
        attention.ATTENTION,
        cross_entropy.KERNEL,
        fused.NORM,
        fused.LAYER_NORM,
        fused.HEADS,
        fused.ACTIVATION,
        relative_distance.COLUMNS,
        fused.ONE_ROW,
    )
    every = [kernel for table in tables for kernel in table.values()] + [
        muon.KERNEL,
        muon.MOMENTUM,
        quantized.KERNEL,
        native_decoder.DECODE,
        native_decoder.FEW_ROWS,
        TABLE_ROWS,
        NEIGHBORS,
    ]
    for kernel in sorted(every, key=lambda kernel: kernel.name):
        choice, took = kernel.choice(), kernels.seconds(kernel)
        plain = next(name for name in kernel.choices if name in took)
        quicker = choice != plain and choice in took
        rows.append(
            DoctorRow(
                kernel.name, choice, f"{took[plain] / took[choice]:.1f} times as fast as {plain}" if quicker else ""
            )
        )
    return rows


def _memory() -> DoctorRow:
    total, free = memory()
    value = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f}"
    if free < 2e9:
        return DoctorRow(
            "memory", value, "a 14 M model at 16 x 256 tokens wants 2 GB: close something, or lower batch.size", False
        )
    return DoctorRow("memory", value, f"AdamW takes 16 bytes a weight: at most about {short(free / 16 / 2)} parameters")


def memory() -> tuple[int, int]:
    """Bytes of main memory: all, and what can be had without swapping (all again, where the system does not say)."""
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
    """Bytes of files that a control group holds in memory, and gives up when it needs room: counted as used, and free."""
    if not stat.exists():
        return 0
    found = dict(line.split(" ", 1) for line in stat.read_text().splitlines())
    return int(found.get("file", found.get("total_cache", 0)))


_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)
"""A container's limit on memory and what it has used, in the two versions of Linux control groups."""


def _disk(directory: Path) -> DoctorRow:
    usage = shutil.disk_usage(directory)
    fine = usage.free > 5e9
    advice = "" if fine else "the corpora and a few checkpoints want 5 GB: free some"
    return DoctorRow("disk", f"{usage.free / 1e9:.0f} GB free of {usage.total / 1e9:.0f}", advice, fine)


def _device() -> DoctorRow:
    chosen = device()
    if chosen.type == "cuda":
        facts = torch.cuda.get_device_properties(chosen)
        use = precision.choose("auto", chosen)
        return DoctorRow(
            "device", f"cuda: {facts.name}, {facts.total_memory / 1e9:.0f} GB", f"training will use it in {use}"
        )
    if chosen.type == "mps":
        return DoctorRow("device", "mps", "training will use it in fp32")
    if platform.system() == "Linux" and Path("/dev/nvidiactl").exists():
        return DoctorRow(
            "device",
            "cpu",
            "there is an NVIDIA device that this build of torch cannot use: install torch for CUDA",
            False,
        )
    return DoctorRow("device", "cpu", "no accelerator: models up to about 30 M parameters train in minutes to hours")
