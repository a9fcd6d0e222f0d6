"""Choice of bf16 or fp32 by the speed of the hardware.

That a CPU supports bf16 does not mean that it is fast: without avx512_bf16 or amx it is emulated, and a matrix product takes
four times as long as in fp32. So a small product is timed in both, once per process (about 50 ms).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal

import torch

Precision = Literal["auto", "fp32", "bf16"]

MIN_SPEEDUP = 1.2
"""bf16 must be this many times as fast as fp32 to be chosen, because of the cost of casts around the products."""


def choose(wanted: Precision, device: torch.device) -> Literal["fp32", "bf16"]:
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
def measured_speed(size: int = 512, seconds: float = 0.04) -> dict[str, float]:
    """Return the best FLOP/s of a matrix product on the CPU in fp32 and bf16.

    Products of both alternate, so that other work on the machine slows both alike and does not change the choice.

    Args:
        size: Rows and columns of the matrices.
        seconds: Time to measure.
    """
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
    return {name: 2 * size**3 / least for name, least in best.items()}


def casts(precision: Literal["fp32", "bf16"], device: torch.device) -> Callable[[], AbstractContextManager[object]]:
    """Return the context of a forward pass: no-op for fp32, autocast over fp32 master weights for bf16."""
    if precision == "fp32":
        return nullcontext
    return lambda: torch.autocast(device.type, torch.bfloat16)
