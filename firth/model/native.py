"""The kernels of `native.c` and `decode.c`: compiled once with the C compiler that a machine has, called through ctypes.

What a training step does between its matrix products moves memory: written with torch's operators, a norm or a squared ReLU
reads and writes its input three to ten times. `native.c` does each in one pass. Nothing depends on it: where no compiler is
found, or the compiler fails, the same formulas run on torch's operators (`firth.model.fused`), and `firth doctor` says so.

The library is kept in CACHE/native, named by its source, the compiler and the CPU. It shares torch's OpenMP threads: torch has
loaded a libgomp by now, and the linker takes the one that is there.
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

from firth import kernels
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
"""No -ffast-math: what is not a number must stay visible."""

TUNINGS = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
"""Options for this CPU, the first that the compiler accepts; those of x86 come first."""

COMPILE_TIMEOUT_SECONDS = 120
"""How long a compiler may take; it takes two."""

DTYPES = (torch.float32, torch.bfloat16)
"""What the kernels read and write."""

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
"""Function of native.c or decode.c -> the types of its arguments."""


class NoCompilerError(UserError, RuntimeError):
    """There are no native kernels on this machine; the message says why. `kernels.Kernel` leaves what raises it out."""


@once
def _outcome() -> ctypes.CDLL | str:
    try:
        library = ctypes.CDLL(str(build()))
    except (OSError, NoCompilerError) as error:
        return str(error)
    for name, types in ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, None
    return library


def library() -> ctypes.CDLL:
    """Return the compiled kernels, compiling them where that has not been done yet.

    Raises:
        NoCompilerError: There is no compiler, or it fails.
    """
    found = _outcome()
    if isinstance(found, str):
        raise NoCompilerError(
            f"no native kernels: {found}: install gcc or clang, or do not ask for them in {kernels.FORCE}"
        )
    return found


def why_not() -> str:
    """Return why there are no native kernels; empty where there are."""
    found = _outcome()
    return found if isinstance(found, str) else ""


def build() -> Path:
    """Compile SOURCES, unless that has been done for this compiler and CPU; return the library's path.

    Raises:
        NoCompilerError: No compiler is found, or it fails with every tuning.
        OSError: The cache cannot be written.
    """
    compiler = shutil.which(os.environ.get("CC") or "cc")
    if compiler is None or sys.platform == "win32":
        raise NoCompilerError("no C compiler is found")
    known = "\n".join(
        (
            *(path.read_text("utf-8") for path in (HEADER, *SOURCES)),
            *FLAGS,
            str(TUNINGS),
            _run(compiler, "--version").stdout,
            _instructions(),
        )
    )
    path = cache() / "native" / f"{hashlib.sha256(known.encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as directory:
        made = Path(directory) / "native.so"
        for tuning in TUNINGS:
            done = _run(compiler, *FLAGS, *tuning, "-o", str(made), *map(str, SOURCES), "-lm")
            if done.returncode == 0:
                os.replace(made, path)
                return path
    lines = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
    raise NoCompilerError(f"{compiler} fails: {lines[0]}")


def _instructions() -> str:
    """Return every instruction set that the CPU lists: a library compiled for one more would kill the process."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text("utf-8", "replace").splitlines() if listing.exists() else []
    found = {line for line in lines if line.startswith(("flags", "Features", "CPU part"))}
    return "\n".join((kernels.cpu(), *sorted(found)))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_SECONDS, check=False, errors="replace"
        )
    except subprocess.TimeoutExpired as error:
        raise NoCompilerError(f"{command[0]} takes more than {COMPILE_TIMEOUT_SECONDS} seconds") from error


def supports(*tensors: Tensor | None) -> bool:
    """Whether the kernels can read these tensors now: on a CPU, in one of DTYPES, outside of torch.compile."""
    return not torch.compiler.is_compiling() and all(
        x is None or (x.device.type == "cpu" and x.dtype in DTYPES) for x in tensors
    )


def worthwhile(x: Tensor) -> bool:
    """Whether a kernel is called for a tensor: always, but for a single row of fp32 without gradients (a token being written).

    With gradients and without, the same text goes through the same kernel: a policy and its reference are compared.
    """
    return torch.is_grad_enabled() or x.numel() > x.shape[-1] or x.dtype == torch.bfloat16


def half(x: Tensor) -> int:
    """Return the flag of a tensor's dtype: 1 for bf16, 0 for fp32."""
    return int(x.dtype == torch.bfloat16)


def address(x: Tensor | None) -> int | None:
    """Return where a tensor's numbers are; nothing for None."""
    return None if x is None else x.data_ptr()


def longs(numbers: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """Return numbers as an array of C, which must be kept until the call is over."""
    return (LONG * len(numbers))(*numbers)


def threads() -> int:
    """Return how many threads a kernel uses: as many as torch."""
    return torch.get_num_threads()
