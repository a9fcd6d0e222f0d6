"""How much memory malloc takes for the tensors of a step: their allocations are repeated on the real malloc, without data.

glibc places a tensor only in a free block that is some 100 bytes larger, and a block that stays between two others keeps them from
becoming one. So a process has more memory than its tensors, by a share that depends on the order of allocations. No formula
states it, but the allocator itself does: a small process makes the same calls and prints the highest address. Nothing is written
into the blocks, so it takes almost no memory.

The small blocks matter most, since they are what stays. They were recorded in real steps (torch 2.13, every call of malloc): the
objects of a tensor, the nodes of the autograd graph, which live until the end of the backward pass, and what oneDNN allocates for
a bf16 product, most of it for the code of a new shape. Where one block lies changes where all later ones do, so the calls are
repeated a few times with nodes of other sizes, and the mean counts.

The process runs this file, so nothing is imported here that takes time.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path

TIMEOUT_SECONDS = 60
ALIGNMENT = 64
"""Bytes that torch and oneDNN align a tensor to."""

Block = tuple[int, int]
"""Bytes of a block, and its alignment or 0."""

DATA = (-1, ALIGNMENT)
TENSOR: Sequence[Block] = ((96, 0), DATA, (176, 0), (24, 0))
"""Blocks of a tensor: its storage, its data, itself, its version counter."""
NODES: Sequence[Sequence[Block]] = (
    ((16, 0), (472, 0)),
    ((16, 0), (472, 0), (184, 0)),
    ((16, 0), (488, 0), (24, 0)),
    ((16, 0), (464, 0), (24, 0), (16, 0), (184, 0)),
)
"""Blocks of a node of the autograd graph; one entry for each repetition."""
PRODUCT: Sequence[Block] = (
    *(4 * ((2144, ALIGNMENT), (32, 0))), *(8 * ((768, ALIGNMENT), (32, 0))),
    *(4 * ((824, ALIGNMENT), (8, 0), (56, ALIGNMENT), (32, 0))), *(2 * ((16, ALIGNMENT), (32, ALIGNMENT), (40, 0))),
    (104, 0), (64, 0), (136, 0), (600, 0), (24, 0), (48, 0), (96, ALIGNMENT), (48, ALIGNMENT), (481, 0),
)  # fmt: skip
"""Blocks that a bf16 product needs while it runs."""


def _read_scripts() -> list[list[tuple[int, int, bool]]]:
    """Return the recorded calls for products of new shapes: (bytes, alignment, kept), or (-N - 1, 0, False) to free block N."""
    lines = Path(__file__).with_name("product_allocations.txt").read_text("utf-8").splitlines()

    def call(word: str) -> tuple[int, int, bool]:
        if word.startswith("-"):
            return int(word) - 1, 0, False
        return int(word.rstrip("@+")), ALIGNMENT * ("@" in word), word.endswith("+")

    return [[call(word) for word in line.split()] for line in lines if not line.startswith("#")]


COMPILING = _read_scripts()
"""Calls of malloc for products of new shapes; each one takes the next entry, in turns."""
COMPILED_BYTES = sum(size for script in COMPILING for size, _, kept in script if kept) // len(COMPILING)
"""Bytes that are kept for a new shape, on average."""

IS_TENSOR, IS_NODE, IS_PRODUCT, IS_COMPILED = range(4)
"""Kinds of allocations."""


def heap_bytes(
    sizes: Sequence[int], events: Sequence[int], settings: Sequence[tuple[int, int]], kinds: Sequence[int] = ()
) -> int | None:
    """Return the most bytes of the heap, or None where malloc is not glibc's or the process fails.

    Args:
        sizes: Bytes of each allocation.
        events: n + 1: allocation n is made; -n - 1: it is freed.
        settings: Parameters of glibc's `mallopt` and their values; empty where malloc is another one.
        kinds: Kind of each allocation; all are tensors by default.
    """
    if not settings:
        return None
    kinds = kinds or [IS_TENSOR] * len(sizes)
    words = [len(settings), *(n for pair in settings for n in pair), len(sizes), *sizes, *kinds, *events]
    command = [sys.executable, "-S", "-E", __file__]
    try:
        done = subprocess.run(
            command, input=array("q", words).tobytes(), capture_output=True, timeout=TIMEOUT_SECONDS, check=True
        )
        found = [int(line) for line in done.stdout.split()]
        return sum(found) // len(found)
    except (OSError, ValueError, ZeroDivisionError, subprocess.SubprocessError):
        return None


def _replay(words: array[int], node: Sequence[Block]) -> int:
    """Make the calls of `heap_bytes` and return the most bytes between the lowest and the highest address."""
    library = ctypes.CDLL(None)
    aligned, plain, release = library.posix_memalign, library.malloc, library.free
    aligned.argtypes, release.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t), (ctypes.c_void_p,)
    plain.argtypes, plain.restype = (ctypes.c_size_t,), ctypes.c_void_p
    given = words[0]
    for i in range(given):
        library.mallopt(words[1 + 2 * i], words[2 + 2 * i])
    start = 2 + 2 * given
    count = words[start - 1]
    sizes, kinds, events = (
        words[start : start + count],
        words[start + count : start + 2 * count],
        words[start + 2 * count :],
    )
    blocks = {IS_TENSOR: TENSOR, IS_NODE: node, IS_PRODUCT: PRODUCT, IS_COMPILED: ()}
    # Made before: lists that grow would be blocks among the others.
    places = [array("q", bytes(8 * (count + 1))) for _ in range(max(map(len, blocks.values())))]
    compiled = array("q", bytes(8 * max(map(len, COMPILING))))
    pointer = ctypes.c_void_p()
    address = ctypes.addressof(pointer)
    low = high = number = 0

    def allocate(size: int, alignment: int) -> int:
        if not alignment:
            return plain(size) or 0
        if aligned(address, alignment, size):
            raise MemoryError
        return pointer.value or 0

    for event in events:
        if event < 0:
            for place in places:
                if not place[-event]:
                    break
                release(place[-event])
                place[-event] = 0
            continue
        size, kind = sizes[event - 1], kinds[event - 1]
        if kind == IS_TENSOR and not size:
            continue
        if kind == IS_COMPILED:
            script, made = COMPILING[number % len(COMPILING)], 0
            number += 1
            for own, alignment, kept in script:
                if own < 0:
                    release(compiled[-own - 1])
                    compiled[-own - 1] = 0
                else:
                    found = allocate(own, alignment)
                    high = max(high, found + own)
                    compiled[made] = 0 if kept else found
                    made += 1
            for i in range(made):
                release(compiled[i] or None)
        for place, (own, alignment) in zip(places, blocks[kind], strict=False):
            needed = size if own < 0 else own
            found = place[event] = allocate(needed, alignment)
            low, high = low or found, max(high, found + needed)
    return high - low


def _main() -> None:
    """Repeat the calls once for each entry of NODES, each time in a process of its own, and print the bytes."""
    content = array("q")
    content.frombytes(sys.stdin.buffer.read())
    for node in NODES:
        child = os.fork()
        if not child:
            os.write(1, b"%d\n" % _replay(content, node))
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            raise SystemExit(1)


if __name__ == "__main__":
    _main()
