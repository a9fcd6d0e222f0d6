r"""Input records of `predict` and `embed`, from a file or standard input, with row numbers and locations.

    a fine film                       lines     {"text": "a fine film"}                           row 1
                                                no text: an empty row                              row 2
    a dull one                                  {"text": "a dull one"}                             row 3

Each input record has one output row, in order. A record that cannot be read is an error with its file and line; a record
without text has an empty row. The records are written as JSON lines to a temporary folder, where every reader of records
can read them; messages about a line of that file are translated to the user's file and line.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal

from firth.corpora import input_files, readers, tables
from firth.corpora.input_files import ReadStats, many
from firth.types import UserError

Form = Literal["auto", "lines", "csv", "tsv", "jsonl", "conll", "squad"]
FORMS: dict[str, str] = {
    "lines": ".txt", "csv": ".csv", "tsv": ".tsv", "jsonl": ".jsonl", "conll": ".conll", "squad": ".json",
}  # fmt: skip
"""Format -> the file name suffix by which `firth.corpora.readers` recognizes it."""

INPUT = "standard input"
SNIFFED_LINES = 50
"""First lines of a file from which its format is guessed."""

Record = dict[str, Any]


@dataclass(frozen=True)
class FormField:
    """A field of a record, as a page asks for it.

    Args:
        field: Its name in the record.
        label: What the page calls it.
        kind: "text"; "passage", a long text; "words", separated by blanks; "lines", a list with one text a line.
        note: How it is written; empty where that is clear.
    """

    field: str
    label: str
    kind: Literal["text", "passage", "words", "lines"] = "text"
    note: str = ""


@dataclass(frozen=True)
class InputSchema:
    """Input that a task reads.

    Args:
        field: Name of the text field, by which a table is recognized.
        line: Turns a line of text into a record.
        texts: Returns the texts of a record, of which at least one must not be blank.
        columns: Columns of a table without a header.
        tags: Tags by which CoNLL columns are distinguished from lines of text.
        passages: Whether SQuAD JSON is read.
    """

    field: str
    line: Callable[[str], Record]
    texts: Callable[[Record], Sequence[Any]]
    columns: Sequence[str] = ()
    tags: Sequence[str] = ()
    passages: bool = False


@dataclass
class InputRecords:
    """Records read from the user's input.

    Args:
        name: Name of the input, as the user gave it.
        path: JSON lines of the records with text.
        locations: File and line of each record with text.
        rows: Number and `id`, if it has one, of every record.
        has_text: Whether each record has text.
        notes: Warnings about the input.
    """

    name: str
    path: Path
    locations: list[str] = field(default_factory=list)
    rows: list[Record] = field(default_factory=list)
    has_text: list[bool] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def with_user_locations(self, message: str) -> str:
        """Return a message with locations in the temporary file replaced by those in the user's input."""

        def location(found: re.Match[str]) -> str:
            return self.locations[int(found[1]) - 1] if found[1] else self.name

        return re.sub(re.escape(str(self.path)) + r"(?::(\d+))?", location, message)

    @contextmanager
    def user_locations(self) -> Iterator[None]:
        """Translate the locations in a UserError raised inside the context."""
        try:
            yield
        except UserError as error:
            raise UserError(self.with_user_locations(str(error))) from None


def read_inputs(file: str, stdin: BinaryIO, form: str, schema: InputSchema, folder: Path) -> InputRecords:
    """Read the records of a file or of standard input.

    Args:
        file: The file; "-" reads `stdin`.
        stdin: Standard input.
        form: Format, one of `FORMS`, or "auto" to guess it.
        schema: Input of the task.
        folder: Temporary folder for the records.

    Raises:
        UserError: The file does not exist or holds no record, or a record cannot be read; the error has its location.
    """
    if form != "auto" and form not in FORMS:
        raise UserError(f"--input {form}: the formats are auto, {', '.join(FORMS)}")
    name = INPUT if file == "-" else file
    found = InputRecords(name, folder / "records.jsonl")
    source = _source(file, stdin, folder)
    if form == "auto":
        form, note = _form(file, source, schema)
        found.notes += [f"{name}: {note}"] if note else []
    counts = ReadStats()
    with found.path.open("wb") as out:
        for location, record in _records(source, form, schema, counts, folder, name):
            _add(found, location, record, schema, out)
    if counts.mismatched:
        raise UserError(
            f"{counts.at['mismatched']}: this row cannot be read, so it would have no prediction ({counts.mismatched:,} such "
            "rows): fix or remove it"
        )
    if counts.too_long:
        raise UserError(
            f"{name}: {many(counts.too_long, 'record')} longer than {readers.MAX_RECORD_BYTES >> 20} MB, the most that is read: shorten it"
        )
    if not found.rows:
        raise UserError(f"{name}: the input holds no record")
    if counts.bad_utf8:
        found.notes.append(f"{name}: {many(counts.bad_utf8, 'line')} not in UTF-8, read with U+FFFD for bad bytes")
    if counts.nul:
        found.notes.append(f"{name}: {many(counts.nul, 'line')} with NUL characters, read without them")
    if not all(found.has_text):
        empty = [row["row"] for row, has_text in zip(found.rows, found.has_text, strict=True) if not has_text]
        found.notes.append(
            f"{name}: {many(len(empty), 'row')} of {len(found.rows):,} without text; the first is row {empty[0]}"
        )
    return found


def _source(file: str, stdin: BinaryIO, folder: Path) -> Path:
    """Return the file to read; standard input is copied to one."""
    if file != "-":
        if not Path(file).is_file():
            raise UserError(f"{file}: there is no such file; - reads standard input")
        return Path(file)
    path = folder / "standard-input"
    path.write_bytes(stdin.read())
    return path


def _add(found: InputRecords, location: str, record: Record, schema: InputSchema, out: BinaryIO) -> None:
    own = {"id": record["id"]} if isinstance(record.get("id"), (str, int)) else {}
    found.rows.append({"row": len(found.rows) + 1} | own)
    # A missing field or one that is not text is not an empty text: the reader raises an error for it.
    found.has_text.append(any(not isinstance(text, str) or text.strip() for text in schema.texts(record)))
    if not found.has_text[-1]:
        return
    try:
        line = json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # a lone surrogate
        line = json.dumps(record, default=str).encode()
    if len(line) >= readers.MAX_RECORD_BYTES:
        raise UserError(
            f"{location}: this record is longer than {readers.MAX_RECORD_BYTES >> 20} MB and cannot be read: shorten it"
        )
    found.locations.append(location)
    out.write(line + b"\n")


def _records(
    source: Path, form: str, schema: InputSchema, counts: ReadStats, folder: Path, name: str
) -> Iterator[tuple[str, Record]]:
    """Yield the location and the record of every record, blank lines of text included."""
    if form == "lines":
        yield from ((f"{name}:{i}", schema.line(text)) for i, text in enumerate(_lines(source, counts, name), 1))
        return
    packed = source.suffix.lower() if source.suffix.lower() in input_files.PACKED else ""
    end, path = FORMS.get(form, ""), source
    if end and not source.name.removesuffix(packed).lower().endswith(end):
        path = folder / f"given{end}{packed}"  # readers recognize a format by the suffix
        path.symlink_to(source.resolve())
    try:
        for location, record in readers.records([str(path)], counts=counts, columns=schema.columns):
            yield location.replace(str(path), name), record
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from None
    finally:
        counts.at |= {kind: location.replace(str(path), name) for kind, location in counts.at.items()}


def _lines(path: Path, counts: ReadStats, name: str) -> Iterator[str]:
    """Yield the lines of a text, separated by line feeds only, without their line ends."""
    try:
        with input_files.guarded(path) as file:
            for number, raw in enumerate(file):
                if not number:
                    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                        raise UserError(
                            f"{name}: this is UTF-16, but UTF-8 is needed; convert it: iconv -f UTF-16 -t UTF-8"
                        )
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                text = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "replace")
                counts.bad_utf8 += "\ufffd" in text and "\ufffd".encode() not in raw
                counts.nul += "\0" in text
                yield text.replace("\0", "")
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from None


def _form(file: str, source: Path, schema: InputSchema) -> tuple[str, str]:
    """Return the format of a file by its name or its first lines, and a note if it is ambiguous."""
    packed = Path(file).suffix.lower() in input_files.PACKED
    end = (Path(file).with_suffix("") if packed else Path(file)).suffix.lower()
    if file != "-" and end not in (".txt", ".text", ""):
        known = (*readers.LINES, *readers.TABLES, *tables.READERS)
        return (
            "conll" if schema.tags and end not in known else "",
            "",
        )  # the files of CoNLL-2003 are eng.train, eng.testa
    head = list(islice(_lines(source, ReadStats(), INPUT if file == "-" else file), SNIFFED_LINES))
    return guess_form(head, schema)


def guess_form(head: Sequence[str], schema: InputSchema) -> tuple[str, str]:
    """Return the format of a text by its first lines, and a note if it is ambiguous.

    >>> schema = InputSchema("review", lambda line: {"review": line}, lambda record: [record["review"]])
    >>> [guess_form(lines, schema)[0] for lines in (["id,review"], ["a fine review, and long"], ['{"review": "a"}'], ["{a} film"])]
    ['csv', 'lines', 'jsonl', 'lines']
    """
    some = [line for line in head if line.strip()]
    first = some[0].strip() if some else ""
    if re.match(r"\[\s*(\{|$)", first) or (first.startswith("{") and schema.passages and _is_document(first)):
        return "squad", ""
    if first.startswith("{"):
        if _object(first) is not None or re.match(r'\{\s*"', first):
            return "jsonl", ""
        return (
            "lines",
            "its first line begins with { but is not JSON: it is read as lines of text (--input overrides this)",
        )
    if schema.tags:
        width, tagged = _columns(some, schema.tags)
        if width > 1 and tagged:
            return "conll", ""
        if width > 1 and len(some) > 1:
            return "lines", (
                "this may have one word per line with columns and unknown tags: it is read as one sentence per line (--input "
                "lines or --input conll selects)"
            )
        return "lines", ""
    cells = {sign: [cell.strip('" \r\ufeff') for cell in first.split(sign)] for sign in "\t,;"}
    for sign, names in cells.items():
        if len(names) > 1 and schema.field in names:
            return ("tsv" if sign == "\t" else "csv"), ""
    for sign in cells:
        widths = {len(row) for row in csv.reader(some, delimiter=sign)} if len(some) > 1 else {1}
        if len(widths) == 1 and widths != {1}:
            kind = "tsv" if sign == "\t" else "csv"
            return "lines", (
                f"this may be a table without a column {schema.field!r}: it is read as lines of text, including the first line "
                f"(--input lines or --input {kind} selects)"
            )
    return "lines", ""


def _object(line: str) -> Record | None:
    """Return the JSON object of a line; None if it is not one."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _is_document(first: str) -> bool:
    """Return whether a line begins a single JSON document like SQuAD's, not a JSON line."""
    found = _object(first)
    return found is None or isinstance(found.get("data"), list)


def _columns(some: Sequence[str], tags: Sequence[str]) -> tuple[int, bool]:
    """Return the number of cells of all lines (0 if they differ), and whether at least half of them end in a tag.

    >>> _columns(["Paris NNP I-NP B-LOC", "sleeps VBZ I-VP O"], ["B-LOC", "O"]), _columns(["a grim film"], ["O"])
    ((4, True), (3, False))
    """
    rows = [line.split("\t") if "\t" in line else line.split() for line in some]
    rows = [row for row in rows if row[0] != "-DOCSTART-"]
    kinds = {tag.partition("-")[2] or tag for tag in tags} | {*tags, "O"}
    tagged = sum(row[-1] in kinds or row[-1].partition("-")[2] in kinds for row in rows)
    widths = {len(row) for row in rows}
    return (widths.pop() if len(widths) == 1 else 0), 2 * tagged >= len(rows) > 0
