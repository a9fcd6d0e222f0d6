"""Read text, JSONL, Parquet, CSV, plain or compressed, from files, directories and globs.

Everything is streamed, in an order that does not depend on the file system. Each defect of a file has a defined handling, and is
counted:

    bad UTF-8, lone surrogates    read as U+FFFD, counted
    NUL characters                removed, counted
    a byte-order mark             dropped
    Windows line breaks           read as \\n (in text files; records are unchanged)
    nothing but white space       skipped, counted (also a record whose text is null)
    text over MAX_RECORD_BYTES    split at a paragraph, a line or a blank, counted
    record over MAX_RECORD_BYTES  skipped, counted
    a file found twice            read once (also through links); hidden files and linked directories are not entered
    a row of too many cells       skipped, counted (`firth.corpora.tables`)
    a table within a directory    read as records; skipped if text is wanted, counted: name the file to read it

A UserError with file and line (and the nearest field) is raised if a line is not JSON, a field is missing or not text, an archive
is damaged or truncated, or a file cannot be read or is UTF-16.

>>> import tempfile, pathlib
>>> folder = pathlib.Path(tempfile.mkdtemp())
>>> _ = (folder / "a.txt").write_bytes(b"\\xef\\xbb\\xbfgood\\x00 day")
>>> counts = ReadStats()
>>> [d.text for d in documents([str(folder)], counts=counts)], counts.nul
(['good day'], 1)
"""

from __future__ import annotations

import codecs
import difflib
import glob
import io
import itertools
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, cast

from firth.corpora import tables
from firth.corpora.input_files import PACKED, ReadStats, current_span, guarded
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.types import UserError

MAX_RECORD_BYTES = 4 << 20
"""Maximum bytes of a document (longer text is split) and of a record (longer ones are skipped)."""

TEXT = (".txt", ".text", ".md", ".rst", ".tex", ".html", ".py", "")
LINES = (".jsonl", ".ndjson")
TABLES = (".parquet",)
KINDS = (
    dict.fromkeys(tables.READERS, "other")
    | dict.fromkeys(TABLES, "table")
    | dict.fromkeys(LINES, "lines")
    | dict.fromkeys(TEXT, "text")
)
"""File name suffix -> how it is read."""

SPLITS = {"file": None, "blank": re.compile(r"\n\s*\n"), "line": re.compile(r"\n")}
SUPPORTED_FILES = (
    "firth reads .txt, .md and such, .jsonl, .parquet, .csv, .tsv, .conll and .json, plain or as .gz and .zst"
)


class Document(NamedTuple):
    """A document.

    Args:
        name: Its file within the path that was given (and its number there), unique and the same on every machine; a record's own `name`
            if it has one (records that share it are held out together).
        text: Its text.
        named: Whether the name is that of the record.
    """

    name: str
    text: str
    named: bool = False


def files(paths: Sequence[str], *, tabled: bool = False, counts: ReadStats | None = None) -> dict[Path, str]:
    """Return the readable files under files, directories and globs, each once, sorted within each given path.

    Args:
        paths: Files, directories and glob patterns.
        tabled: Whether tables (`firth.corpora.tables`) in a directory are read, as records; else only those that are named, and the first
            skipped one is noted in `counts`.
        counts: Collects what was skipped.

    Returns:
        File -> its name relative to the given directory (or the fixed part of a glob). Of two files with one name the second is called
        `name~2`.

    Raises:
        UserError: A path matches nothing, or only unsupported files.
    """
    found: dict[Path, str] = {}
    seen: set[str] = set()
    directories: dict[Path, str] = {}
    names: set[str] = set()
    for given in paths:
        for path, root in _under(given, tabled, counts if counts is not None else ReadStats()):
            real = _real(path, directories)
            if real in seen:
                continue
            seen.add(real)
            plain = name = path.relative_to(root).as_posix()
            number = 1
            while name in names:
                number += 1
                name = f"{plain}~{number}"
            names.add(name)
            found[path] = name
    return found


def _real(path: Path, directories: dict[Path, str]) -> str:
    """Return the path of a file without symbolic links; `directories` caches the resolved directories."""
    if path.is_symlink():
        return os.path.realpath(path)
    parent = path.parent
    if parent not in directories:
        directories[parent] = os.path.realpath(parent)
    return os.path.join(directories[parent], path.name)


def _under(given: str, tabled: bool, counts: ReadStats) -> list[tuple[Path, Path]]:
    """Return the readable files of one given path, each with the directory that its name is relative to."""
    path = Path(given).expanduser()
    if is_url(given):
        raise UserError(f"{given}: text in an object store is prepared first: firth prepare {given} --out CORPUS")
    if path.is_dir():
        if (path / "corpus.json").is_file():
            raise UserError(
                f"{given}: this corpus holds token ids (`firth prepare`), and text or records are wanted here: name their files"
            )
        some = _inside(path, tabled, counts)
        if not some:
            table = counts.at.get("skipped")
            hint = (
                f": {table} and such are records, read as text only where they are named"
                if table
                else f"; {SUPPORTED_FILES}"
            )
            raise UserError(f"{given}: there is no text in this directory{hint}")
        return [(p, path) for p in some]
    if path.exists():
        if not path.is_file():
            raise UserError(f"{given}: this is neither a file nor a directory")
        if _kind(path) is None:
            raise UserError(f"{given}: files of this kind are not read; {SUPPORTED_FILES}")
        return [(path, path.parent)]
    matched = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
    if not matched:
        raise UserError(f"{given}: there is no such file or directory, and it matches none as a pattern")
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.parts[:-1]))
    found = [p for m in matched for p in (_inside(m, tabled, counts) if m.is_dir() else [m])]
    some = [p for p in found if p.is_file() and _kind(p) is not None]
    if not some:
        raise UserError(f"{given}: what matches this pattern is not read; {SUPPORTED_FILES}")
    return [(p, Path(*fixed)) for p in some]


def _inside(root: Path, tabled: bool, counts: ReadStats) -> list[Path]:
    def denied(error: OSError) -> None:
        raise UserError(f"{error.filename}: this directory cannot be read: {error.strerror}") from None

    found = []
    for directory, below, names in os.walk(root, onerror=denied):
        below[:] = [name for name in below if not name.startswith(".")]
        some = [Path(directory, name) for name in sorted(names) if not name.startswith(".")]
        for path in (p for p in some if _kind(p) is not None and p.is_file()):
            if _kind(path) == "other" and not tabled:
                counts.note("skipped", f"{path}")
            else:
                found.append(path)
    return sorted(found)


def documents(
    paths: Sequence[str], *, field: str = "text", split: str = "file", counts: ReadStats | None = None
) -> Iterator[Document]:
    """Yield the documents under `paths`.

    Args:
        paths: Files, directories and glob patterns.
        field: The field of a record with its text.
        split: Whether a text file is one document ("file"), or one per paragraph ("blank") or line ("line"). A text file over
            MAX_RECORD_BYTES becomes several documents.
        counts: Collects what was read, repaired and skipped.

    Raises:
        UserError: A file cannot be read; see the module.
    """
    if split not in SPLITS:
        raise UserError(f"split is {split!r}: use one of {', '.join(SPLITS)}")
    counts = counts if counts is not None else ReadStats()
    for path, name in files(paths, counts=counts).items():
        yield from file_documents(path, name, field, split, counts)


def file_documents(path: Path, name: str, field: str, split: str, counts: ReadStats) -> Iterator[Document]:
    """Yield the documents of one file, or of the part that `firth.corpora.input_files.within` selects.

    Args:
        path: The file.
        name: Its name in the names of the documents.
        field: As in `documents`.
        split: As in `documents`.
        counts: Collects what was read, repaired and skipped.
    """
    if _kind(path) == "text":
        counts.files += 1
        for number, text in enumerate(_split(_chunks(path, split, counts), split, counts), 1):
            yield Document(name if split == "file" and number == 1 else f"{name}:{number}", text)
        return
    for place, record in _records(path, counts, (field, "name"), ()):
        value = record.get(field)
        text = "" if value is None and field in record else clean(text_field(record, field, place), counts, place)
        if text.strip():
            counts.documents += 1
            counts.bytes += len(text.encode())
            own = record.get("name")
            yield Document(str(own) if own else name + place.removeprefix(str(path)), text, bool(own))
        else:
            counts.empty += 1


def is_url(path: str) -> bool:
    """Return whether a path is an address with a protocol of two letters or more.

    >>> is_url("s3://bucket/a.txt"), is_url("/data/a.txt"), is_url("C://a.txt")
    (True, False, False)
    """
    return re.match(r"[a-z][a-z0-9+.-]+://", path) is not None


def is_readable(path: Path) -> bool:
    """Return whether a file has documents, by its name; tables are read only where they are named."""
    return _kind(path) in ("text", "lines", "table")


def is_lines(path: Path) -> bool:
    """Return whether a file consists of lines that are one record each, and is not compressed."""
    return path.suffix.lower() not in PACKED and _kind(path) == "lines"


def is_divisible(path: Path) -> bool:
    """Return whether a file consists of lines or text in which a reader can start anywhere: it is not compressed, nor a table."""
    return path.suffix.lower() not in PACKED and _kind(path) in ("text", "lines")


def records(
    paths: Sequence[str],
    *,
    counts: ReadStats | None = None,
    columns: Sequence[str] = (),
    text: tables.Reader | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file:line, record) of every record. Within `first_records` only the first ones, within `every_nth_record` a sample.

    Args:
        paths: Files, directories and glob patterns.
        counts: Collects what was read, repaired and skipped.
        columns: Names of the columns, for tables without a header.
        text: Reads text files as records; None rejects them.

    Raises:
        UserError: A file cannot be read; see the module.
    """
    found = _all_records(paths, counts if counts is not None else ReadStats(), columns, text)
    return itertools.islice(found, _MAX_RECORDS.get())


def first_record(paths: Sequence[str]) -> tuple[str, dict[str, Any]] | None:
    """Return (file:line, record) of the first record of the first file; None if that file is text or has no record."""
    path = next(iter(files(paths)), None)
    return None if path is None or _kind(path) == "text" else next(_records(path, ReadStats(), (), ()), None)


_MAX_RECORDS: ContextVar[int | None] = ContextVar("max_records", default=None)


@contextmanager
def first_records(count: int | None) -> Iterator[None]:
    """Limit `records` to the first `count` records within the block; None for no limit."""
    token = _MAX_RECORDS.set(count)
    try:
        yield
    finally:
        _MAX_RECORDS.reset(token)


_RECORD_STRIDE: ContextVar[int] = ContextVar("record_stride", default=1)


@contextmanager
def every_nth_record(n: int) -> Iterator[None]:
    """Let `records` yield every n-th record of each file within the block, from the first one. Skipped JSON lines are not parsed."""
    token = _RECORD_STRIDE.set(n)
    try:
        yield
    finally:
        _RECORD_STRIDE.reset(token)


def _all_records(
    paths: Sequence[str], counts: ReadStats, columns: Sequence[str], text: tables.Reader | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in files(paths, tabled=True):
        if _kind(path) == "text" and text is None:
            raise UserError(f"{path}: records are wanted here (.jsonl, .csv, .tsv or .parquet), and this is plain text")
        yield from _records(path, counts, (), columns, text, _RECORD_STRIDE.get())


def text_field(record: dict[str, Any], field: str, place: str = "") -> str:
    """Return the text in a field of a record; `place` is its file and line, for the message, unless the caller adds it.

    Raises:
        UserError: The field is missing or not text; the message names the nearest field.
    """
    value = record.get(field)
    if isinstance(value, str):
        return value
    prefix = place and f"{place}: "
    if field in record:
        raise UserError(f"{prefix}the field {field!r} holds {type(value).__name__}, and text is wanted")
    raise UserError(f"{prefix}there is no field {field!r}; {nearest(field, record)}")


def nearest(field: str, record: Mapping[str, Any]) -> str:
    """Return a hint for a missing field: the most similar one, or all.

    >>> nearest("label", {"text": "", "labels": ""}), nearest("label", {"text": ""})
    ("did you mean 'labels'?", 'it has text')
    """
    close = difflib.get_close_matches(field, list(record), n=1)
    return f"did you mean {close[0]!r}?" if close else f"it has {', '.join(record) or 'none'}"


def clean(text: str, counts: ReadStats, place: str) -> str:
    """Return the text without NUL characters and lone surrogates, both counted."""
    if "\0" in text:
        counts.note("nul", place, text.count("\0"))
        text = text.replace("\0", "")
    repaired = replace_lone_surrogates(text)
    counts.note("bad_utf8", place, repaired is not text)
    return repaired


def _kind(path: Path) -> str | None:
    stem, suffix = os.path.splitext(path.name)
    if suffix.lower() in PACKED:
        suffix = os.path.splitext(stem)[1]
    return KINDS.get(suffix.lower())


def _chunks(path: Path, split: str, counts: ReadStats) -> Iterator[str]:
    """Yield a text file in chunks of about MAX_RECORD_BYTES, decoded and cleaned, cut where `split` splits, else at white space."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    pending, first = "", True
    with guarded(path) as file:
        while True:
            raw = file.read(MAX_RECORD_BYTES)
            block = decoder.getstate()[0] + raw
            if first and block[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise UserError(f"{path}: this is UTF-16 and UTF-8 is read; convert it: iconv -f UTF-16 -t UTF-8")
            piece = decoder.decode(raw, final=not raw)
            if "\ufffd" in piece:  # U+FFFD in the file itself is no damage
                counts.note("bad_utf8", f"{path}", piece.count("\ufffd") - block.count("\ufffd".encode()))
            if first and piece:
                piece, first = piece.removeprefix("\ufeff"), False
            pending = (pending + clean(piece, counts, f"{path}")).replace("\r\n", "\n")
            if not raw:
                yield pending
                return
            while len(pending) > MAX_RECORD_BYTES:
                cut, clean_cut = _cut(pending, split)
                counts.cut += not clean_cut
                yield pending[:cut]
                pending = pending[cut:]


def _cut(text: str, split: str) -> tuple[int, bool]:
    """Return where to cut a text longer than MAX_RECORD_BYTES, and whether a document ends there anyway."""
    if split != "file":
        ends = "\n" if split == "line" else "\n\n"
        at = text.rfind(ends, 0, MAX_RECORD_BYTES)
        if at >= 0:
            return at + len(ends), True
    for sign in ("\n\n", "\n", " "):
        at = text.rfind(sign, MAX_RECORD_BYTES // 2, MAX_RECORD_BYTES)
        if at >= 0:
            return at + len(sign), False
    return MAX_RECORD_BYTES - (MAX_RECORD_BYTES > 1 and text[MAX_RECORD_BYTES - 1] == "\r"), False


def _split(chunks: Iterator[str], split: str, counts: ReadStats) -> Iterator[str]:
    pattern = SPLITS[split]
    empty = True
    for chunk in chunks:
        for text in pattern.split(chunk) if pattern else [chunk]:
            if text.strip():
                empty = False
                counts.documents += 1
                counts.bytes += len(text.encode())
                yield text
    counts.empty += empty


def _records(
    path: Path,
    counts: ReadStats,
    wanted: Sequence[str],
    columns: Sequence[str],
    text: tables.Reader | None = None,
    stride: int = 1,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file:line, record) of one file.

    Args:
        path: The file.
        counts: Collects what was read, repaired and skipped.
        wanted: Columns to read of a Parquet table; empty for all.
        columns: As in `records`.
        text: As in `records`.
        stride: The first record of each so many is yielded.
    """
    counts.files += 1
    kind = _kind(path)
    suffix = (path.with_suffix("") if path.suffix.lower() in PACKED else path).suffix.lower()
    if kind in ("table", "lines") or (suffix == ".json" and _has_lines(path)):
        yield from (
            itertools.islice(_table(path, counts, wanted), 0, None, stride)
            if kind == "table"
            else _lines(path, counts, stride)
        )
        return
    with guarded(path) as file:
        read = text if kind == "text" and text else tables.READERS[suffix]
        yield from itertools.islice(read(file, path, counts, columns), 0, None, stride)


def _has_lines(path: Path) -> bool:
    """Return whether the first nonblank line of a .json file is a record, as in JSON lines."""
    with guarded(path) as file:
        reader = io.BufferedReader(cast(io.RawIOBase, file), 1 << 20)
        while (line := reader.readline(MAX_RECORD_BYTES + 1)) and not line.strip():
            pass
    try:
        first = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and "data" not in first  # SQuAD's JSON may be one line


def _lines(path: Path, counts: ReadStats, stride: int = 1) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file:line, record) of one in `stride` JSON lines, without the records that a later line takes back.

    `firth annotate` only appends to its files: {"undo": 7} takes back the record with the id 7. Its records have an `annotator`, so
    that only a file that begins with such a record is read twice. A last line that a killed process left incomplete is skipped there.
    """
    undone: set[int] | None = None
    appended = False
    for number, line in _numbered_lines(path, counts):
        if (number - 1) % stride:
            continue
        place = f"{path}:{number}"
        if appended and not line.endswith(b"\n") and not _is_json(line):
            return
        record = parse(line, place, counts)
        if undone is None:
            appended = "annotator" in record
            undone = _undone(path) if appended else set()
        if _undo_of(record) is None and not (undone and record.get("id") in undone):
            yield place, record


def _undone(path: Path) -> set[int]:
    """Return the ids of the records that lines of a file take back."""
    found: set[int] = set()
    for _, line in _numbered_lines(path, ReadStats()):
        if b'"undo"' in line and _is_json(line) and (id := _undo_of(json.loads(line))) is not None:
            found.add(id)
    return found


def _undo_of(record: Any) -> int | None:
    """Return the id of the record that a line takes back; None for a line that is a record."""
    id = record.get("undo") if isinstance(record, dict) and record.keys() <= {"id", "undo", "annotator"} else None
    return id if type(id) is int else None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _numbered_lines(path: Path, counts: ReadStats) -> Iterator[tuple[int, bytes]]:
    """Yield the number of each line that is not blank, and the line."""
    number = 0
    with guarded(path) as file:
        reader = io.BufferedReader(cast(io.RawIOBase, file), 1 << 20)
        while line := reader.readline(MAX_RECORD_BYTES + 1):
            number += 1
            if len(line) > MAX_RECORD_BYTES and not line.endswith(b"\n"):
                counts.note("too_long", f"{path}:{number}")
                while (rest := reader.readline(MAX_RECORD_BYTES)) and not rest.endswith(b"\n"):
                    pass
                continue
            if number == 1:
                if line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                    raise UserError(f"{path}: this is UTF-16 and UTF-8 is read; convert it: iconv -f UTF-16 -t UTF-8")
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, line
    if not number:
        counts.empty += 1


def parse(line: bytes, place: str, counts: ReadStats) -> dict[str, Any]:
    """Parse a JSON line as a record.

    Raises:
        UserError: The line is not a JSON object.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("utf-8", "replace")
        counts.note("bad_utf8", place)
    try:
        record = json.loads(text)
    except RecursionError:
        raise UserError(f"{place}: this record is nested too deeply; fix or remove it") from None
    except ValueError as error:
        raise UserError(f"{place}: this line is not JSON: {error}; fix or remove it") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: a record is a JSON object with named fields, and this is {text.strip()[:40]!r}")
    return record


def _table(path: Path, counts: ReadStats, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            names = table.schema_arrow.names
            some = [c for c in columns if c in names] if columns and columns[0] in names else None
            first, last = current_span() or (0, table.num_row_groups)
            row = sum(table.metadata.row_group(i).num_rows for i in range(first))
            for batch in table.iter_batches(batch_size=64, columns=some, row_groups=range(first, last)):
                parts = [batch] if batch.nbytes <= MAX_RECORD_BYTES else [batch.slice(i, 1) for i in range(len(batch))]
                for part in parts:
                    if part.nbytes > MAX_RECORD_BYTES:
                        counts.note("too_long", f"{path}:{row + 1}", len(part))
                        row += len(part)
                        continue
                    for record in part.to_pylist():
                        row += 1
                        yield f"{path}:{row}", record
            if not row:
                counts.empty += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: a text after row {row} is not UTF-8: {error.reason}") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: this is not a Parquet file that can be read: {error}") from None
