"""What the operating system and the processor do by default that costs a training step on a CPU a good part of its time.

Both are asked for by `train`, for the rest of the process.
"""

from __future__ import annotations

import ctypes
import platform

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h
_GLIBC = platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> bool:
    """Let malloc keep what it frees instead of handing it back to the kernel; True where it could be asked (glibc).

    glibc serves blocks over 128 kB by `mmap` and returns them when they are freed. A training step allocates the same
    activations again and again, and each time every page is faulted in and zeroed anew. Told not to, malloc reuses them.
    """
    if not _GLIBC:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    largest = 2**31 - 1
    return all((mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, largest), mallopt(_TOP_PAD, 64 << 20)))


def flush_denormals(on: bool = True) -> bool:
    """Let numbers below 1.2e-38 be 0, on each of torch's threads; True where the processor can.

    x86 computes with such numbers in microcode, some hundred cycles each. A model that has learnt to be sure makes them in
    its backward pass, where a tiny probability meets a tiny gradient: a T5 slows down to half of its speed within 200
    steps, and nothing shows why. GPUs and vendors' fast modes treat them as 0 too.

    `torch.set_flush_denormal` speaks for the thread that calls it, and those that it starts later. OpenMP's threads may be
    there already, so each is asked, through the entry point that gcc's and Intel's libraries share.
    """
    able: bool = torch.set_flush_denormal(on)
    everyone = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if _GLIBC else None
    if able and everyone is not None:

        def each(_: object) -> None:
            torch.set_flush_denormal(on)

        everyone(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(each), None, torch.get_num_threads(), 0)
    return able
