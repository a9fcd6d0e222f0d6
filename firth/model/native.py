"""Native CPU kernels and the differentiable operations that use them.

Native CPU kernels (`native.c`, `decode.c`, `logits.c`): compiled once with the C compiler of the machine, called through ctypes.

Between its matrix products, a training step is bound by memory: with torch's operators, a norm or a squared ReLU reads and
writes its input three to ten times. `native.c` does each in one pass. It is optional: without a compiler, or if it fails,
the same formulas run with torch's operators (`firth.model.fused`), and `firth doctor` reports it.

The library is cached in CACHE/native under a hash of its source, the compiler and the CPU, and one of its content, since a damaged
one (a power failure, a full disk) could end the process. It shares torch's OpenMP threads:
torch has loaded a libgomp before, and the linker uses the loaded one.

Differentiable norms, heads and activations with the kernels of `native.c`.

Each is one pass over memory forward and one backward. `firth.model.fused` decides when they run, and has the same formulas
with torch's operators. All take fp32 or bf16 on a CPU, and compute in fp32.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache as once
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from firth import kernel_choice
from firth.io.atomic import cache_directory
from firth.types import UserError

SOURCES = tuple(Path(__file__).with_name(name) for name in ("native.c", "decode.c", "logits.c"))

HEADERS = tuple(Path(__file__).with_name(name) for name in ("native.h", "vectors.h", "int8.h", "meeting.h"))

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
    "summarize": (POINTER, LONG, LONG, POINTER, POINTER, INT),
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
"""Function of SOURCES -> types of its arguments."""


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


class _NoComputation:
    """In place of the library: every kernel returns without reading or writing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


_stand_in: Any = None


@contextmanager
def without_computation() -> Iterator[None]:
    """Let kernels do nothing within the block, for tensors without data (`firth.training.memory`)."""
    global _stand_in
    before, _stand_in = _stand_in, _NoComputation()
    try:
        yield
    finally:
        _stand_in = before


def library() -> ctypes.CDLL:
    """Return the compiled kernels, compiling them if necessary.

    Raises:
        NoCompilerError: There is no compiler, or it fails.
    """
    if _stand_in is not None:
        return _stand_in
    found, reason = _outcome()
    if found is None:
        raise NoCompilerError(
            f"no native kernels: {reason}: install gcc or clang, or remove them from {kernel_choice.FORCE}"
        )
    return found


def why_not() -> str:
    """Return why native kernels are not available; empty if they are."""
    return _outcome()[1]


kernel_choice.LIMITATIONS.append(lambda: "no native kernels" if why_not() else "")


def build() -> Path:
    """Compile SOURCES, unless that has been done for this compiler and CPU; return the library's path.

    Raises:
        NoCompilerError: No compiler is found, or it fails with every tuning.
        OSError: The cache cannot be written.
    """
    command = shlex.split(os.environ.get("CC") or "cc")
    compiler = shutil.which(command[0]) if command else None
    if compiler is None or sys.platform == "win32":
        raise NoCompilerError("no C compiler is found")
    command[0] = compiler
    key = "\n".join(
        (
            *(path.read_text("utf-8") for path in (*HEADERS, *SOURCES)),
            *FLAGS,
            str(TUNINGS),
            *command[1:],
            _run(*command, "--version").stdout,
            _instructions(),
        )
    )
    folder, name = cache_directory() / "native", _hash(key.encode())
    for path in folder.glob(f"{name}-*.so"):
        if path.stem == f"{name}-{_hash(path.read_bytes())}":
            return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as directory:
        output = Path(directory) / "native.so"
        for tuning in TUNINGS:
            result = _run(*command, *FLAGS, *tuning, "-o", str(output), *map(str, SOURCES), "-lm")
            if result.returncode == 0:
                return output.replace(folder / f"{name}-{_hash(output.read_bytes())}.so")
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    raise NoCompilerError(f"{compiler} fails: {lines[0]}")


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


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


ACTIVATIONS = {"relu": 0, "relu2": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
"""Name in `firth.model.block` -> number in native.c."""


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gain: Tensor | None, offset: Tensor | None, eps: float, center: bool, dtype: torch.dtype
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch.empty(rows.shape, dtype=dtype)
        count, width = rows.shape
        inverse = torch.empty(count)
        mean = torch.empty(count) if center else None
        library().norm_forward(
            rows.data_ptr(), half(rows), y.data_ptr(), half(y), address(gain), address(offset), address(mean),
            inverse.data_ptr(), count, width, eps, center, threads(),
        )  # fmt: skip
        ctx.normal_form = gain is None and offset is None
        # Without a gain the gradient needs only the output, which the next linear map keeps anyway.
        ctx.save_for_backward(y if ctx.normal_form else rows, gain, mean, inverse)
        ctx.center, ctx.dtype, ctx.has_offset = center, x.dtype, offset is not None
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, gain, mean, inverse = ctx.saved_tensors
        rows = grad.reshape(saved.shape).contiguous()
        count, width = saved.shape
        dx = torch.empty(saved.shape, dtype=ctx.dtype)
        dgain = torch.zeros(width) if gain is not None and ctx.needs_input_grad[1] else None
        doffset = torch.zeros(width) if ctx.has_offset and ctx.needs_input_grad[2] else None
        library().norm_backward(
            rows.data_ptr(), half(rows), saved.data_ptr(), half(saved), ctx.normal_form, address(gain), address(mean),
            inverse.data_ptr(), dx.data_ptr(), half(dx), address(dgain), address(doffset), count, width, ctx.center,
            threads(),
        )  # fmt: skip
        return dx.view(grad.shape), dgain, doffset, None, None, None


def norm(
    x: Tensor, gain: Tensor | None, offset: Tensor | None, eps: float, center: bool, dtype: torch.dtype | None = None
) -> Tensor:
    """Return the RMS norm of x, or its layer norm with `center`: (..., width) -> (..., width).

    Args:
        x: fp32 or bf16.
        gain: (width,) fp32 or None.
        offset: (width,) fp32 or None.
        eps: Added to the mean square.
        center: Whether the mean is subtracted (layer norm).
        dtype: Of the result; None: that of x.
    """
    y: Tensor = _Norm.apply(x, gain, offset, eps, center, dtype or x.dtype)
    return y


class _Heads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        joined: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        eps: float,
        queries: int,
        keys: int,
        width: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        joined = joined.contiguous()
        batch, length = joined.shape[:2]
        q, k, v = (joined.new_empty(batch, n, length, width) for n in (queries, keys, keys))
        inverse = torch.empty(batch, length, queries + keys) if eps >= 0 else None
        each = cos is not None and len(cos) > 1
        ctx.sizes = (batch, length, queries, keys, width)
        library().heads_forward(
            joined.data_ptr(), half(joined), q.data_ptr(), k.data_ptr(), v.data_ptr(), address(cos), address(sin), each,
            eps, address(inverse), *ctx.sizes, threads(),
        )  # fmt: skip
        ctx.save_for_backward(joined if eps >= 0 else None, cos, sin, inverse)
        ctx.eps, ctx.each, ctx.dtype = eps, each, joined.dtype
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        joined, cos, sin, inverse = ctx.saved_tensors
        batch, length, queries, keys, width = ctx.sizes
        inputs = [g if g.stride(-1) == 1 else g.contiguous() for g in (x.to(ctx.dtype) for x in grads)]
        out = torch.empty(batch, length, (queries + 2 * keys) * width, dtype=ctx.dtype)
        strides = longs([n for g in inputs for n in g.stride()[:3]])
        library().heads_backward(
            *(g.data_ptr() for g in inputs), ctypes.addressof(strides), address(joined), half(out), out.data_ptr(),
            address(cos), address(sin), ctx.each, ctx.eps, address(inverse), *ctx.sizes, threads(),
        )  # fmt: skip
        return out, None, None, None, None, None, None


def heads(
    joined: Tensor, rope: tuple[Tensor, Tensor] | None, eps: float, queries: int, keys: int, width: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Split concatenated queries, keys and values into heads, with unit RMS and rotary positions.

    Args:
        joined: (B, T, (queries + 2 keys) width), fp32 or bf16.
        rope: Cosines (B or 1, T, 1, width) and sines (B or 1, T, 1, width / 2), fp32; None: no rotation.
        eps: Of the norm of queries and keys; negative: no norm.
        queries: Number of query heads.
        keys: Number of key heads, and of value heads.
        width: Width of a head.

    Returns:
        (B, queries, T, width) and two of (B, keys, T, width), contiguous.
    """
    cos, sin = (None, None) if rope is None else (x.contiguous() for x in rope)
    q, k, v = _Heads.apply(joined, cos, sin, eps, queries, keys, width)
    return q, k, v


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: int, gated: bool) -> Tensor:
        x = x.contiguous()
        width = x.shape[-1] // (2 if gated else 1)
        y = x.new_empty(*x.shape[:-1], width)
        ctx.settings = (kind, gated, y.numel() // max(1, width), width)
        library().activation_forward(kind, x.data_ptr(), y.data_ptr(), half(x), gated, *ctx.settings[2:], threads())
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        kind, gated, *sizes = ctx.settings
        grad, dx = grad.to(x.dtype).contiguous(), torch.empty_like(x)
        library().activation_backward(
            kind, grad.data_ptr(), x.data_ptr(), dx.data_ptr(), half(x), gated, *sizes, threads()
        )
        return dx, None, None


def activation(name: str, x: Tensor, gated: bool = False) -> Tensor:
    """Return act(x), or act(gate) * up of x = [gate, up]: (..., width or 2 width) -> (..., width).

    Args:
        name: One of ACTIVATIONS.
        x: fp32 or bf16.
        gated: Whether x is the concatenation of gate and up.
    """
    y: Tensor = _Activation.apply(x, ACTIVATIONS[name], gated)
    return y


def one_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x @ weight' + bias of a single row, without gradients: (..., in) -> (..., out).

    Args:
        x: fp32 or bf16, one row.
        weight: (out, in), of the same dtype.
        bias: (out,) of the same dtype, or None.
    """
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.to(x.dtype).contiguous()
    y = x.new_empty(*x.shape[:-1], len(weight))
    library().linear(
        x.data_ptr(), weight.data_ptr(), address(bias), y.data_ptr(), half(x), 1, x.shape[-1], len(weight),
        threads(),
    )  # fmt: skip
    return y


class _Columns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        x, index = x.contiguous(), index.contiguous()
        batch, heads, rows, columns = x.shape
        keys = index.shape[-1]
        y = x.new_empty(batch, heads, rows, keys)
        ctx.step = index.stride(0) if len(index) > 1 else 0
        ctx.sizes = (batch, heads, rows, columns, keys)
        library().columns_forward(
            x.data_ptr(), half(x), index.data_ptr(), ctx.step, y.data_ptr(), *ctx.sizes, threads()
        )
        ctx.save_for_backward(index)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        grad = grad.contiguous()
        dx = grad.new_empty(ctx.sizes[:4])
        library().columns_backward(
            grad.data_ptr(), half(grad), index.data_ptr(), ctx.step, dx.data_ptr(), *ctx.sizes, threads()
        )
        return dx, None


def columns(x: Tensor, index: Tensor) -> Tensor:
    """Return x.gather(-1, index), with the same index for all heads.

    Args:
        x: (B, H, T, columns), fp32 or bf16.
        index: (B or 1, T, S) int64, each at least 0 and less than `columns`.

    Returns:
        (B, H, T, S).
    """
    y: Tensor = _Columns.apply(x, index)
    return y


class _Neighbors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, left: Tensor, right: Tensor) -> Tensor:
        x, left, right = x.contiguous(), left.contiguous(), right.contiguous()
        y = torch.empty_like(x)
        library().neighbors_forward(x.data_ptr(), left.data_ptr(), right.data_ptr(), y.data_ptr(), *x.shape, threads())
        ctx.save_for_backward(left, right)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        left, right = ctx.saved_tensors
        grad = grad.contiguous()
        dx = torch.empty_like(grad)
        library().neighbors_backward(
            grad.data_ptr(), left.data_ptr(), right.data_ptr(), dx.data_ptr(), *grad.shape, threads()
        )
        return dx, None, None


def neighbors(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Return the mean of each word's neighbors without the word itself; zeros if it has none.

    Args:
        x: (B, T, width) fp32.
        left: Number of neighbors before each word, (B, T) int64, within its row.
        right: Number of neighbors after it, (B, T) int64.

    Returns:
        (B, T, width).
    """
    y: Tensor = _Neighbors.apply(x, left, right)
    return y
