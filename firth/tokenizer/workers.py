"""Encode texts and count their words, in this process or in worker processes.

`count` counts words as a tokenizer's pre-tokenizer splits them: the input of every trainer. The engine splits 3 MB per
second. ASCII text is split here by the same rules, five times as fast. Other text is first split at white space, which no
pre-tokenizer of `firth.tokenizer.train` joins, so that the engine sees each distinct part once.

>>> from firth.tokenizer.train import blank
>>> sorted(count(blank("byte-bpe", "<unk>"), ["low, lower low"]).items())
[(',', 1), ('low', 1), ('Ġlow', 1), ('Ġlower', 1)]

`Workers` are processes that encode texts or count words, one per core.

    with Workers(Encode(tokenizer), count=2) as workers:
        for ids in workers.map(lists_of_texts):      # in the order of the lists, whichever worker finishes first

Each list is processed separately, so the results do not depend on the number of workers. A worker has one list at a time,
and the number of results waiting for an earlier one is bounded, so memory is too. Workers are new Python processes and not
forks (a fork of a process with threads can hang); they import no torch and start in a third of a second. They have their
own process group, so that Ctrl-C reaches the main process only; they end when it closes their pipe or dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from firth.tokenizer.tokenizer import Tokenizer, byte_alphabet
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.types import UserError

BLANK = "▁"
"""A blank in Unigram vocabularies (Metaspace)."""

SPACE = " \t-\r\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
"""Unicode white space (White_Space), at which pre-tokenizers split."""

BERT_SPACE = SPACE.replace("\t-\r\x85", "\t\n\r")
"""The same without the control characters that BERT's normalizer removes, which do not separate words."""

ASCII_WORD = {
    "ByteLevel": r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+",
    "Whitespace": r"\w+|[^\w\s]+",
    "BertPreTokenizer": r"[0-9A-Za-z]+|[!-/:-@\[-`{-~]",
}
"""Pre-tokenizer -> pattern of its words in ASCII text."""

CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""ASCII control characters, which normalizers may remove."""


def count(engine: Engine, texts: Iterable[str]) -> Counter[str]:
    """Return word -> count, after the engine's normalizer and pre-tokenizer.

    Args:
        engine: From `firth.tokenizer.train.blank`.
        texts: The texts.
    """
    definition = json.loads(engine.to_str())
    kind = definition["pre_tokenizer"]["type"]
    if kind == "Metaspace":  # split before each blank; the normalizer may have added some
        words: Counter[str] = Counter()
        for text in texts:
            words.update(re.findall(f"{BLANK}?[^{BLANK}]+|{BLANK}", normal(engine, text).replace(" ", BLANK)))
        return words
    space = BERT_SPACE if kind == "BertPreTokenizer" else SPACE
    parts, word = re.compile(f"[{space}]*[^{space}]+|[{space}]+"), re.compile(ASCII_WORD[kind], re.A)
    lowered = '"Lowercase"' in json.dumps(definition["normalizer"])
    plain: Counter[str] = Counter()
    non_ascii: Counter[str] = Counter()
    for text in texts:
        if text.isascii() and not CONTROL.search(text):
            plain.update(word.findall(text.lower() if lowered else text))
        else:
            non_ascii.update(parts.findall(text))
    words = Counter()
    for text, number in non_ascii.items():
        if text.isascii() and not CONTROL.search(text):
            for found in word.findall(text.lower() if lowered else text):
                plain[found] += number
        else:
            for found, _ in engine.pre_tokenizer.pre_tokenize_str(normal(engine, text)):
                words[found] += number
    characters = {byte: character for character, byte in byte_alphabet().items()} if kind == "ByteLevel" else {}
    for found, number in plain.items():
        words[found.translate(characters)] += number
    return words


def normal(engine: Engine, text: str) -> str:
    """Return the text after the engine's normalizer."""
    return text if engine.normalizer is None else str(engine.normalizer.normalize_str(text))


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
    """Count the words of a list of texts (`firth.tokenizer.workers.count`)."""

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
    """Count words as `firth.tokenizer.workers.count`, in worker processes if there is enough text.

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
