"""Jobs that several processes divide among themselves, here or on other machines, over a shared directory.

    claims = Claims(out / "claims")
    work(jobs, claims, finished, run)           # every process calls this with the same jobs
    start_workers(4, target, arguments)         # four processes on this machine

A job is claimed by creating the file GROUP.N, which only one process can do (O_EXCL). The claim with the highest number counts.
Its owner writes "released" into it when the job ends. If the owner dies, the next one creates GROUP.N+1 and runs the job again,
or continues it from its checkpoint. Nothing is deleted or renamed, so two processes that see the same dead owner cannot both
replace it.

The owner holds a lock on its file (flock) and touches it every BEAT_SECONDS. On one machine the kernel releases the lock with
the process, however that ends. On another machine an owner counts as dead when its file has not been touched for
SILENCE_SECONDS by the observer's own clock, so clocks need not agree and the file system need not share locks.
"""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import torch

from firth.io.atomic import make_directory, refusals
from firth.types import LOGGER, LogLine, UserError

BEAT_SECONDS = 15.0
"""Seconds between two touches of a claim."""
SILENCE_SECONDS = 240.0
"""An owner on another machine counts as dead after this time; NFS may show a touch a minute late."""
POLL_SECONDS = 1.0
"""Seconds between two looks at what other workers have finished."""
MAX_DEATHS = 3
"""A job whose last owners died this often in a row is not tried again: it probably needs too much memory."""
RELEASED = "released"


class ClaimLostError(UserError):
    """This process did not touch its claim for so long that another one has replaced it."""


@dataclass(frozen=True)
class WorkUnit:
    """A piece of work.

    Args:
        name: Its name in messages.
        group: Jobs of a group are run in order, by one process at a time.
    """

    name: str
    group: str


@cache
def machine() -> str:
    """Return a name of this machine that lasts until it is restarted."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


class Claim:
    """A claim of this process, released when its context ends.

    Args:
        file: The claim's file, which this process has created.
        handle: The open file.
        following: The file that another process would create.
        deaths: Owners of earlier claims in a row that died.
    """

    def __init__(self, file: Path, handle: TextIO, following: Path, deaths: int) -> None:
        self.file, self.following, self.deaths = file, following, deaths
        self._handle, self._ended = handle, threading.Event()
        self._beats = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Claim:
        fcntl.flock(self._handle, fcntl.LOCK_EX)
        try:
            with refusals(self.file):
                self._write(json.dumps({"machine": machine(), "host": socket.gethostname(), "process": os.getpid()}))
        except UserError:  # an empty file would count as that of a living process
            self.file.unlink()
            with suppress(OSError):  # closing writes what is left
                self._handle.close()
            raise
        self._beats.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._beats.join()
        with self._handle:
            self._write(RELEASED)

    def check(self) -> None:
        """Raise a `ClaimLostError` if another process has replaced this claim."""
        if self.following.exists():
            raise ClaimLostError(
                f"{self.file}: another process has taken over, because this one was silent for too long"
            )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            with suppress(OSError):  # the next one may succeed
                os.utime(self.file)

    def _write(self, text: str) -> None:
        """Write over what the file has, which needs no room on a full disk."""
        self._handle.seek(0)
        self._handle.write(text)
        self._handle.flush()
        self._handle.truncate()


class Claims:
    """The claims of a directory.

    Args:
        directory: Where their files are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._seen: dict[
            Path, tuple[float, float]
        ] = {}  # file -> its modification time, and when it was first seen here
        make_directory(directory)

    def take(self, group: str, most_deaths: int | None = None) -> Claim | None:
        """Return a claim of a group of jobs; None if a living process has one.

        Raises:
            UserError: Its last owners, `most_deaths` or more in a row, have died. They stay on record, so that no process tries again.
        """
        group = re.sub(r"[^\w-]", "_", group)
        count = sum(1 for _ in self.directory.glob(f"{group}.*"))
        deaths = 0
        for n in range(count, 0, -1):
            state = self._state(self.directory / f"{group}.{n}")
            if state == "alive" and n == count:
                return None
            if state == "released":
                break
            deaths += 1
        if most_deaths is not None and deaths >= most_deaths:
            raise UserError(
                f"the last {deaths} processes that ran this ended without a message, perhaps for lack of memory; to try again, "
                f"delete {self.directory / group}.*"
            )
        file = self.directory / f"{group}.{count + 1}"
        with refusals(file):
            try:
                handle = os.fdopen(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), "r+")
            except FileExistsError:
                return None
        return Claim(file, handle, self.directory / f"{group}.{count + 2}", deaths)

    @contextmanager
    def exclusive(self, name: str) -> Iterator[None]:
        """Wait for a claim and hold it within the context, for work that takes seconds."""
        while (claim := self.take(name)) is None:
            time.sleep(0.02)
        with claim:
            yield

    def _state(self, file: Path) -> str:
        """Return "released", "dead" or "alive" for the owner of a claim."""
        with open(file, "r+") as handle:
            text = handle.read()
            if text == RELEASED:
                return "released"
            with suppress(ValueError):  # empty: its owner has just created it, or died just then
                if json.loads(text)["machine"] == machine():
                    try:
                        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        return "alive"
                    handle.seek(0)
                    return "released" if handle.read() == RELEASED else "dead"
        changed, now = file.stat().st_mtime, time.monotonic()
        if self._seen.get(file, (0.0, 0.0))[0] != changed:
            self._seen[file] = changed, now
        return "dead" if now - self._seen[file][1] > SILENCE_SECONDS else "alive"


@contextmanager
def preparing(claims: Path, record: str, what: str) -> Iterator[None]:
    """Hold a claim within the context to prepare the directory that holds the claims.

    Args:
        claims: The directory of the claims.
        record: The file next to it that says what the directory holds.
        what: What that is, for the message.

    Raises:
        UserError: The directory holds something else.
    """
    out = claims.parent

    def is_foreign() -> bool:
        with refusals(out):
            return (
                not (out / record).exists() and out.exists() and any(one.name != claims.name for one in out.iterdir())
            )

    refused = UserError(f"{out} already exists and holds no {what}: choose another --out")
    if is_foreign() and not claims.is_dir():  # with claims, another process may be writing the record
        raise refused
    with Claims(claims).exclusive("prepare"):
        if is_foreign():
            raise refused
        yield


def work(
    jobs: Sequence[WorkUnit],
    claims: Claims,
    finished: Callable[[WorkUnit], bool],
    run: Callable[[WorkUnit, Claim], None],
    log: LogLine = LOGGER.info,
) -> None:
    """Run the jobs that are not finished, together with other processes, and return when all are.

    Args:
        jobs: All jobs, the same in every process.
        claims: Their claims.
        finished: Whether the result of a job is on disk.
        run: Runs a job and writes its result.
        log: Prints a line of progress.

    Raises:
        UserError: A job fails, or has ended its process MAX_DEATHS times.
    """
    waiting = False
    while left := [job for job in jobs if not finished(job)]:
        first = {job.group: job for job in reversed(left)}  # of each group
        for job in [job for job in left if first[job.group] is job]:
            try:
                claim = claims.take(job.group, MAX_DEATHS)
            except UserError as error:
                raise UserError(f"{job.name}: {error}") from None
            if claim is None:
                continue
            with claim:
                if not finished(job):  # another process may have run it meanwhile
                    log(f"[{jobs.index(job) + 1}/{len(jobs)}] {job.name}")
                    try:
                        run(job, claim)
                    except ClaimLostError as error:
                        log(str(error))
            break
        else:
            if not waiting:
                log(f"waiting for {len(left)} of {len(jobs)} jobs that other processes run")
            waiting = True
            time.sleep(POLL_SECONDS)


def start_workers(count: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Call a function in `count` new processes, which divide the threads of this one and take GPUs in turn.

    Args:
        count: Number of processes.
        target: A function of a module, which prints by the logger.
        arguments: Its arguments.

    Raises:
        UserError: A process failed. One that was killed is no error: the others have done its work.
    """
    context = multiprocessing.get_context("spawn")
    threads = max(1, torch.get_num_threads() // count)
    processes = [
        context.Process(target=_worker, args=(i, threads, os.getpid(), target, arguments), name=f"worker {i + 1}")
        for i in range(count)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except KeyboardInterrupt:  # the terminal has interrupted the workers too
        for process in processes:
            process.join()
        raise
    failed = [process.name for process in processes if (process.exitcode or 0) > 0]
    killed = [process.name for process in processes if (process.exitcode or 0) < 0]
    if failed or len(killed) == count:
        raise UserError(f"{' and '.join(failed or killed)} failed; run the same command again to continue")
    if killed:
        LOGGER.warning(f"{' and '.join(killed)} ended before its work was done, and the others did it")


def _worker(index: int, threads: int, parent: int, target: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Run the function of a worker; end it with its parent."""
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        os.environ["LOCAL_RANK"] = str(index % torch.cuda.device_count())
    handler = logging.StreamHandler(sys.stdout)
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        target(*arguments)
    except UserError as error:
        print(f"firth: worker {index + 1}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with(parent: int) -> None:
    """Interrupt this process, which then saves a checkpoint, when its parent has ended."""
    while os.getppid() == parent:
        time.sleep(POLL_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
