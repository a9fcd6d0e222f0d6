"""The thread that owns all models: every computation of the server runs in it, one after another."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
Job = tuple[Future[Any], Callable[[], Any]]


class EngineThread:
    """One thread that runs jobs in order.

    A model is used by this thread alone, so that no two computations share a model's state or the CPU's cores.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the thread."""
        self._thread = threading.Thread(target=self._loop, name="firth-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Finish the job that runs, cancel those that wait, and end the thread."""
        self._jobs.put(None)
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    async def run(self, job: Callable[[], T]) -> T:
        """Run a function in the thread and return its result; what it raises is raised here."""
        future: Future[T] = Future()
        self._jobs.put((future, job))
        return await asyncio.wrap_future(future)

    def _loop(self) -> None:
        while (found := self._jobs.get()) is not None:
            future, job = found
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)
                if not isinstance(error, Exception):
                    raise
