"""Keep freed memory instead of handing it back to the kernel: on glibc, the cheapest speed there is on a CPU.

glibc serves blocks over 128 kB by `mmap` and returns them when they are freed. A training step allocates the same
activations again and again, and each time every page is faulted in and zeroed anew. Told not to, malloc reuses them.
"""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Let malloc keep what it frees, for the rest of the process; True where it could be asked (Linux with glibc)."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    largest = 2**31 - 1
    return all((mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, largest), mallopt(_TOP_PAD, 64 << 20)))
