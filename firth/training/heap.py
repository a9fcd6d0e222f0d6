"""How much memory malloc takes for the tensors of a step: their allocations are repeated on the real malloc, without data.

glibc places a tensor only in a free block that is some 100 bytes larger, and a block that stays between two others keeps them from
becoming one. So a process has more memory than its tensors, by a share that depends on the order of allocations. No formula
states it, but the allocator itself does: a small process makes the same calls and prints the highest address. Nothing is written
into the blocks, so it takes almost no memory.

The process runs this file, so nothing is imported here that takes time.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from array import array
from collections.abc import Sequence

TIMEOUT_SECONDS = 60
ALIGNMENT = 64
"""Bytes that torch aligns a tensor to."""
RECORDS = (104, 200)
"""Bytes of the objects that torch makes for the storage and for the tensor, after its data."""


def heap_bytes(sizes: Sequence[int], events: Sequence[int], settings: Sequence[tuple[int, int]]) -> int | None:
    """Return the most bytes of the heap, or None where malloc is not glibc's or the process fails.

    Args:
        sizes: Bytes of each block.
        events: n + 1: block n is allocated; -n - 1: it is freed.
        settings: Parameters of glibc's `mallopt` and their values; empty where malloc is another one.
    """
    if not settings:
        return None
    words = [len(settings), *(n for pair in settings for n in pair), len(sizes), *sizes, *events]
    command = [sys.executable, "-S", "-E", __file__]
    try:
        done = subprocess.run(
            command, input=array("q", words).tobytes(), capture_output=True, timeout=TIMEOUT_SECONDS, check=True
        )
        return int(done.stdout)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None


def _replay(words: array[int]) -> int:
    """Make the calls of `heap_bytes` and return the most bytes between the lowest and the highest address."""
    library = ctypes.CDLL(None)
    allocate, small, free = library.posix_memalign, library.malloc, library.free
    allocate.argtypes, free.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t), (ctypes.c_void_p,)
    small.argtypes, small.restype = (ctypes.c_size_t,), ctypes.c_void_p
    given = words[0]
    for i in range(given):
        library.mallopt(words[1 + 2 * i], words[2 + 2 * i])
    start = 2 + 2 * given
    sizes, events = words[start : start + words[start - 1]], words[start + words[start - 1] :]
    # Made before: lists that grow would be blocks among the others.
    places = [array("q", bytes(8 * (len(sizes) + 1))) for _ in (ALIGNMENT, *RECORDS)]
    pointer = ctypes.c_void_p()
    address = ctypes.addressof(pointer)
    low = high = 0
    for event in events:
        if event < 0:
            for place in places:
                free(place[-event] or None)
        elif sizes[event - 1]:
            if allocate(address, ALIGNMENT, sizes[event - 1]):
                raise MemoryError
            found = pointer.value or 0
            low, high = low or found, max(high, found + sizes[event - 1])
            places[0][event] = found
            for place, size in zip(places[1:], RECORDS, strict=True):
                place[event] = small(size)
    return high - low


if __name__ == "__main__":
    content = array("q")
    content.frombytes(sys.stdin.buffer.read())
    print(_replay(content))
