"""Set OpenMP's wait policy, which decides how torch's threads wait for work, when firth is imported, before torch is loaded.

Between two operations the threads of a CPU pool wait for the next. By default they spin: GNU's library 300,000 times (3 to 20
milliseconds), Intel's and LLVM's 200 milliseconds. On an idle machine that saves a wake-up. On a busy machine a spinning thread
takes a core from the thread that it waits for. A short spin covers the time between two operations of a training step; then the
thread sleeps.

OpenMP reads its variables once, when its library is loaded. So they are set at the first import of firth, which imports torch
later. Programs that import torch first keep the policy that they started with.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, MutableMapping

GOMP_SPINS = 5000
"""Spins of a waiting thread of GNU's library (libgomp) before it sleeps; one takes 10 to 55 nanoseconds.

A small decoder on two cores of a Xeon, in steps/s on an idle machine and with a busy process: 300,000 spins 8.2 and 0.7; 2,000
8.2 and 5.4; 10,000 8.5 and 3.7; 50,000 9.0 and 1.8; none 7.5 and 5.9. `python -m bench.speed.busy` measures it.
"""

KMP_BLOCKTIME_MS = 1
"""Milliseconds that a waiting thread of Intel's or LLVM's library (libiomp5, libomp) spins before it sleeps.

All versions of them read whole milliseconds.
"""

GNU_VARIABLES: tuple[str, ...] = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
"""Environment variables that set how the threads of libgomp wait."""

LLVM_VARIABLES: tuple[str, ...] = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Environment variables that set how the threads of libiomp5 and libomp wait."""


def set_wait_policy(environment: MutableMapping[str, str], modules: Collection[str]) -> bool:
    """Let OpenMP's waiting threads sleep after a short spin, unless the user has configured how they wait.

    Child processes inherit the variables.

    Args:
        environment: The environment variables of this process; changed in place.
        modules: Names of the imported modules.

    Returns:
        Whether the variables take effect: False if torch, and with it OpenMP, is loaded already; then nothing is set.
    """
    if "torch" in modules:
        return False
    if not any(name in environment for name in GNU_VARIABLES):
        environment["GOMP_SPINCOUNT"] = str(GOMP_SPINS)
    if not any(name in environment for name in LLVM_VARIABLES):
        environment["KMP_BLOCKTIME"] = str(KMP_BLOCKTIME_MS)
    return True


EFFECTIVE = set_wait_policy(os.environ, sys.modules)
"""Whether firth was imported before torch, so that OpenMP has read the current variables."""
