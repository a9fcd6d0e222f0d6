"""Make the batches of the next step in a thread while the present step runs.

Batches are a function of the step alone, so it does not matter who makes them, and when: losses are the same bit for bit, and
a batch that was made and not trained on is made again after a resume. Sources that depend on the model in training
(`Source.on_policy`) are read when the step before has ended.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from firth.types import Batch


class Prefetcher:
    """The batches of each step, made ahead.

    Used as a context manager: the thread ends with it, after the batch that it is at.

    Args:
        make: Step -> its batches. A function of the step alone that no other thread calls meanwhile.
        enabled: Whether batches are made ahead; False makes them when they are taken.
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
        """Return the batches of a step; what making them raised is raised here."""
        if self._next is None or self._next[0] != step:
            return self._make(step)
        future, self._next = self._next[1], None
        return future.result()

    def begin(self, step: int) -> None:
        """Begin to make the batches of a step."""
        if self._enabled:
            self._next = step, self._thread.submit(self._make, step)


def use_one_thread() -> None:
    """Let torch use one thread for the operations of the thread that calls this, and leave all other threads as they are.

    `torch.set_num_threads` changes what MKL and later threads use too; OpenMP's own setting is each thread's own.
    """
    torch.get_num_threads()  # torch applies its number to a thread at its first call there, and not again
    set_threads = getattr(ctypes.CDLL(None), "omp_set_num_threads", None)
    if set_threads is not None:
        set_threads(1)
