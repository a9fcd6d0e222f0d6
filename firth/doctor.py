"""Describe this machine and what to do about it: `firth doctor`.

Each row is a fact that decides whether and how fast firth runs here. The device is chosen as in training, and the precision by the
same measurement (`firth.training.device`), so the output is what training will use.

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

from firth import kernel_choice, openmp
from firth.generate import native_decoder, native_kernels, quantized
from firth.model import attention, cross_entropy, fused, native, positions
from firth.objectives.word2vec import NEIGHBORS
from firth.training import device, muon
from firth.training.device import BUSY_SHARE, PRECISIONS, LoadMeter, measure_peak, usable_cores
from firth.training.logging import short
from firth.training.optimizer import KERNEL as TABLE_ROWS


@dataclass(frozen=True)
class DoctorRow:
    """A fact about this machine.

    Args:
        name: Its name.
        value: Its value.
        advice: What follows from it.
        ok: False if the user should do something.
    """

    name: str
    value: str
    advice: str = ""
    ok: bool = True


def doctor(directory: Path | None = None) -> list[DoctorRow]:
    """Return all rows, with the disk space of `directory` (default: the working directory). Takes about a second."""
    return [
        _python(), _torch(), _cores(), _load(), _waiting(), *_precision(), *_kernels(), _memory(), _disk(directory or Path.cwd()),
        _device(),
    ]  # fmt: skip


def _python() -> DoctorRow:
    ok = sys.version_info >= (3, 11)
    return DoctorRow("Python", platform.python_version(), "" if ok else "install Python 3.11 or later", ok)


def _torch() -> DoctorRow:
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    ok = version >= (2, 10)
    return DoctorRow("torch", torch.__version__, "" if ok else "install torch 2.10 or later", ok)


def _cores() -> DoctorRow:
    usable, threads = usable_cores(), torch.get_num_threads()
    value = f"{usable} usable of {os.cpu_count()}, {threads} threads for torch"
    if threads > usable:
        return DoctorRow(
            "cores", value, f"set OMP_NUM_THREADS={usable}: more threads than cores wait for each other", False
        )
    return DoctorRow("cores", value)


LOAD_SECONDS = 0.2
"""Seconds over which the load is measured."""


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
    """Return how many of the usable cores other processes use, measured briefly; the load average on other systems than Linux."""
    if sys.platform != "linux":
        return os.getloadavg()[0]
    meter = LoadMeter()
    time.sleep(seconds)
    return meter.cores()


def cpu_pressure() -> float | None:
    """Return the percentage of the last 10 seconds in which a task of this control group waited for a core; None: unknown."""
    for path in _PRESSURE:
        if Path(path).exists():
            some = Path(path).read_text().splitlines()[0].split()  # some avg10=1.23 avg60=... total=...
            return float(some[1].removeprefix("avg10="))
    return None


_PRESSURE = ("/sys/fs/cgroup/cpu.pressure", "/proc/pressure/cpu")
"""Pressure stall information, of the container's control group if it exists, else of the machine."""


def _waiting() -> DoctorRow:
    library = openmp_library()
    names, chosen = openmp.GNU_VARIABLES, {"GOMP_SPINCOUNT": str(openmp.GOMP_SPINS)}
    if not library.startswith("libgomp"):
        names, chosen = openmp.LLVM_VARIABLES, {"KMP_BLOCKTIME": str(openmp.KMP_BLOCKTIME_MS)}
    given = {name: os.environ[name] for name in names if name in os.environ}
    value = f"{library}: " + (", ".join(f"{k}={v}" for k, v in given.items()) or "its default")
    if given == chosen and openmp.EFFECTIVE:
        return DoctorRow("waiting", value, "set by firth: a waiting thread spins briefly and then sleeps")
    if given:
        return DoctorRow("waiting", value, "set by your environment")
    return DoctorRow(
        "waiting",
        value,
        "torch was imported before firth, so waiting threads spin, which is slow on a busy machine: import firth first",
        False,
    )


def openmp_library() -> str:
    """Return the file name of the OpenMP library that torch uses: the loaded one, or else the one in its package.

    Of several, libgomp comes last: another library was loaded in its place.
    """
    if sys.platform == "linux":
        paths = [Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines() if "omp" in line]
    else:
        paths = sorted((Path(torch.__file__).parent / "lib").glob("*omp*"))
    names = [path.name for path in paths if path.name.startswith(("libgomp", "libiomp", "libomp"))]
    return min(names, key=lambda name: name.startswith("libgomp"), default="not found")


def _precision() -> list[DoctorRow]:
    speed, peak = device.measured_speed(), {name: measure_peak("cpu", name) for name in PRECISIONS}
    chosen = device.choose_precision("auto", torch.device("cpu"))
    ratio = speed["bf16"] / speed["fp32"]
    if chosen == "bf16":
        advice = f"training on the CPU will use bf16, {ratio:.1f} times as fast"
    elif ratio < 0.9:
        advice = f"{1 / ratio:.1f} times slower than fp32 on this CPU: training on it will use fp32"
    else:
        advice = "not much faster than fp32 on this CPU: training on it will use fp32"
    keeps_memory = device.keep_freed_memory()
    return [
        DoctorRow(
            "fp32",
            f"{short(peak['fp32'])}FLOP/s in a matrix product on the CPU",
            "the highest ever measured, the peak of MFU",
        ),
        DoctorRow("bf16", f"{short(peak['bf16'])}FLOP/s in a matrix product on the CPU", advice),
        DoctorRow(
            "malloc",
            "glibc keeps freed memory for the next step" if keeps_memory else "not glibc: freed memory is returned",
        ),
        DoctorRow(
            "denormals",
            "flushed to 0 in training" if device.flush_denormals() else "not flushed: this processor cannot skip them",
        ),
    ]


def _kernels() -> list[DoctorRow]:
    """Return the implementation of each kernel on this machine, and its speedup over the baseline."""
    kernel_choice.check_forced()
    missing = native.why_not()
    compiler = (
        DoctorRow("compiler", "not usable", f"{missing}: training works without it, and is slower") if missing else None
    )
    rows = [compiler or DoctorRow("compiler", "native kernels are compiled")]
    tables = (
        attention.ATTENTION,
        cross_entropy.KERNEL,
        fused.NORM,
        fused.LAYER_NORM,
        fused.HEADS,
        fused.ACTIVATION,
        positions.COLUMNS,
        fused.ONE_ROW,
    )
    every = [kernel for table in tables for kernel in table.values()] + [
        muon.KERNEL,
        muon.MOMENTUM,
        quantized.KERNEL,
        native_decoder.DECODE,
        native_kernels.FEW_ROWS,
        native_kernels.LOGIT_SUMMARY,
        TABLE_ROWS,
        NEIGHBORS,
    ]
    for kernel in sorted(every, key=lambda kernel: kernel.name):
        choice, took = kernel.choice(), kernel_choice.seconds(kernel)
        plain = next(name for name in kernel.choices if name in took)
        faster = choice != plain and choice in took
        rows.append(
            DoctorRow(
                kernel.name, choice, f"{took[plain] / took[choice]:.1f} times as fast as {plain}" if faster else ""
            )
        )
    return rows


def _memory() -> DoctorRow:
    total, free = device.memory()
    value = f"{free / 1e9:.1f} GB free of {total / 1e9:.1f}"
    if free < 2e9:
        return DoctorRow(
            "memory",
            value,
            "a 14 M model at 16 x 256 tokens needs 2 GB: close other programs, or lower batch.size",
            False,
        )
    return DoctorRow("memory", value, f"AdamW takes 16 bytes a weight: at most about {short(free / 16 / 2)} parameters")


def _disk(directory: Path) -> DoctorRow:
    usage = shutil.disk_usage(directory)
    ok = usage.free > 5e9
    advice = "" if ok else "the corpora and a few checkpoints need 5 GB: free some"
    return DoctorRow("disk", f"{usage.free / 1e9:.0f} GB free of {usage.total / 1e9:.0f}", advice, ok)


def _device() -> DoctorRow:
    chosen = device.default_device()
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        chosen_precision = device.choose_precision("auto", chosen)
        return DoctorRow(
            "device",
            f"cuda: {properties.name}, {properties.total_memory / 1e9:.0f} GB",
            f"training will use it in {chosen_precision}, whose peak is {short(measure_peak('cuda', chosen_precision))}FLOP/s",
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
