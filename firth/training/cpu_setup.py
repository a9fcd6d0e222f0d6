"""Process-wide CPU settings that speed up training: malloc keeps freed memory, and denormals are flushed to zero.

`train` applies both for the rest of the process.
"""

from __future__ import annotations

import ctypes
import platform

import torch

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # malloc.h
_GLIBC = platform.libc_ver()[0] == "glibc"


def keep_freed_memory() -> bool:
    """Let malloc keep freed memory instead of returning it to the kernel. Returns True on success (glibc only).

    glibc allocates blocks over 128 kB with `mmap` and returns them to the kernel when they are freed. A training step allocates
    the same activations again and again, and each time every page is faulted in and zeroed. With this setting they are reused.
    """
    if not _GLIBC:
        return False
    mallopt = ctypes.CDLL(None).mallopt
    largest = 2**31 - 1
    return all((mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, largest), mallopt(_TOP_PAD, 64 << 20)))


def flush_denormals(on: bool = True) -> bool:
    """Flush numbers below 1.2e-38 to 0 on every thread of torch. Returns True if the processor can.

    x86 computes with such numbers in microcode, about a hundred cycles each. A confident model produces them in its backward
    pass, as products of tiny probabilities and tiny gradients: a T5 drops to half of its speed within 200 steps. GPUs and
    vendors' fast modes flush them too.

    `torch.set_flush_denormal` applies to the calling thread and threads that it starts later. OpenMP's threads may exist
    already, so it is called in each, through the entry point that the libraries of gcc and Intel share.
    """
    supported: bool = torch.set_flush_denormal(on)
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if _GLIBC else None
    if supported and parallel is not None:

        def in_each_thread(_: object) -> None:
            torch.set_flush_denormal(on)

        parallel(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(in_each_thread), None, torch.get_num_threads(), 0)
    return supported
