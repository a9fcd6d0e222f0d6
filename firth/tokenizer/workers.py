"""Worker processes that encode texts and count words, one per core.

    with Workers(Encode(tokenizer), count=2) as workers:
        for ids in workers.map(lists_of_texts):      # in the order of the lists, whichever worker finishes first

Each list is processed separately, so the results do not depend on the number of workers. A worker has one list at a time, and
the number of results waiting for an earlier one is bounded, so memory is too. Workers are new Python processes and not forks
(a fork of a process with threads can hang); they import no torch and start in a third of a second. They have their own process
group, so that Ctrl-C reaches the main process only; they end when it closes their pipe or dies.
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

from firth.tokenizer.hf_config import engine_of
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.tokenizer.word_counts import count
from firth.types import UserError

T = TypeVar("T", covariant=True)

WORTH_CHARACTERS = 4 << 20
"""Characters of text from which on workers are started: this process encodes as many while they would start."""

LIST_CHARACTERS = 2 << 20
"""Characters of text that one worker counts at once."""

MAX_RESULTS_AHEAD = 2
"""Results per worker that may wait for an earlier one."""

WORKER_ENVIRONMENT = {
    "TOKENIZERS_PARALLELISM": "false",
    "RAYON_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
"""Environment variables of a worker: one thread each."""

BOOT = "import sys; sys.path.insert(0, sys.argv[2]); from firth.tokenizer.workers import serve; serve(int(sys.argv[1]))"


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class WorkerTask(Protocol[T]):
    """Work on a list of texts: `setup` describes it to a worker, and `result` decodes the worker's reply."""

    def setup(self) -> dict[str, str]: ...

    def result(self, raw: bytes) -> T: ...


class Encode:
    """Encode each text of a list, as `Tokenizer.encode_batch`."""

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
    """Count the words of a list of texts (`firth.tokenizer.word_counts.count`)."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine.to_str()

    def setup(self) -> dict[str, str]:
        """Return the description of the task."""
        return {"count": self._engine}

    def result(self, raw: bytes) -> dict[str, int]:
        """Return word -> count."""
        counted: dict[str, int] = json.loads(raw)
        return counted


class Workers(Generic[T]):
    """A pool of processes that do one task; a context manager that ends them.

    Args:
        task: What to do with each list of texts.
        count: Number of processes; None for one per core.
    """

    def __init__(self, task: WorkerTask[T], count: int | None = None) -> None:
        self._task, self._count = task, count or cores()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lines: list[Connection] = []

    def __enter__(self) -> Workers[T]:
        setup = json.dumps(self._task.setup()).encode()
        try:
            for _ in range(self._count):
                local, remote = Pipe()
                self._lines.append(local)
                with remote:
                    command = [sys.executable, "-P", "-c", BOOT, str(remote.fileno()), str(Path(__file__).parents[2])]
                    self._processes.append(
                        subprocess.Popen(
                            command, stdin=subprocess.DEVNULL, env=os.environ | WORKER_ENVIRONMENT, pass_fds=[remote.fileno()],
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
            while idle and ready is not None and ready[0] < due + (1 + MAX_RESULTS_AHEAD) * len(self._lines):
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
        """Return the error for a worker that ended."""
        code = self._processes[self._lines.index(line)].wait()
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return UserError(
            f"a process that reads text was {how}, most often because memory ran out: free some and run the same command again"
        )

    def _end(self) -> None:
        for line in self._lines:
            line.close()
        for process in self._processes:
            process.kill()
            process.wait()


def count_all(engine: Engine, texts: Sequence[str], workers: int | None = None) -> Counter[str]:
    """Count words as `firth.tokenizer.word_counts.count`, in worker processes if there is enough text.

    Args:
        engine: From `firth.tokenizer.train.blank`.
        texts: The texts.
        workers: Number of processes; None for one per core.
    """
    processes = cores() if workers is None else workers
    if processes == 1 or sum(map(len, texts)) < WORTH_CHARACTERS:
        return count(engine, texts)
    words: Counter[str] = Counter()
    with Workers(CountWords(engine), processes) as running:
        for counts in running.map(_lists(texts)):
            for word, number in counts.items():
                words[word] += number
    return words


def _lists(texts: Iterable[str]) -> Iterator[list[str]]:
    """Yield texts in lists of about LIST_CHARACTERS."""
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
    """Return texts as one message: their number, the bytes of each, and their UTF-8."""
    raw = [replace_lone_surrogates(text).encode() for text in texts]
    return np.array([len(raw), *map(len, raw)], np.int64).tobytes() + b"".join(raw)


def _unpacked(message: bytes) -> Iterator[str]:
    """Yield the texts of a message."""
    count = int(np.frombuffer(message, np.int64, 1)[0])
    at = 8 * (count + 1)
    for size in np.frombuffer(message, np.int64, count, 8).tolist():
        yield message[at : at + size].decode()
        at += size


def serve(descriptor: int) -> None:
    """Run a worker: do the task of the first message on each following message, until the pipe is closed."""
    with (
        Connection(descriptor) as line,
        contextlib.suppress(EOFError, OSError),
    ):  # OSError: the pipe ends within a message
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
