"""The lock of a run directory, and the handler that saves a checkpoint on Ctrl-C."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from firth.types import LogLine, UserError


class Interrupted(KeyboardInterrupt):
    """The run was interrupted and has saved a checkpoint; the message explains how to resume. Unwinds like Ctrl-C."""


class LockedError(UserError):
    """Another process holds the lock of a directory."""


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Lock a directory against other processes; the kernel releases the lock however this process ends.

    Raises:
        LockedError: Another process holds the lock; the message has its process id.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise LockedError(
                f"{directory}: process {file.read().strip() or 'unknown'} is training in this directory; "
                "wait for it, stop it with Ctrl-C, or choose another directory"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class StopRequest:
    """Whether a stop of the run was requested."""

    requested = False


@contextmanager
def interrupt_handler(log: LogLine) -> Iterator[StopRequest]:
    """Request a stop after the current step on the first SIGINT or SIGTERM, and end the process on the second.

    Ending at once is safe for checkpoints: one that is being written does not have its final name yet.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield stop
        return

    def request_stop(_number: int, _frame: FrameType | None) -> None:
        stop.requested = True
        for n in before:
            signal.signal(n, signal.default_int_handler)
        log("stopping after this step and saving a checkpoint; press Ctrl-C again to stop at once")

    before = {n: signal.signal(n, request_stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
