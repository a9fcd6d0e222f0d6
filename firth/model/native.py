"""Native CPU kernels (`native.c`, `decode.c`): compiled once with the C compiler of the machine, called through ctypes.

Between its matrix products, a training step is bound by memory: with torch's operators, a norm or a squared ReLU reads and
writes its input three to ten times. `native.c` does each in one pass. It is optional: without a compiler, or if it fails,
the same formulas run with torch's operators (`firth.model.fused`), and `firth doctor` reports it.

The library is cached in CACHE/native under a hash of its source, the compiler and the CPU. It shares torch's OpenMP threads:
torch has loaded a libgomp before, and the linker uses the loaded one.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache as once
from pathlib import Path

import torch
from torch import Tensor

from firth import kernel_choice
from firth.io.cache import cache
from firth.types import UserError

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.c", "decode.c"))

HEADER = Path(__file__).with_name("native.h")

FLAGS = (
    "-O3",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-fvisibility=hidden",
    "-shared",
    "-fPIC",
)
"""No -ffast-math: NaN must stay visible."""

TUNINGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
"""Compiler options for the CPU; the first that the compiler accepts are used. Those of x86 come first."""

COMPILE_TIMEOUT_SECONDS = 120
"""Time limit for the compiler, which takes about 2 seconds."""

DTYPES = (torch.float32, torch.bfloat16)
"""dtypes of the kernels."""

POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float

ARGUMENTS = {
    "norm_forward": (POINTER, INT, POINTER, INT, *4 * (POINTER,), LONG, LONG, FLOAT, INT, INT),
    "norm_backward": (
        POINTER,
        INT,
        POINTER,
        INT,
        INT,
        *3 * (POINTER,),
        POINTER,
        INT,
        POINTER,
        POINTER,
        LONG,
        LONG,
        INT,
        INT,
    ),
    "heads_forward": (POINTER, INT, *5 * (POINTER,), INT, FLOAT, POINTER, *5 * (LONG,), INT),
    "heads_backward": (*5 * (POINTER,), INT, *3 * (POINTER,), INT, FLOAT, POINTER, *5 * (LONG,), INT),
    "activation_forward": (INT, POINTER, POINTER, INT, INT, LONG, LONG, INT),
    "activation_backward": (INT, POINTER, POINTER, POINTER, INT, INT, LONG, LONG, INT),
    "softmax_forward": (POINTER, INT, POINTER, POINTER, POINTER, INT, POINTER, FLOAT, INT, *5 * (LONG,), INT),
    "softmax_backward": (POINTER, POINTER, INT, FLOAT, LONG, LONG, INT),
    "linear": (*4 * (POINTER,), INT, LONG, LONG, LONG, INT),
    "decode": (POINTER, POINTER, INT),
    "few_rows": (*3 * (POINTER,), LONG, INT, INT),
    "momentum": (POINTER, POINTER, POINTER, INT, FLOAT, LONG, INT),
    "apply": (POINTER, POINTER, INT, FLOAT, FLOAT, LONG, INT),
    "columns_forward": (POINTER, INT, POINTER, LONG, POINTER, *5 * (LONG,), INT),
    "columns_backward": (POINTER, INT, POINTER, LONG, POINTER, *5 * (LONG,), INT),
    "adamw_rows": (*6 * (POINTER,), *5 * (FLOAT,), LONG, LONG, INT),
    "sum_rows": (*5 * (POINTER,), *3 * (LONG,), INT),
    "neighbors_forward": (*4 * (POINTER,), *3 * (LONG,), INT),
    "neighbors_backward": (*4 * (POINTER,), *3 * (LONG,), INT),
    "cross_entropy": (POINTER, INT, *3 * (POINTER,), LONG, FLOAT, FLOAT, INT, POINTER, POINTER, LONG, LONG, INT),
}
"""Function of native.c or decode.c -> types of its arguments."""


class NoCompilerError(UserError, RuntimeError):
    """Native kernels are not available; the message says why. `kernels.Kernel` skips choices that raise it."""


@once
def _outcome() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None and why there is none."""
    try:
        library = ctypes.CDLL(str(build()))
    except (OSError, NoCompilerError) as error:
        return None, str(error)
    for name, types in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library, ""


def library() -> ctypes.CDLL:
    """Return the compiled kernels, compiling them if necessary.

    Raises:
        NoCompilerError: There is no compiler, or it fails.
    """
    found, reason = _outcome()
    if found is None:
        raise NoCompilerError(
            f"no native kernels: {reason}: install gcc or clang, or remove them from {kernel_choice.FORCE}"
        )
    return found


def why_not() -> str:
    """Return why native kernels are not available; empty if they are."""
    return _outcome()[1]


def build() -> Path:
    """Compile SOURCES, unless that has been done for this compiler and CPU; return the library's path.

    Raises:
        NoCompilerError: No compiler is found, or it fails with every tuning.
        OSError: The cache cannot be written.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None or sys.platform == "win32":
        raise NoCompilerError("no C compiler is found")
    key = "\n".join(
        (
            *(path.read_text("utf-8") for path in (HEADER, *SOURCES)),
            *FLAGS,
            str(TUNINGS),
            _run(compiler, "--version").stdout,
            _instructions(),
        )
    )
    path = cache() / "native" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as directory:
        output = Path(directory) / "native.so"
        for tuning in TUNINGS:
            result = _run(compiler, *FLAGS, *tuning, "-o", str(output), *map(str, SOURCES), "-lm")
            if result.returncode == 0:
                os.replace(output, path)
                return path
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    raise NoCompilerError(f"{compiler} fails: {lines[0]}")


def _instructions() -> str:
    """Return the CPU model and its instruction sets: a library compiled for another one would crash the process."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text("utf-8", "replace").splitlines() if listing.exists() else []
    found = {line for line in lines if line.startswith(("flags", "Features", "CPU part"))}
    return "\n".join((kernel_choice.cpu(), *sorted(found)))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_SECONDS, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise NoCompilerError(f"{command[0]} takes more than {COMPILE_TIMEOUT_SECONDS} seconds") from error


def supports(*tensors: Tensor | None) -> bool:
    """Return whether the kernels can run on these tensors: on a CPU, in one of DTYPES, outside of torch.compile."""
    return not torch.compiler.is_compiling() and all(
        x is None or (x.device.type == "cpu" and x.dtype in DTYPES) for x in tensors
    )


def worthwhile(x: Tensor) -> bool:
    """Return whether to call a kernel for x: always, except for one fp32 row without gradients (decoding).

    With and without gradients the same kernel runs, since a policy and its reference model are compared.
    """
    return torch.is_grad_enabled() or x.numel() > x.shape[-1] or x.dtype == torch.bfloat16


def half(x: Tensor) -> int:
    """Return the flag of a tensor's dtype: 1 for bf16, 0 for fp32."""
    return int(x.dtype == torch.bfloat16)


def address(x: Tensor | None) -> int | None:
    """Return the data pointer of a tensor; None for None."""
    return None if x is None else x.data_ptr()


def longs(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Return numbers as a C array, which must be kept alive until the call returns."""
    return (LONG * len(numbers))(*numbers)


def threads() -> int:
    """Return the number of threads of a kernel: that of torch."""
    return torch.get_num_threads()
