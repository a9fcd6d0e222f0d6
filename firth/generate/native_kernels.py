"""Compiled kernels of a decoding step (`firth/model/decode.c`), for CPUs: linear layers of a few rows, and the summary of logits.

>>> summarize(torch.tensor([[0.0, 2.0, 1.0]]), "torch")
(tensor([1]), tensor([2.4076]))
"""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from firth import kernel_choice
from firth.model import native

POINTER, LONG = ctypes.c_void_p, ctypes.c_int64

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""dtype of weights, keys and values -> its number in vectors.h."""

INT8 = 2
"""Number of int8 weights in panels (`firth.generate.quantized.quantize_groups`)."""


CALL_ROWS = 1024
"""Most rows of a call: each thread holds rounded copies of them, or a few sums of each."""


class LinearMap(ctypes.Structure):
    """`Map` in decode.c."""

    _fields_ = [("weight", POINTER), ("steps", POINTER), ("bias", POINTER), ("input", LONG), ("output", LONG), ("kind", LONG)]  # fmt: skip


def few_rows(
    x: Tensor,
    weight: Tensor,
    steps: Tensor | None = None,
    bias: Tensor | None = None,
    outputs: int = 0,
    tiles: bool = False,
) -> Tensor:
    """Return x @ weight.T + bias: (rows, out) float32.

    Args:
        x: (rows, in) float32, contiguous.
        weight: (out, in) float32 or bfloat16, contiguous; or int8 in panels (`firth.generate.quantized.quantize_groups`).
        steps: The scales of int8 weights.
        bias: (out,) float32.
        outputs: The number of outputs of int8 weights.
        tiles: Whether to use matrix instructions (AMX), which round activations to 16 bits; for bfloat16 only.

    Raises:
        NoCompilerError: There are no compiled kernels, or none with matrix instructions.
    """
    library = native.library()
    if tiles and not library.has_tiles():
        raise native.NoCompilerError("this machine has no matrix instructions")
    outputs = outputs if steps is not None else len(weight)
    y = x.new_empty(len(x), outputs)
    linear = LinearMap(
        weight.data_ptr(), native.address(steps), native.address(bias), x.shape[1], outputs, DTYPE_CODES.get(weight.dtype, INT8)
    )  # fmt: skip
    for at in range(0, len(x), CALL_ROWS):
        some = x[at : at + CALL_ROWS]
        library.few_rows(
            ctypes.addressof(linear), some.data_ptr(), y[at:].data_ptr(), len(some), tiles, native.threads()
        )
    return y


def _linear_workload(way: str) -> kernel_choice.Workload:
    """Sixteen rows times 8 matrices of 512 x 2048 in bf16."""
    x, weights = torch.ones(16, 512), torch.ones(8, 2048, 512, dtype=torch.bfloat16).unbind()

    def work() -> None:
        for weight in weights:
            few_rows(x, weight, tiles=way == "tiles")

    return work


FEW_ROWS = kernel_choice.Kernel("few-rows", {way: partial(_linear_workload, way) for way in ("vectors", "tiles")})
"""How the compiled step multiplies five or more rows by bf16 weights."""


def summarize(logits: Tensor, way: str = "") -> tuple[Tensor, Tensor]:
    """Return the index of the largest logit and the log-sum-exp of each row.

    The sums of the compiled kernel do not depend on the number of rows.

    Args:
        logits: (rows, vocab) float32.
        way: "torch" or "native"; "" for the faster one on this machine.

    Returns:
        (rows,) int64 and (rows,) float32.
    """
    if logits.device.type != "cpu" or (way or LOGIT_SUMMARY.choice()) == "torch":
        return logits.max(-1).indices, logits.logsumexp(-1)  # argmax takes half as long again
    logits = logits.contiguous()
    best, normalizer = torch.empty(len(logits), dtype=torch.int64), torch.empty(len(logits))
    native.library().summarize(
        logits.data_ptr(), *logits.shape, best.data_ptr(), normalizer.data_ptr(), native.threads()
    )
    return best, normalizer


def _summary_workload(way: str) -> kernel_choice.Workload:
    """Four rows of 32,768 logits."""
    logits = torch.arange(4.0 * 32768).remainder(31).view(4, -1)
    return lambda: summarize(logits, way)


LOGIT_SUMMARY = kernel_choice.Kernel("logits", {way: partial(_summary_workload, way) for way in ("torch", "native")})
"""How the most likely token and the log-sum-exp of logits are computed."""
