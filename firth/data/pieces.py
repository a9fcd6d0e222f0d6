"""Cut input files into pieces of bytes, group the pieces into parts, and read a piece.

The cuts are a function of the files and of `part_bytes`: large files of lines or text are cut at the first line that begins after a
multiple of `part_bytes`, Parquet files between row groups; compressed files are one piece. Consecutive small files are one part.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, BinaryIO

from firth.corpora import readers, remote
from firth.corpora.input_files import GROWTH, ReadStats, within
from firth.corpora.readers import Document, is_url
from firth.types import UserError

MAX_LINE_SEARCH = 64 << 20
"""Bytes that are searched for the end of a line; a file with a longer line is not cut there."""


@dataclass(frozen=True)
class Piece:
    """A file, or a span of it.

    Args:
        path: The file.
        name: Its name in the names of documents.
        span: First byte and the one after the last, or those of the row groups of a Parquet file; None for a whole file.
        size: Bytes of the whole file.
        modified: Modification time of the file (ns).
        weight: Bytes of text in it, as far as its name and size tell.
        copy: A copy of the content on the disk, if the file is in an object store.
    """

    path: str
    name: str
    span: tuple[int, int] | None
    size: int
    modified: int
    weight: int
    copy: str = ""

    @contextmanager
    def copied(self, directory: Path, limit: int | None = None) -> Iterator[Piece]:
        """Yield the piece with a copy of its content in a directory, if it is in an object store; the copy is removed at the end.

        Args:
            directory: The directory.
            limit: Bytes of lines that are enough; text and tables are copied whole.
        """
        if not is_url(self.path):
            yield self
            return
        start, stop = self.span or (0, self.size)
        cut = limit is not None and limit < stop - start and readers.is_lines(Path(self.path))
        with NamedTemporaryFile(dir=directory, prefix="input-", suffix=f"-{Path(self.path).name}") as file:
            remote.fetch(self.path, Path(file.name), (start, start + limit) if cut and limit else self.span)
            if cut:
                os.truncate(file.name, _end_of_lines(Path(file.name)))
            yield replace(self, copy=file.name)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What the piece is recognized by in a later call."""
        return self.name, self.span, self.size

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Piece:
        """Return the piece with these fields."""
        return cls(**fields | {"span": tuple(fields["span"]) if fields["span"] else None})

    def documents(self, field: str, split: str, counts: ReadStats) -> Iterator[Document]:
        """Yield the documents of the piece.

        Raises:
            UserError: The file cannot be read; the message has the line within the whole file.
        """
        path, span = (Path(self.copy), None) if self.copy else (Path(self.path), self.span)
        try:
            # Each step runs within the span: the context of a generator is that of its caller.
            found = readers.file_documents(path, self._document_name, field, split, counts)
            while True:
                with within(span):
                    document = next(found, None)
                if document is None:
                    return
                yield document
        except UserError as error:
            raise UserError(self._in_whole_file(str(error))) from None

    @property
    def _document_name(self) -> str:
        """What the names of its documents begin with: "a.jsonl@4096" for the lines after byte 4096."""
        return f"{self.name}@{self.span[0]}" if self.span and self._in_lines else self.name

    @property
    def _in_lines(self) -> bool:
        """Whether the span is one of bytes that does not begin with the file."""
        return bool(self.span and self.span[0]) and Path(self.path).suffix.lower() != ".parquet"

    def digest(self) -> str:
        """Return the SHA-256 of the bytes of the piece; of a Parquet file, of all of it; in an object store, of the version of the file."""
        if is_url(self.path):
            return hashlib.sha256(f"{self.path} {self.modified}".encode()).hexdigest()
        path = Path(self.path)
        if self.span is None or path.suffix.lower() == ".parquet":
            with path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        start, stop = self.span
        found = hashlib.sha256()
        with path.open("rb") as file:
            file.seek(start)
            while start < stop and (block := file.read(min(1 << 20, stop - start))):
                found.update(block)
                start += len(block)
        return found.hexdigest()

    def check_unchanged(self) -> None:
        """Raise a UserError if the file has changed since the pieces were listed."""
        if is_url(self.path):
            present = remote.version(self.path)
        else:
            try:
                status = Path(self.path).stat()
            except OSError as error:
                raise UserError(f"{self.path}: this file cannot be read: {error.strerror}") from None
            present = status.st_size, status.st_mtime_ns
        if present != (self.size, self.modified):
            raise UserError(f"{self.path}: this file changed while it was read: run the same command again")

    def _in_whole_file(self, message: str) -> str:
        """Return a message with the line number of the whole file in place of that of the span.

        In an object store the lines before the span are not counted: the message has its first byte.
        """
        if self.copy:
            where = f"{self.path} (lines from byte {self.span[0]})" if self.span else self.path
            return message.replace(self.copy, where)
        if self.span is None or not self._in_lines:
            return message
        lines = 0
        with Path(self.path).open("rb") as file:
            left = self.span[0]
            while left and (block := file.read(min(1 << 20, left))):
                lines += block.count(b"\n")
                left -= len(block)
        place = re.compile(rf"^{re.escape(self.path)}:(\d+)")
        return place.sub(lambda found: f"{self.path}:{int(found[1]) + lines}", message)


def list_pieces(paths: Sequence[str], part_bytes: int, counts: ReadStats) -> list[Piece]:
    """Return the pieces of all files, each once, in order.

    Args:
        paths: Files, directories and globs; addresses of object stores come first.
        part_bytes: Bytes of a piece, about.
        counts: Collects the tables that were skipped.

    Raises:
        UserError: A path matches nothing that is read.
    """
    pieces: list[Piece] = []
    for url in filter(is_url, paths):
        seen = {piece.path for piece in pieces}
        pieces += [piece for piece in _remote_pieces(url, part_bytes) if piece.path not in seen]
    local = [path for path in paths if not is_url(path)]
    for path, name in readers.files(local, counts=counts).items():
        status = path.stat()
        weight = round(status.st_size * GROWTH.get(path.suffix.lower(), 1.0))
        whole = Piece(str(path.absolute()), name, None, status.st_size, status.st_mtime_ns, weight)
        cuts: list[tuple[int, int]] = []
        if weight > part_bytes and readers.is_divisible(path):
            with path.open("rb") as file:
                cuts = _line_cuts(file, status.st_size, part_bytes)
            pieces += [replace(whole, span=cut, weight=cut[1] - cut[0]) for cut in cuts]
        elif weight > part_bytes and path.suffix.lower() == ".parquet":
            cuts = _group_cuts(path, part_bytes)
            pieces += [replace(whole, span=cut, weight=weight // len(cuts)) for cut in cuts]
        else:
            pieces.append(whole)
    return pieces


def _remote_pieces(url: str, part_bytes: int) -> list[Piece]:
    """Return the pieces of the files of an object store; Parquet files are not cut."""
    pieces = []
    for found in remote.list_files(url):
        path = Path(found.name)
        weight = round(found.size * GROWTH.get(path.suffix.lower(), 1.0))
        whole = Piece(found.url, found.url, None, found.size, found.version, weight)
        if weight > part_bytes and readers.is_divisible(path):
            with remote.open_file(found.url) as file:
                cuts = _line_cuts(file, found.size, part_bytes)
            pieces += [replace(whole, span=cut, weight=cut[1] - cut[0]) for cut in cuts]
        else:
            pieces.append(whole)
    return pieces


def _line_cuts(file: BinaryIO, size: int, part_bytes: int) -> list[tuple[int, int]]:
    """Return consecutive spans of a file that begin with a line."""
    ends = [0]
    for target in range(part_bytes, size, part_bytes):
        if target <= ends[-1]:
            continue
        file.seek(target - 1)
        line = file.readline(MAX_LINE_SEARCH)
        if line.endswith(b"\n") and file.tell() < size:
            ends.append(file.tell())
    return list(pairwise([*ends, size]))


def _end_of_lines(file: Path) -> int:
    """Return the number of bytes up to the end of the last complete line."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        for end in range(size, 0, -(1 << 20)):
            start = max(0, end - (1 << 20))
            opened.seek(start)
            at = opened.read(end - start).rfind(b"\n")
            if at >= 0:
                return start + at + 1
    return 0


def _group_cuts(path: Path, part_bytes: int) -> list[tuple[int, int]]:
    """Return consecutive row groups of a Parquet file, about `part_bytes` of text each."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            sizes = [table.metadata.row_group(i).total_byte_size for i in range(table.num_row_groups)]
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: this is not a Parquet file that can be read: {error}") from None
    cuts, first, gathered = [], 0, 0
    for i, size in enumerate(sizes):
        gathered += size
        if gathered >= part_bytes:
            cuts.append((first, i + 1))
            first, gathered = i + 1, 0
    return [*cuts, (first, len(sizes))] if first < len(sizes) or not cuts else cuts


def group(pieces: Sequence[Piece], part_bytes: int) -> list[list[Piece]]:
    """Return consecutive pieces in groups of at least `part_bytes`, the last one perhaps less."""
    groups: list[list[Piece]] = []
    size = part_bytes
    for piece in pieces:
        if size >= part_bytes:
            groups.append([])
            size = 0
        groups[-1].append(piece)
        size += piece.weight
    return groups
