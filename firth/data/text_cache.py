"""The documents of some files, read once: hashed, split and copied in one pass.

A run needs its text four times: to hash its inputs, to choose the held-out documents, to train a tokenizer, and to encode it.
Reading (decompression, decoding, cleaning) costs more than a copy, so the texts are copied into an unnamed temporary file (in
memory while they are small), which is removed with the process. If the disk is full, the files are read again.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any

import numpy as np

from firth.corpora import readers
from firth.corpora.input_files import ReadStats, hashing
from firth.corpora.readers import Document
from firth.data.split import HeldOut, hold_out
from firth.io.atomic import FULL

MEMORY_BYTES = 16 << 20
"""Bytes of a copy that are kept in memory; a larger one goes to the disk."""

MAX_CACHED = 32
"""Number of sets of files that are cached at once: the paths of a mixture."""


class ReadOnce:
    """The cached documents of some files.

    Args:
        paths: The files.
        field: As in `firth.corpora.readers.documents`.
        split: As in `firth.corpora.readers.documents`.
        share: Fraction of the documents to hold out; None: hold out none.
        directory: Directory of the temporary file; None: the system's default.

    Attributes:
        counts: Counts of the reader.
        held: The held-out documents.
        hashes: Absolute path -> stamp and SHA-256 of each file (`firth.corpora.input_files.hashing`).
    """

    def __init__(
        self, paths: Sequence[str], field: str, split: str, share: float | None, directory: Path | None
    ) -> None:
        self._paths, self._field, self._split = tuple(paths), field, split
        self.counts = ReadStats()
        self.hashes: dict[str, list[Any]] = {}
        self._names, self._texts = array("q"), array("q")
        temp_directory = None if directory is None else str(directory)
        self._file: SpooledTemporaryFile[bytes] | None = SpooledTemporaryFile(MEMORY_BYTES, dir=temp_directory)  # noqa: SIM115
        with hashing(self.hashes):
            found = self._copied(readers.documents(paths, field=field, split=split, counts=self.counts))
            self.held = HeldOut() if share is None else hold_out(found, share)
            deque(found, maxlen=0)

    def documents(self, held_out: bool | None = None, others: frozenset[int] = frozenset()) -> Iterator[Document]:
        """Yield all documents, the held-out ones, or the others.

        Args:
            held_out: Which; None: all.
            others: Content keys of further held-out documents.
        """
        if held_out is None:
            yield from self._all(None)
            return
        keys = self.held.keys | others
        out = np.isin(self.held.contents, np.fromiter(keys, np.uint64, len(keys))) if keys else None
        if out is None and held_out:
            return
        yield from self._all(None if out is None else out == held_out)

    def _all(self, selected: np.ndarray | None) -> Iterator[Document]:
        """Yield the documents where `wanted` (documents,) is True."""
        if self._file is None:
            reread = readers.documents(self._paths, field=self._field, split=self._split)
            yield from (d for i, d in enumerate(reread) if selected is None or selected[i])
            return
        at = 0
        for i, (name, text) in enumerate(zip(self._names, self._texts, strict=True)):
            if selected is None or selected[i]:
                self._file.seek(at)
                raw = self._file.read(name + text)
                yield Document(raw[:name].decode("utf-8", "surrogatepass"), raw[name:].decode())
            at += name + text

    def _copied(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents while copying them to the temporary file."""
        for document in documents:
            name, text = document.name.encode("utf-8", "surrogatepass"), document.text.encode()
            self._append(len(name), len(text), name + text)
            yield document
        self._append(0, 0, b"")

    def _append(self, name: int, text: int, raw: bytes) -> None:
        """Copy a document, or flush (no bytes). If the disk is full, the copy is dropped."""
        if self._file is None:
            return
        try:
            if raw:
                self._names.append(name)
                self._texts.append(text)
                self._file.write(raw)
            else:
                self._file.flush()
        except OSError as error:
            if error.errno not in FULL:
                raise
            self.close()

    def close(self) -> None:
        """Remove the copy; the documents are then read from their files again."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # a full disk cannot flush
                file.close()


_cache: OrderedDict[tuple[Any, ...], ReadOnce] = OrderedDict()


def read_once(
    paths: Sequence[str], *, field: str, split: str, share: float | None = None, directory: Path | None = None
) -> ReadOnce:
    """Return the documents of some files, from the cache if the files have not changed."""
    stats = tuple((str(f), stat.st_size, stat.st_mtime_ns) for f in readers.files(paths) for stat in (f.stat(),))
    key = (tuple(paths), field, split, share, stats)
    if key not in _cache:
        _cache[key] = ReadOnce(paths, field, split, share, directory)
    _cache.move_to_end(key)
    while len(_cache) > MAX_CACHED:
        _cache.popitem(last=False)[1].close()
    return _cache[key]


def forget() -> None:
    """Empty the cache."""
    while _cache:
        _cache.popitem()[1].close()
