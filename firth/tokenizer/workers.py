"""Worker processes that encode texts and count words, one on each core.

    with Workers(Encode(tokenizer), count=2) as workers:
        for ids in workers.map(lists_of_texts):      # in the order of the lists, whichever worker is done first

Every list is worked on by itself, so the results do not depend on the number of workers. A worker holds one list at a time
and the results ahead of the one that is due are bounded, so memory is too. Workers are new Python processes and no forks
(a fork of a process with threads can hang); they import no torch and start in a third of a second. They are in a process
group of their own, so that Ctrl-C reaches the main process alone; they end when it closes their pipe or dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from tokenizers import Tokenizer as Engine

from firth.tokenizer.normalize import replace_lone_surrogates
from firth.tokenizer.post_processor import engine_of
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.word_counts import count
from firth.types import UserError

T = TypeVar("T", covariant=True)

WORTH_CHARACTERS = 4 << 20
"""Characters of text from which on workers are started: as many are encoded by this process while they would start."""

LIST_CHARACTERS = 2 << 20
"""Characters of text whose words are counted by one worker at once."""

AHEAD = 2
"""Results of each worker that may wait for an earlier one."""

SINGLE = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""The environment of a worker: one thread each."""

BOOT = "import sys; sys.path.insert(0, sys.argv[2]); from firth.tokenizer.workers import serve; serve(int(sys.argv[1]))"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class Task(Protocol[T]):
    """Work on a list of texts: `setup` describes it to a worker, and `result` reads what the worker sends back."""

    def setup(self) -> dict[str, str]: ...

    def result(self, raw: bytes) -> T: ...


class Encode:
    """Encode each text of a list: the result is their ids, as of `Tokenizer.encode_batch`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._definition = tokenizer.definition

    def setup(self) -> dict[str, str]:
        """Return the description of the task."""
        return {"encode": self._definition}

    def result(self, raw: bytes) -> list[np.ndarray]:
        """Return the ids of each text: (n,) int32 each."""
        count = int(np.frombuffer(raw, np.int64, 1)[0])
        lengths = np.frombuffer(raw, np.int64, count, 8)
        return np.split(np.frombuffer(raw, np.int32, offset=8 * (count + 1)), lengths.cumsum()[:-1])


class CountWords:
    """Count the words of a list of texts: the result maps each word to its number (`firth.tokenizer.word_counts.count`)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.to_str()

    def setup(self) -> dict[str, str]:
        """Return the description of the task."""
        return {"count": self._engine}

    def result(self, raw: bytes) -> dict[str, int]:
        """Return word -> how often."""
        counted: dict[str, int] = json.loads(raw)
        return counted


class Workers(Generic[T]):
    """Processes that do one task, as a context: they are ended when it is left.

    Args:
        task: What to do with each list of texts.
        count: Number of processes; None for one on each core.
    """

    def __init__(self, task: Task[T], count: int | None = None) -> None:
        self._task, self._count = task, count or cores()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lines: list[Connection] = []

    def __enter__(self) -> Workers[T]:
        setup = json.dumps(self._task.setup()).encode()
        try:
            for _ in range(self._count):
                ours, theirs = Pipe()
                self._lines.append(ours)
                with theirs:
                    command = [sys.executable, "-P", "-c", BOOT, str(theirs.fileno()), str(Path(__file__).parents[2])]
                    self._processes.append(
                        subprocess.Popen(
                            command, stdin=subprocess.DEVNULL, env=os.environ | SINGLE, pass_fds=[theirs.fileno()],
                            process_group=0,
                        )
                    )  # fmt: skip
            for line in self._lines:
                self._send(line, setup)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *raised: object) -> None:
        self._end()

    def map(self, lists: Iterable[Sequence[str]]) -> Iterator[T]:
        """Yield the result of each list of texts, in order.

        Raises:
            UserError: A worker was killed.
        """
        waiting = enumerate(lists)
        running: dict[Connection, int] = {}
        done: dict[int, bytes] = {}
        due = 0
        ready = next(waiting, None)
        idle = list(self._lines)
        while ready is not None or running or done:
            while idle and ready is not None and ready[0] < due + (1 + AHEAD) * len(self._lines):
                line = idle.pop()
                running[line] = ready[0]
                self._send(line, _packed(ready[1]))
                ready = next(waiting, None)
            if due in done:
                yield self._task.result(done.pop(due))
                due += 1
                continue
            readable = wait(list(running))
            for line in [line for line in running if line in readable]:
                done[running.pop(line)] = self._receive(line)
                idle.append(line)

    def _send(self, line: Connection, message: bytes) -> None:
        try:
            line.send_bytes(message)
        except OSError:
            raise self._died(line) from None

    def _receive(self, line: Connection) -> bytes:
        try:
            return line.recv_bytes()
        except (EOFError, OSError):
            raise self._died(line) from None

    def _died(self, line: Connection) -> UserError:
        """The sentence on a worker that is gone."""
        code = self._processes[self._lines.index(line)].wait()
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return UserError(
            f"a process that reads text was {how}, most often for want of memory: free some and run the same command again"
        )

    def _end(self) -> None:
        for line in self._lines:
            line.close()
        for process in self._processes:
            process.kill()
            process.wait()


def count_all(engine: Engine, texts: Sequence[str], workers: int | None = None) -> Counter[str]:
    """`firth.tokenizer.word_counts.count`, by worker processes where there is enough text.

    Args:
        engine: As of `count`.
        texts: What to count the words of.
        workers: Number of processes; None for one on each core.
    """
    processes = cores() if workers is None else workers
    if processes == 1 or sum(map(len, texts)) < WORTH_CHARACTERS:
        return count(engine, texts)
    words: Counter[str] = Counter()
    with Workers(CountWords(engine), processes) as running:
        for some in running.map(_lists(texts)):
            for word, often in some.items():
                words[word] += often
    return words


def _lists(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts in lists of about LIST_CHARACTERS."""
    some: list[str] = []
    size = 0
    for text in texts:
        some.append(text)
        size += len(text)
        if size >= LIST_CHARACTERS:
            yield some
            some, size = [], 0
    if some:
        yield some


def _packed(texts: Sequence[str]) -> bytes:
    """Texts as one message: their number, the bytes of each, and their UTF-8."""
    raw = [replace_lone_surrogates(text).encode() for text in texts]
    return np.array([len(raw), *map(len, raw)], np.int64).tobytes() + b"".join(raw)


def _unpacked(message: bytes) -> Iterator[str]:
    """The texts of a message."""
    count = int(np.frombuffer(message, np.int64, 1)[0])
    at = 8 * (count + 1)
    for size in np.frombuffer(message, np.int64, count, 8).tolist():
        yield message[at : at + size].decode()
        at += size


def serve(descriptor: int) -> None:
    """Be a worker: do the task that the first message describes on each message that follows, until the pipe is closed."""
    with Connection(descriptor) as line, contextlib.suppress(EOFError, OSError):  # OSError: it ends within a message
        setup: dict[str, Any] = json.loads(line.recv_bytes())
        if "encode" in setup:
            tokenizer = Tokenizer(engine_of(setup["encode"]))
            while True:
                rows = tokenizer.encode_batch(list(_unpacked(line.recv_bytes())))
                head = np.array([len(rows), *map(len, rows)], np.int64)
                line.send_bytes(b"".join([head.tobytes(), *(row.tobytes() for row in rows)]))
        engine = Engine.from_str(setup["count"])
        while True:
            line.send_bytes(json.dumps(count(engine, _unpacked(line.recv_bytes()))).encode())
