"""Open input files, compressed or plain (damage becomes a one-line error), and count what was read from them.

>>> import tempfile
>>> place = Path(tempfile.mkdtemp()) / "a.txt.gz"
>>> _ = place.write_bytes(gzip.compress(b"good day"))
>>> with guarded(place) as file:
...     file.read()
b'good day'

`ReadStats` counts what a reader read, repaired and skipped, with the first occurrence of each.

>>> counts = ReadStats()
>>> counts.note("bad_utf8", "a.csv:3"), counts.note("bad_utf8", "a.csv:9"), counts.note("nul", "a.csv:4", 0)
(None, None, None)
>>> counts.rows(), counts.at
({'bad_utf8': 2}, {'bad_utf8': 'a.csv:3'})
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from firth.io.integrity import stamp
from firth.types import UserError

PACKED = (".gz", ".zst")
GROWTH = {".gz": 3.0, ".zst": 3.0, ".parquet": 2.0, ".bz2": 3.5, ".xz": 4.0}
"""Ending of a compressed file -> assumed bytes of text per byte of the file."""

KNOWN_BYTES = {
    b"\x1f\x8b": "gzip's bytes: unpack it, or let its name end in {suffix}.gz",
    b"\x28\xb5\x2f\xfd": "Zstandard's bytes: unpack it, or let its name end in {suffix}.zst",
    b"PAR1": "a Parquet file: let its name end in .parquet",
    b"\xfd7zXZ\0": "xz's bytes: unpack it",
    b"BZh91AY": "bzip2's bytes: unpack it",
    b"PK\x03\x04": "a zip archive (.zip, .xlsx, .docx, .epub): unpack it, or save it as plain text",
    b"%PDF-": "a PDF: save it as plain text",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
}
"""First bytes of files that contain no text, whatever their name -> what they are and what to do."""


_HASHES: ContextVar[dict[str, list[Any]] | None] = ContextVar("hashes", default=None)


@contextmanager
def hashing(found: dict[str, list[Any]]) -> Iterator[None]:
    """Hash each file that is opened in the block and read to its end: `found` gets absolute path -> stamp and SHA-256."""
    token = _HASHES.set(found)
    try:
        yield
    finally:
        _HASHES.reset(token)


_SPAN: ContextVar[tuple[int, int] | None] = ContextVar("span", default=None)


@contextmanager
def within(span: tuple[int, int] | None) -> Iterator[None]:
    """Read only a part of each file that is opened in the block; None for whole files.

    Args:
        span: First byte and the one after the last; of a Parquet file the same of its row groups.
    """
    token = _SPAN.set(span)
    try:
        yield
    finally:
        _SPAN.reset(token)


def current_span() -> tuple[int, int] | None:
    """Return the part of the files to read (`within`)."""
    return _SPAN.get()


class _Span(io.RawIOBase):
    """The bytes of a file from one position to another."""

    def __init__(self, path: Path, start: int, stop: int) -> None:
        self._file, self._left = path.open("rb", buffering=0), stop - start
        self._file.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._file.readinto(memoryview(buffer)[: self._left]) or 0
        self._left -= n
        return n

    def close(self) -> None:
        self._file.close()
        super().close()


class _Hashed(io.RawIOBase):
    """A file whose bytes are hashed while they are read."""

    def __init__(self, path: Path) -> None:
        self._path, self._file = path, path.open("rb", buffering=0)
        self._stamp, self._hash = stamp(os.fstat(self._file.fileno())), hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._file.readinto(buffer) or 0
        self._hash.update(memoryview(buffer)[:n])
        return n

    def note(self, found: dict[str, list[Any]]) -> None:
        """Read the rest and record the hash."""
        while self.read(1 << 20):
            pass
        found[str(self._path.absolute())] = [*self._stamp, self._hash.hexdigest()]

    def close(self) -> None:
        self._file.close()
        super().close()


def open_bytes(path: Path) -> BinaryIO:
    """Open a file; within `hashing` its bytes are hashed, and `within` a span only those are read."""
    span = _SPAN.get()
    if span is not None:
        return io.BufferedReader(_Span(path, *span), 1 << 20)
    return path.open("rb") if _HASHES.get() is None else io.BufferedReader(_Hashed(path), 1 << 20)


def _unpacked(raw: BinaryIO, path: Path) -> BinaryIO:
    """Return the content of a file, decompressed if its name ends in .gz or .zst."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(BinaryIO, gzip.GzipFile(fileobj=raw, mode="rb"))
    if suffix == ".zst":
        return io.BufferedReader(_Zstd(raw), 1 << 20)
    return raw


class _Zstd(io.RawIOBase):
    """Decompress all frames of a file. zstandard's own reader takes a truncated file for a complete one."""

    def __init__(self, file: BinaryIO) -> None:
        import zstandard

        self.file = file
        self.frames = zstandard.ZstdDecompressor()
        self.frame = self.frames.decompressobj()
        self.in_frame = False  # inside of a frame
        self.buffered = io.BytesIO()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (n := self.buffered.readinto(buffer)):
            raw = self.file.read(1 << 10)  # a kilobyte can unpack to 32 MB
            if not raw:
                if self.in_frame:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            self.buffered = io.BytesIO()
            while raw:
                self.in_frame = True
                self.buffered.write(self.frame.decompress(raw))
                raw = b""
                if self.frame.eof:
                    raw, self.in_frame = self.frame.unused_data, False
                    self.frame = self.frames.decompressobj()
            self.buffered.seek(0)
        return n

    def close(self) -> None:
        self.file.close()
        super().close()


@contextmanager
def guarded(path: Path) -> Iterator[BinaryIO]:
    """Open a file of text or records, decompressed.

    Raises:
        UserError: The file cannot be read, is a damaged archive, or has the first bytes of another format (`KNOWN_BYTES`).
    """
    import zstandard

    hashes = _HASHES.get()
    with ExitStack() as opened:
        try:
            raw = open_bytes(path)
        except OSError as error:
            raise UserError(f"{path}: this file cannot be read: {error.strerror or error}") from None
        opened.enter_context(raw)
        try:
            file = opened.enter_context(_unpacked(raw, path))
            _check_kind(path, cast(io.BufferedReader, file).peek(8))
            yield file
            if hashes is not None:
                cast(_Hashed, cast(io.BufferedReader, raw).raw).note(hashes)
        except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
            raise UserError(f"{path}: the archive is damaged or cut off: {error}") from None


def _check_kind(path: Path, first: bytes) -> None:
    """Check the first bytes of a text file.

    Raises:
        UserError: They are those of another format.
    """
    what = next((what for start, what in KNOWN_BYTES.items() if first.startswith(start)), "")
    if what and path.suffix.lower() in PACKED:
        raise UserError(
            f"{path}: the content of this archive is compressed again, as {what.partition(':')[0]}: unpack it"
        )
    if what:
        raise UserError(f"{path}: this file holds {what.format(suffix=path.suffix)}")


def many(n: int, what: str) -> str:
    """Return a number and a noun, in the plural if needed.

    >>> many(1, "row"), many(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{n:,} {what}{'s' * (n != 1)}"


@dataclass
class ReadStats:
    """Counts of what was read, repaired and skipped, for the report.

    Args:
        files: Files read.
        documents: Documents read.
        bytes: Bytes of text read.
        bad_utf8: Invalid bytes or lone surrogates, read as U+FFFD.
        nul: NUL characters removed.
        empty: Empty files or records skipped.
        cut: Documents split because of their length.
        too_long: Records skipped because of their length.
        mismatched: Table rows skipped because of their number of cells.
        unnamed_columns: Table columns without a name.
        skipped: Tables in a directory that were not read as text.
        at: Kind of count -> its first occurrence (file:line).
    """

    files: int = 0
    documents: int = 0
    bytes: int = 0
    bad_utf8: int = 0
    nul: int = 0
    empty: int = 0
    cut: int = 0
    too_long: int = 0
    mismatched: int = 0
    unnamed_columns: int = 0
    skipped: int = 0
    at: dict[str, str] = field(default_factory=dict)

    def note(self, kind: str, place: str, count: int = 1) -> None:
        """Add to a count; the first place (file:line) of each kind is kept."""
        if count:
            setattr(self, kind, getattr(self, kind) + count)
            self.at.setdefault(kind, place)

    def rows(self) -> dict[str, int]:
        """Return the counts that are not zero, by name."""
        return {name: n for name, n in vars(self).items() if n and name != "at"}
