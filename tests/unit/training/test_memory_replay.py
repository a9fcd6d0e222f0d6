"""The heap of a process, found by repeating its allocations, and what recurrent layers and bf16 products keep."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import nn

from firth.training.device import KEPT_MEMORY
from firth.training.heap import heap_bytes
from firth.training.memory import KERNEL_BLOCK, KERNEL_BLOCKS, memory_trace

glibc = pytest.mark.skipif(not KEPT_MEMORY, reason="malloc is not glibc's")
MB = 1 << 20


@glibc
def test_the_heap_of_blocks_that_fit_their_holes() -> None:
    """Freed neighbors become one block, which takes a larger one."""
    sizes, events = [4 * MB, 4 * MB, 6 * MB], [1, 2, -1, -2, 3]
    found = heap_bytes(sizes, events, KEPT_MEMORY)
    assert found is not None and 8 * MB <= found < 8.2 * MB


@glibc
def test_the_heap_of_a_pinned_hole() -> None:
    """A block that stays between two holes keeps them apart, so the larger one lies at the end."""
    sizes, events = [4 * MB, 4096, 4 * MB, 6 * MB], [1, 2, 3, -1, -3, 4]
    found = heap_bytes(sizes, events, KEPT_MEMORY)
    assert found is not None and 10 * MB <= found < 10.2 * MB  # the last hole grows at the end of the heap
    assert heap_bytes(sizes, events, ()) is None


@pytest.mark.parametrize("length", [5, 40])
def test_a_trace_has_what_a_recurrent_layer_keeps(length: int) -> None:
    """Bytes that are live after a forward pass without data are those of a real one."""
    layer, x = nn.LSTM(12, 24, batch_first=True), torch.zeros(3, length, 12)
    kept: list[int] = []

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept.append(saved.untyped_storage().nbytes())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        layer(x)
    with memory_trace(torch.device("cpu")) as trace:
        layer, x = nn.LSTM(12, 24, batch_first=True), torch.zeros(3, length, 12)
        out = layer(x)
    assert out is not None
    assert max(trace.sizes) == pytest.approx(max(kept), rel=0.05)


REAL_KERNELS = """
import ctypes, torch
class Info(ctypes.Structure):
    _fields_ = [(str(i), ctypes.c_size_t) for i in range(10)]
library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
def used():
    found = library.mallinfo2()
    return getattr(found, "7") + getattr(found, "4")
weight = torch.zeros(192, 96, dtype=torch.bfloat16)
def product(rows):
    torch.nn.functional.linear(torch.zeros(rows, 96, dtype=torch.bfloat16), weight)
product(3)
before = used()
for rows in range(101, 401, 10):
    product(rows)
print((used() - before) / 30)
"""


@glibc
def test_bytes_that_a_product_of_a_new_shape_keeps() -> None:
    done = subprocess.run([sys.executable, "-c", REAL_KERNELS], capture_output=True, text=True, check=True)
    measured = float(done.stdout)
    if measured < 100_000:
        pytest.skip("this CPU has no compiled bf16 kernels")
    assert measured == pytest.approx(KERNEL_BLOCK * KERNEL_BLOCKS, rel=0.15)
