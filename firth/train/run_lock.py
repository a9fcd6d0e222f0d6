"""One run per directory, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from firth.types import UserError


class Interrupted(KeyboardInterrupt):
    """A run was asked to stop and has saved; its text says how to go on. Unwinds like the Ctrl-C that it answers."""


@contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """Hold a directory against other processes; the kernel lets go of it however this one ends.

    Raises UserError with the holder's process id when another run has it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"{directory}: process {file.read().strip() or 'unknown'} is training in this directory; "
                "wait for it, stop it with Ctrl-C, or choose another directory"
            ) from error
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


class StopRequest:
    """Whether someone has asked the run to stop."""

    requested = False


@contextmanager
def interrupt_handler(say: Callable[[str], None]) -> Iterator[StopRequest]:
    """The first SIGINT or SIGTERM asks for a stop after this step, the second ends the process at once.

    Ending at once harms no checkpoint: one that is being written is not yet named as one.
    """
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # Python delivers signals to the main thread only
        yield stop
        return

    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.requested = True
        for n in before:
            signal.signal(n, signal.default_int_handler)
        say("stopping: this step is finished and saved first; press Ctrl-C again to stop at once")

    before = {n: signal.signal(n, ask) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)
