"""Reading what users have: text, JSONL and Parquet, plain or compressed, in files, directories and globs.

Everything streams, in an order that does not depend on the file system. What is wrong with a file has a stated
policy, and each use of it is counted:

    bad UTF-8                 read as U+FFFD, counted               a byte-order mark     dropped
    NUL bytes                 removed, counted                      an empty document     skipped, counted
    text without a break      cut at a blank every LONGEST bytes    a record over LONGEST bytes   skipped, counted
    a line that is not JSON, a field that is missing or no text     UserError with file, line and the nearest field

>>> import tempfile, pathlib
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> _ = (folder / "a.txt").write_bytes(b"\\xef\\xbb\\xbfgood\\x00 day")
>>> counts = Counts()
>>> [d.text for d in documents([str(folder)], counts=counts)], counts.nul
(['good day'], 1)
"""

from __future__ import annotations

import codecs
import difflib
import glob
import gzip
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from firth.types import UserError

LONGEST = 4 << 20
"""Bytes: the longest piece of text handed on as one document, and the longest record that is read."""

TEXT = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", "")
LINES = (".jsonl", ".ndjson")
TABLES = (".parquet",)
SPLITS = ("file", "blank", "line")


@dataclass
class Counts:
    """What was read and what was mended or left out, for the report."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    bad_utf8: int = 0
    nul: int = 0
    empty: int = 0
    cut: int = 0
    too_long: int = 0

    def rows(self) -> dict[str, int]:
        """The counts that are not zero, by name."""
        return {name: n for name, n in vars(self).items() if n}


class Document(NamedTuple):
    """name: its file within what the user named (and the record's number), the same on every machine; text: what it says."""

    name: str
    text: str


def files(paths: Sequence[str]) -> dict[Path, str]:
    """The readable files under files, directories and globs, each once, sorted within each path that was given.

    File -> its name within the directory that was given, which does not depend on where that lies.

    Raises UserError where a path matches nothing, or only files of a kind that is not read.
    """
    found: dict[Path, str] = {}
    for given in paths:
        path = Path(given).expanduser()
        root = path if path.is_dir() else None
        if path.is_dir():
            some = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p, path) and _kind(p) is not None)
            if not some:
                raise UserError(
                    f"{given}: there is no text in this directory; firth reads .txt, .md, .jsonl and .parquet"
                )
        elif path.is_file():
            if _kind(path) is None:
                raise UserError(f"{given}: files of this kind are not read; firth reads text, .jsonl and .parquet")
            some = [path]
        else:
            some = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
            if not some:
                raise UserError(f"{given}: there is no such file or directory, and it matches none as a pattern")
        found |= {p: p.relative_to(root).as_posix() if root else p.name for p in some if p not in found}
    return found


def documents(
    paths: Sequence[str], *, field: str = "text", split: str = "file", counts: Counts | None = None
) -> Iterator[Document]:
    """The documents under `paths`. split: a text file is one document ("file"), or one per paragraph or line.

    A text file over LONGEST bytes comes in several documents, cut at white space.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}: use one of {', '.join(SPLITS)}")
    counts = counts if counts is not None else Counts()
    for path, name in files(paths).items():
        if _kind(path) == "text":
            counts.files += 1
            for number, text in enumerate(_split(_chunks(path, counts), split, counts), 1):
                yield Document(name if split == "file" and number == 1 else f"{name}:{number}", text)
        else:
            for place, record in _records(path, counts):
                text = clean(text_field(record, field, place), counts)
                if text.strip():
                    counts.documents += 1
                    counts.bytes += len(text.encode("utf-8", "replace"))
                    yield Document(str(record.get("name") or name + place.removeprefix(str(path))), text)
                else:
                    counts.empty += 1


def records(paths: Sequence[str], *, counts: Counts | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:line, record) of every record in JSONL and Parquet files. Raises UserError for text files."""
    counts = counts if counts is not None else Counts()
    for path in files(paths):
        if _kind(path) == "text":
            raise UserError(f"{path}: records are wanted here (.jsonl or .parquet), and this is plain text")
        yield from _records(path, counts)


def text_field(record: dict[str, Any], field: str, place: str) -> str:
    """The text in a record's field; UserError with the nearest field that exists."""
    value = record.get(field)
    if isinstance(value, str):
        return value
    if field in record:
        raise UserError(f"{place}: the field {field!r} holds {type(value).__name__}, and text is wanted")
    close = difflib.get_close_matches(field, list(record), n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(record) or 'none'}"
    raise UserError(f"{place}: there is no field {field!r}; {hint}")


def clean(text: str, counts: Counts) -> str:
    """Without NUL characters and lone surrogates, both counted."""
    if "\0" in text:
        counts.nul += text.count("\0")
        text = text.replace("\0", "")
    if not text.isascii():
        whole = text.encode("utf-8", "replace").decode("utf-8")
        counts.bad_utf8 += whole != text
        text = whole
    return text


def open_bytes(path: Path) -> BinaryIO:
    """The file's content, unpacked where its name says .gz or .zst."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import zstandard

        raw = path.open("rb")
        return cast(BinaryIO, zstandard.ZstdDecompressor().stream_reader(raw, closefd=True, read_across_frames=True))
    return path.open("rb")


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _kind(path: Path) -> str | None:
    suffix = path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix
    suffix = suffix.lower()
    return "text" if suffix in TEXT else "lines" if suffix in LINES else "table" if suffix in TABLES else None


def _chunks(path: Path, counts: Counts) -> Iterator[str]:
    """A text file in pieces of about LONGEST bytes, cut at white space, decoded and cleaned."""
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    held, first = "", True
    with _guarded(path) as file:
        while True:
            raw = file.read(LONGEST)
            try:
                piece = decoder.decode(raw, final=not raw)
            except UnicodeDecodeError:
                waiting, _ = decoder.getstate()
                decoder.reset()
                whole = waiting + raw
                tail = _incomplete(whole) if raw else 0
                piece = whole[: len(whole) - tail].decode("utf-8", "replace")
                counts.bad_utf8 += max(1, piece.count("\ufffd"))
                decoder.decode(whole[len(whole) - tail :])
            if first:
                piece, first = piece.removeprefix("\ufeff"), False
            held += clean(piece, counts)
            if not raw:
                yield held
                return
            if len(held) >= LONGEST:
                cut = max(held.rfind("\n\n"), held.rfind("\n"), held.rfind(" ")) + 1
                cut = cut or len(held)
                counts.cut += 1
                yield held[:cut]
                held = held[cut:]


def _incomplete(data: bytes) -> int:
    """How many bytes at the end are the beginning of a character that the next block completes."""
    for n in range(1, min(4, len(data)) + 1):
        lead = data[-n]
        if lead >= 0xC0:
            width = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return n if width > n else 0
        if lead < 0x80:
            return 0
    return 0


def _split(chunks: Iterator[str], split: str, counts: Counts) -> Iterator[str]:
    pattern = {"blank": r"\n\s*\n", "line": r"\n"}.get(split)
    empty = True
    for chunk in chunks:
        for text in re.split(pattern, chunk) if pattern else [chunk]:
            if text.strip():
                empty = False
                counts.documents += 1
                counts.bytes += len(text.encode("utf-8"))
                yield text
    counts.empty += empty


def _records(path: Path, counts: Counts) -> Iterator[tuple[str, dict[str, Any]]]:
    counts.files += 1
    yield from (_table(path) if _kind(path) == "table" else _lines(path, counts))


def _lines(path: Path, counts: Counts) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    with _guarded(path) as file:
        reader = io.BufferedReader(cast(io.RawIOBase, file), 1 << 20)
        while line := reader.readline(LONGEST + 1):
            number += 1
            if len(line) > LONGEST and not line.endswith(b"\n"):
                counts.too_long += 1
                while (rest := reader.readline(LONGEST)) and not rest.endswith(b"\n"):
                    pass
                continue
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            yield f"{path}:{number}", parse(line, f"{path}:{number}", counts)
    if not number:
        counts.empty += 1


def parse(line: bytes, place: str, counts: Counts) -> dict[str, Any]:
    """One JSON line as a record."""
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("utf-8", "replace")
        counts.bad_utf8 += 1
    try:
        record = json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: this line is not JSON: {error}; mend or remove it") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: a record is a JSON object with named fields, and this is {text.strip()[:40]!r}")
    return record


def _table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        row = 0
        for batch in table.iter_batches(batch_size=256):
            for record in batch.to_pylist():
                row += 1
                yield f"{path}: row {row}", record
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: this is not a Parquet file that can be read: {error}") from None


class _guarded:  # noqa: N801 - used as a `with` statement reads
    """An open file whose damage (a cut-off archive, missing rights) is told in one sentence."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> BinaryIO:
        try:
            self.file = open_bytes(self.path)
        except OSError as error:
            raise UserError(f"{self.path}: this file cannot be read: {error.strerror or error}") from None
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.file.close()
        if isinstance(error, (OSError, EOFError)) or type(error).__name__ == "ZstdError":
            raise UserError(f"{self.path}: the archive is damaged or cut off: {error}") from None
