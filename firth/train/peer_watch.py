"""Contact between the ranks of a run outside of collectives: waiting, failures, and signs of life.

A collective is the wrong way to wait. It ends at the timeout of its process group (10 minutes for nccl, 30 for gloo), and a
rank in it cannot learn that another one has failed. Here the ranks use the key-value store that the process group was
started with:

    wait       every rank counts itself in and looks at the count, for as long as it takes
    failures   a rank that raises writes its error into the store; the others end with one sentence that repeats it
    life       a thread of each rank counts up a number of its own once a second. Rank 0 watches those of all ranks, the others
               watch rank 0: a rank whose number stays the same for SILENCE_SECONDS has been stopped (SIGSTOP), has been
               killed, or cannot be reached

The thread ends its process, for the main thread may be inside a collective that never returns. A checkpoint is not harmed by
that: one that is being written does not have its final name yet (`firth.train.checkpoint`).
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from torch.distributed.distributed_c10d import PrefixStore, Store

from firth.types import UserError

T = TypeVar("T")

SILENCE_SECONDS = 120.0
"""A rank without a sign of life for so long is taken for stopped. Preparing data may hold Python's lock for a while, so it is
not shorter; the environment variable FIRTH_RANK_TIMEOUT sets another number."""

BEAT_SECONDS = 1.0
"""From one sign of life to the next, at most; a tenth of the silence that is allowed, where that is less."""

GRACE_SECONDS = 5.0
"""How long a failure of one rank waits for the main thread of another to end by itself."""

POLL_SECONDS = 0.02
"""From one look at the store to the next while a rank waits."""


def silence_seconds() -> float:
    """Return after how many seconds without a sign of life a rank is taken for stopped.

    Raises:
        UserError: FIRTH_RANK_TIMEOUT is not a positive number.
    """
    text = os.environ.get("FIRTH_RANK_TIMEOUT", str(SILENCE_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UserError(f"FIRTH_RANK_TIMEOUT={text}: give a number of seconds above 0")
    return seconds


class PeerWatch:
    """This rank's contact with the others.

    Args:
        store: The store of the process group.
        rank: The number of this rank.
        world: How many ranks there are.
        silence: Seconds without a sign of life after which a rank is taken for stopped.
    """

    def __init__(self, store: Store, rank: int, world: int, silence: float) -> None:
        self.rank, self.world, self.silence = rank, world, silence
        self.holder = "torchrun" if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else "rank 0"
        self.beat = min(BEAT_SECONDS, silence / 10)
        # A client answers one call at a time, and the process group's own may block: each thread has one for itself.
        self._store, self._others = (PrefixStore("firth", store.clone()) for _ in range(2))  # type: ignore[attr-defined]
        self._waits = 0
        self._depth = 0
        self._heard = time.monotonic()
        self._closed = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._signal, self._watch_store)]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    def close(self) -> None:
        """End the threads: one that is inside of a call to the store when Python ends would abort the process."""
        self._closed.set()
        for thread in self._threads:
            thread.join(GRACE_SECONDS)

    def wait(self) -> None:
        """Return when every rank has come here, however long that takes.

        Raises:
            UserError: Another rank has failed.
        """
        self._waits += 1
        self._count_in(f"wait/{self._waits}", wait=True)
        # Rank 0, whose process may hold the store, leaves last: the others have then seen that all are here.
        self._count_in(f"seen/{self._waits}", wait=self.rank == 0)

    def _count_in(self, key: str, wait: bool) -> None:
        """Count this rank in, and wait until all ranks are."""
        self._reach(lambda: self._store.add(key, 1))
        while wait and self._reach(lambda: self._store.add(key, 0)) < self.world:
            failure = self._reach(lambda: self._failure(self._store))
            if failure:
                raise UserError(failure)
            time.sleep(POLL_SECONDS)

    def from_first(self, value: str) -> str:
        """Return rank 0's value on every rank."""
        key = f"value/{self._waits}"
        if self.rank == 0:
            self._reach(lambda: self._store.set(key, value))
        self.wait()
        found: bytes = self._reach(lambda: self._store.get(key))
        return found.decode()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Watch the others, and let them know if this rank raises."""
        self._depth += 1
        try:
            yield
        except BaseException as error:
            if self._depth == 1:
                self._fail(str(error) or type(error).__name__)
            raise
        finally:
            self._depth -= 1

    def explain(self, error: RuntimeError) -> UserError:
        """Return why a collective has failed: another rank's error, or the rank that gives no sign of life any more."""
        before = self._counts()
        end = time.monotonic() + max(GRACE_SECONDS, 3 * self.beat)
        while time.monotonic() < end:
            try:
                failure = self._failure(self._store)
            except RuntimeError:
                return UserError(self._lost())
            if failure:
                return UserError(failure)
            time.sleep(self.beat)
        after = self._counts()
        silent = [rank for rank in range(self.world) if rank != self.rank and before.get(rank) == after.get(rank)]
        if silent:
            return UserError(f"rank {silent[0]} has ended without an error of its own (killed?); {AGAIN}")
        return UserError(f"the ranks lost contact ({str(error).splitlines()[0]}); {AGAIN}")

    def _counts(self) -> dict[int, int]:
        """The signs of life of all ranks; none where the store cannot be reached."""
        try:
            return {rank: self._store.add(f"alive/{rank}", 0) for rank in range(self.world)}
        except RuntimeError:
            return {}

    def _reach(self, call: Callable[[], T]) -> T:
        """Call the store."""
        try:
            return call()
        except RuntimeError as error:
            raise UserError(self._lost()) from error

    def _lost(self) -> str:
        return f"{self.holder}, which holds the store of the ranks, has ended or cannot be reached; {AGAIN}"

    def _failure(self, store: Store) -> str:
        """Which other rank has failed and why, as a sentence; empty where none has."""
        if not store.check(["failed"]):
            return ""
        number, _, message = store.get("failed").decode().partition(" ")
        return "" if int(number) == self.rank else message

    def _fail(self, message: str) -> None:
        """Write this rank's error for the others, and let them read it: the store may end with this process."""
        try:
            self._store.compare_set("failed", "", f"{self.rank} rank {self.rank} failed: {message}")
            self._store.set(f"known/{self.rank}", "")
            end = time.monotonic() + GRACE_SECONDS
            while not self._store.check([f"known/{rank}" for rank in range(self.world)]) and time.monotonic() < end:
                time.sleep(POLL_SECONDS)
        except RuntimeError:  # the store has ended, so the others learn of it from that
            return

    def _signal(self) -> None:
        """Give signs of life, and look for those of others and for failures. Runs in a thread."""
        store = self._others
        watched = range(1, self.world) if self.rank == 0 else range(1)
        seen = {rank: (-1, time.monotonic()) for rank in watched}
        while True:
            began = time.monotonic()
            try:
                store.add(f"alive/{self.rank}", 1)
                self._heard = time.monotonic()
                failure = self._failure(store)
                for rank in watched:
                    count = store.add(f"alive/{rank}", 0)
                    if count != seen[rank][0] or not self._depth:
                        seen[rank] = count, time.monotonic()
                    elif time.monotonic() - seen[rank][1] > self.silence:
                        failure = failure or self._stopped(f"rank {rank}")
                        store.compare_set("failed", "", f"{rank} {failure}")
                if failure:
                    store.set(f"known/{self.rank}", "")
            except RuntimeError:
                if self._depth:
                    self._end(self._lost())
                return
            if failure and self._depth:
                self._end(failure)
            if self._closed.wait(self.beat):
                return
            if time.monotonic() - began > self.silence / 2:  # this process itself has been stopped
                seen = {rank: (count, time.monotonic()) for rank, (count, _) in seen.items()}

    def _watch_store(self) -> None:
        """End this process when the store does not answer: its holder may be the rank that is stopped. Runs in a thread."""
        before = time.monotonic()
        while not self._closed.wait(self.beat):
            now = time.monotonic()
            if now - before > self.silence / 2 or not self._depth:  # this process itself has been stopped
                self._heard = now
            before = now
            if now - self._heard > self.silence + 2 * self.beat:
                self._end(self._stopped(self.holder))

    def _stopped(self, who: str) -> str:
        return f"{who} has given no sign of life for {self.silence:g} s: it is stopped or out of reach; {AGAIN}"

    def _end(self, failure: str) -> None:
        """End this process, unless its main thread does so in time."""
        end = time.monotonic() + min(GRACE_SECONDS, self.silence)
        while time.monotonic() < end:
            if not self._depth:
                return
            time.sleep(POLL_SECONDS)
        sys.stdout.flush()
        print(f"firth: {failure}", file=sys.stderr, flush=True)
        os._exit(2)


AGAIN = "start all ranks again, and the run goes on from its last checkpoint"
"""What to do when a rank is gone."""
