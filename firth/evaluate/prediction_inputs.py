r"""What a user hands over to be told of: records of any file, or of standard input, each with its number and its place.

    a fine film                       lines     {"text": "a fine film"}                           row 1
                                                nothing to tell of: an empty row                   row 2
    a dull one                                  {"text": "a dull one"}                             row 3

A row goes out for each that comes in, in their order: what cannot be read is an error with its file and line, and what says
nothing has a row of its own. The records are laid as JSON lines into a folder, where every reader of records finds them; what
is then said of a line there is said of the place that the user knows.
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

from firth.corpora import compression, readers, tables
from firth.corpora.read_stats import ReadStats, many
from firth.types import UserError

Form = Literal["auto", "lines", "csv", "tsv", "jsonl", "conll", "squad"]
FORMS: dict[str, str] = {
    "lines": ".txt", "csv": ".csv", "tsv": ".tsv", "jsonl": ".jsonl", "conll": ".conll", "squad": ".json",
}  # fmt: skip
"""How a user calls a form -> the end of the name by which `firth.corpora.readers` knows it."""

INPUT = "standard input"
HEAD = 50
"""Lines by which a form is told from another."""

Record = dict[str, Any]


@dataclass(frozen=True)
class InputSchema:
    """What a task reads. field: of its text, by which a table is known. line: a line of text as a record. columns: of a table
    without a head. tags: those by which columns of words are known from lines. passages: whether it reads SQuAD's JSON.
    says: the texts of a record, of which one at least must not be blank."""

    field: str
    line: Callable[[str], Record]
    says: Callable[[Record], Sequence[Any]]
    columns: Sequence[str] = ()
    tags: Sequence[str] = ()
    passages: bool = False


@dataclass
class InputRecords:
    """What was handed over. name: as the user calls it; path: of the records that say something, as JSON lines; places: of
    these. rows: of every record its number and its `id`, if it has one; told: which of them say something."""

    name: str
    path: Path
    places: list[str] = field(default_factory=list)
    rows: list[Record] = field(default_factory=list)
    told: list[bool] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def shown(self, message: str) -> str:
        """A message, with the user's places in it."""

        def place(found: re.Match[str]) -> str:
            return self.places[int(found[1]) - 1] if found[1] else self.name

        return re.sub(re.escape(str(self.path)) + r"(?::(\d+))?", place, message)

    @contextmanager
    def named(self) -> Iterator[None]:
        """Whatever is wrong within is said of the user's places."""
        try:
            yield
        except UserError as error:
            raise UserError(self.shown(str(error))) from None


def read_inputs(file: str, stdin: BinaryIO, form: str, wanted: InputSchema, folder: Path) -> InputRecords:
    """The records of a file, or of what comes in where it is -; form: one of `FORMS`, or "auto" for what it looks like.

    Raises UserError for a file that is not there or holds nothing, and for a record that cannot be read, with its place.
    """
    if form != "auto" and form not in FORMS:
        raise UserError(f"--input {form}: there is auto, {', '.join(FORMS)}")
    name = INPUT if file == "-" else file
    found = InputRecords(name, folder / "records.jsonl")
    source = _source(file, stdin, folder)
    if form == "auto":
        form, remark = _form(file, source, wanted)
        found.remarks += [f"{name}: {remark}"] if remark else []
    counts = ReadStats()
    with found.path.open("wb") as out:
        for place, record in _records(source, form, wanted, counts, folder, name):
            _add(found, place, record, wanted, out)
    if counts.mismatched:
        raise UserError(
            f"{counts.at['mismatched']}: a row that cannot be read would have none in the answer ({counts.mismatched:,} in "
            "all): mend or remove it"
        )
    if counts.too_long:
        raise UserError(
            f"{name}: {many(counts.too_long, 'record')} longer than {readers.MAX_RECORD_BYTES >> 20} MB, which cannot be read: shorten "
            "what is so long"
        )
    if not found.rows:
        raise UserError(f"{name}: there is no record in it")
    if counts.bad_utf8:
        found.remarks.append(f"{name}: {many(counts.bad_utf8, 'line')} not in UTF-8, read with U+FFFD in place")
    if counts.nul:
        found.remarks.append(f"{name}: {many(counts.nul, 'line')} with NUL characters, read without them")
    if not all(found.told):
        empty = [row["row"] for row, told in zip(found.rows, found.told, strict=True) if not told]
        found.remarks.append(
            f"{name}: {many(len(empty), 'row')} of {len(found.rows):,} without text; the first is row {empty[0]}"
        )
    return found


def _source(file: str, stdin: BinaryIO, folder: Path) -> Path:
    """Where the bytes are."""
    if file != "-":
        if not Path(file).is_file():
            raise UserError(f"{file}: there is no such file; - reads standard input")
        return Path(file)
    path = folder / "standard-input"
    path.write_bytes(stdin.read())
    return path


def _add(found: InputRecords, place: str, record: Record, wanted: InputSchema, out: BinaryIO) -> None:
    own = {"id": record["id"]} if isinstance(record.get("id"), (str, int)) else {}
    found.rows.append({"row": len(found.rows) + 1} | own)
    says = wanted.says(record)
    # A text that is missing or is none is not an empty one: its reader says so.
    found.told.append(any(not isinstance(text, str) or text.strip() for text in says))
    if not found.told[-1]:
        return
    try:
        line = json.dumps(record, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:  # half a character
        line = json.dumps(record, default=str).encode()
    if len(line) >= readers.MAX_RECORD_BYTES:
        raise UserError(
            f"{place}: this record is longer than {readers.MAX_RECORD_BYTES >> 20} MB and cannot be read: shorten it"
        )
    found.places.append(place)
    out.write(line + b"\n")


def _records(
    source: Path, form: str, wanted: InputSchema, counts: ReadStats, folder: Path, name: str
) -> Iterator[tuple[str, Record]]:
    """(place, record) of every record, blank lines of a text among them."""
    if form == "lines":
        yield from ((f"{name}:{i}", wanted.line(text)) for i, text in enumerate(_lines(source, counts, name), 1))
        return
    packed = source.suffix.lower() if source.suffix.lower() in compression.PACKED else ""
    end, path = FORMS.get(form, ""), source
    if end and not source.name.removesuffix(packed).lower().endswith(end):
        path = folder / f"given{end}{packed}"  # readers go by the end of a name
        path.symlink_to(source.resolve())
    try:
        for place, record in readers.records([str(path)], counts=counts, columns=wanted.columns):
            yield place.replace(str(path), name), record
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from None
    finally:
        counts.at |= {kind: place.replace(str(path), name) for kind, place in counts.at.items()}


def _lines(path: Path, counts: ReadStats, name: str) -> Iterator[str]:
    """The lines of a text, parted by line feeds alone, without their ends."""
    try:
        with compression.guarded(path) as file:
            for number, raw in enumerate(file):
                if not number:
                    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                        raise UserError(
                            f"{name}: this is UTF-16 and UTF-8 is read; convert it: iconv -f UTF-16 -t UTF-8"
                        )
                    raw = raw.removeprefix(b"\xef\xbb\xbf")
                text = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8", "replace")
                counts.bad_utf8 += "\ufffd" in text and "\ufffd".encode() not in raw
                counts.nul += "\0" in text
                yield text.replace("\0", "")
    except UserError as error:
        raise UserError(str(error).replace(str(path), name)) from None


def _form(file: str, source: Path, wanted: InputSchema) -> tuple[str, str]:
    """What a file is by its name, or by its first lines; and a remark where that can be doubted."""
    packed = Path(file).suffix.lower() in compression.PACKED
    end = (Path(file).with_suffix("") if packed else Path(file)).suffix.lower()
    if file != "-" and end not in (".txt", ".text", ""):
        known = (*readers.LINES, *readers.TABLES, *tables.READERS)
        return ("conll" if wanted.tags and end not in known else "", "")  # CoNLL-2003's own are eng.train, eng.testa
    head = list(islice(_lines(source, ReadStats(), INPUT if file == "-" else file), HEAD))
    return guess_form(head, wanted)


def guess_form(head: Sequence[str], wanted: InputSchema) -> tuple[str, str]:
    """The form that the first lines of a text have, and a remark where that can be doubted.

    >>> wanted = InputSchema("review", lambda line: {"review": line}, lambda record: [record["review"]])
    >>> [guess_form(lines, wanted)[0] for lines in (["id,review"], ["a fine review, and long"], ['{"review": "a"}'], ["{a} film"])]
    ['csv', 'lines', 'jsonl', 'lines']
    """
    some = [line for line in head if line.strip()]
    first = some[0].strip() if some else ""
    if re.match(r"\[\s*(\{|$)", first) or (first.startswith("{") and wanted.passages and _one(first)):
        return "squad", ""
    if first.startswith("{"):
        if _object(first) is not None or re.match(r'\{\s*"', first):
            return "jsonl", ""
        return (
            "lines",
            "its first line begins with { and is no JSON: it is read as lines of text (--input says otherwise)",
        )
    if wanted.tags:
        width, tagged = _columns(some, wanted.tags)
        if width > 1 and tagged:
            return "conll", ""
        if width > 1 and len(some) > 1:
            return "lines", (
                "this may be a word a line with its columns, and other tags: it is read as a sentence a line (--input lines "
                "or --input conll says which)"
            )
        return "lines", ""
    cells = {sign: [cell.strip('" \r\ufeff') for cell in first.split(sign)] for sign in "\t,;"}
    for sign, names in cells.items():
        if len(names) > 1 and wanted.field in names:
            return ("tsv" if sign == "\t" else "csv"), ""
    for sign in cells:
        widths = {len(row) for row in csv.reader(some, delimiter=sign)} if len(some) > 1 else {1}
        if len(widths) == 1 and widths != {1}:
            kind = "tsv" if sign == "\t" else "csv"
            return "lines", (
                f"this may be a table, without a column {wanted.field!r}: it is read as lines of text, the first line too "
                f"(--input lines or --input {kind} says which)"
            )
    return "lines", ""


def _object(line: str) -> Record | None:
    """A line that is a JSON object."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _one(first: str) -> bool:
    """Whether a line begins one JSON document, as SQuAD's, and is not a record of many."""
    found = _object(first)
    return found is None or isinstance(found.get("data"), list)


def _columns(some: Sequence[str], tags: Sequence[str]) -> tuple[int, bool]:
    """How many cells all lines have (0: not as many), and whether the last of them is a tag in at least half.

    >>> _columns(["Paris NNP I-NP B-LOC", "sleeps VBZ I-VP O"], ["B-LOC", "O"]), _columns(["a grim film"], ["O"])
    ((4, True), (3, False))
    """
    rows = [line.split("\t") if "\t" in line else line.split() for line in some]
    rows = [row for row in rows if row[0] != "-DOCSTART-"]
    kinds = {tag.partition("-")[2] or tag for tag in tags} | {*tags, "O"}
    tagged = sum(row[-1] in kinds or row[-1].partition("-")[2] in kinds for row in rows)
    widths = {len(row) for row in rows}
    return (widths.pop() if len(widths) == 1 else 0), 2 * tagged >= len(rows) > 0
