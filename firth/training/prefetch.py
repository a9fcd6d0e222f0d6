"""Build the batches of the next step in a thread while the current step runs.

Batches are a function of the step, so losses are the same bit for bit, and a batch that was built but not trained on is built
again after a resume. Sources that depend on the current model (`Source.on_policy`) are read after the previous step instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from firth.types import Batch


class Prefetcher:
    """Builds the batches of a step ahead of time.

    A context manager: its thread ends on exit, after the batch that it is building.

    Args:
        make: Step -> its batches; a function of the step only that no other thread calls at the same time.
        enabled: Whether batches are built ahead; if False, `take` builds them.
    """

    def __init__(self, make: Callable[[int], list[Batch]], enabled: bool = True) -> None:
        self._make, self._enabled = make, enabled
        self._thread = ThreadPoolExecutor(1, "firth-batches", initializer=use_one_thread)
        self._next: tuple[int, Future[list[Batch]]] | None = None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=True)

    def take(self, step: int) -> list[Batch]:
        """Return the batches of a step, or raise the exception of the thread that built them."""
        if self._next is None or self._next[0] != step:
            return self._make(step)
        future, self._next = self._next[1], None
        return future.result()

    def begin(self, step: int) -> None:
        """Start to build the batches of a step."""
        if self._enabled:
            self._next = step, self._thread.submit(self._make, step)


def use_one_thread() -> None:
    """Let torch use one thread for operations of the calling thread only.

    `torch.set_num_threads` would also affect MKL and later threads; OpenMP's own setting is per thread.
    """
    torch.get_num_threads()  # torch sets the number of a thread at its first call there, and only then
    set_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_threads is not None:
        set_threads(1)
