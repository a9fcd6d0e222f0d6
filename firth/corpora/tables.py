"""Read records from CSV and TSV, CoNLL columns and SQuAD's JSON. `firth.corpora.readers` opens the files.

    .csv             a header, quoted cells (RFC 4180); semicolons or tabs if the header has these and no comma
    .tsv             a header, no quoting: a quotation mark is a character (IANA; GLUE's files)
    .conll .bio .iob a word per line with its columns, a blank line after a sentence, -DOCSTART- lines skipped
    .json            SQuAD 1.1 or 2.0, a list of records, or a record per line (JSON lines)

The columns of a table without a header are named by the reader's `columns`. Columns without a name are called as pandas calls them
(`Unnamed: 2`), and counted; a row may lack their cells. A row with more or fewer cells than the header is skipped, counted and named;
more than one such row, and more than one in a hundred, is an error, since the quoting is wrong then.

>>> import io
>>> rows = delimited(io.BytesIO(b'text,label\\n"good, really",yes\\nbad\\n' + b"a,b\\n" * 200), Path("a.csv"), ReadStats(), ())
>>> next(rows)
('a.csv:2', {'text': 'good, really', 'label': 'yes'})
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from firth.corpora.input_files import ReadStats
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.types import UserError

Rows = Iterator[tuple[str, dict[str, Any]]]

MAX_CELL_CHARACTERS = 4 << 20
"""Maximum characters of a cell."""

MAX_MISMATCHED_SHARE = 0.01
"""Maximum share of rows whose number of cells differs from the header; one such row is always allowed."""

UNNAMED_PREFIX = "Unnamed: "
"""Name of a column without a name, before its index from 0."""


def delimited(file: BinaryIO, path: Path, counts: ReadStats, columns: Sequence[str], tabs: bool = False) -> Rows:
    """Yield the rows of a table as records of text.

    Args:
        file: The open file.
        path: Its path, for messages.
        counts: Collects what was read, repaired and skipped.
        columns: Names of the columns, for tables without a header.
        tabs: Whether it is a TSV.

    Raises:
        UserError: A row cannot be parsed, two columns have one name, or too many rows do not match the header.
    """
    csv.field_size_limit(MAX_CELL_CHARACTERS)
    lines = _decoded(file, path, counts)
    header = next(lines, "")
    sign = "\t" if tabs else _delimiter(header)
    rows = csv.reader(
        _chain(header, lines), delimiter=sign, strict=not tabs, quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    )
    names, total, lost = list(columns), 0, 0
    while True:
        place = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            if "new-line character" in str(error):  # csv's own message is about how a program opens files
                raise UserError(
                    f"{place}: a line ends in a carriage return alone, as on old Macs: convert it: tr '\\r' '\\n' < {path.name}"
                ) from None
            raise UserError(f"{place}: this row cannot be read: {error}; fix its quotation marks") from None
        if row is None:
            break
        if not row or row == [""]:
            continue
        row_names = [name.strip() for name in row]
        if not names or (not total and len(row) != len(names) and {*row_names} & {*names}):
            # A table with given columns may have a header all the same (CoLA's test.tsv); spreadsheets pad it with empty cells.
            names = [name or f"{UNNAMED_PREFIX}{i}" for i, name in enumerate(row_names)]
            counts.note("unnamed_columns", place, row_names.count(""))
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise UserError(f"{place}: two columns are called {twice[0]!r}: give them different names")
            continue
        total += 1
        if len(row) < len(names) and all(name.startswith(UNNAMED_PREFIX) for name in names[len(row) :]):
            row += [""] * (len(names) - len(row))
        if len(row) == len(names):
            yield place, dict(zip(names, row, strict=True))
            continue
        lost += 1
        counts.note("mismatched", f"{place} ({len(row)} cells under {len(names)} columns)")
    if lost > MAX_MISMATCHED_SHARE * total and (lost > 1 or total == 1):
        cure = (
            "a cell of a TSV holds no tab and no line break" if tabs else "quote what holds a separator or a line break"
        )
        raise UserError(
            f"{counts.at['mismatched']}: so in {lost} of {total} rows: give each row as many cells as the header has names; {cure}"
        )


def _delimiter(header: str) -> str:
    """Return the delimiter of a CSV, from its header."""
    return max(",;\t", key=lambda sign: (sign in header, -",;\t".index(sign))) if "," not in header else ","


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _decoded(file: BinaryIO, path: Path, counts: ReadStats) -> Iterator[str]:
    """Yield the lines as text, with their ends; invalid UTF-8 becomes U+FFFD and is counted, NUL is removed."""
    for number, raw in enumerate(file):
        if not number:
            if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{path}: this is UTF-16 and UTF-8 is read; convert it: iconv -f UTF-16 -t UTF-8")
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            line = raw.decode("utf-8", "replace")
            counts.note("bad_utf8", f"{path}:{number + 1}")
        counts.note("nul", f"{path}:{number + 1}", line.count("\0"))
        yield line.replace("\0", "")


def tabbed(file: BinaryIO, path: Path, counts: ReadStats, columns: Sequence[str]) -> Rows:
    """Yield the rows of a TSV."""
    return delimited(file, path, counts, columns, tabs=True)


def sentences(file: BinaryIO, path: Path, counts: ReadStats, columns: Sequence[str]) -> Rows:
    """Yield the sentences of CoNLL columns: {"tokens": first column, "tags": last column}, or all columns by name.

    >>> import io
    >>> text = b"-DOCSTART- -X- O\\n\\nEU NNP B-ORG\\nrejects VBZ O\\n"
    >>> next(sentences(io.BytesIO(text), Path("a.conll"), ReadStats(), ()))
    ('a.conll:3', {'tokens': ['EU', 'rejects'], 'tags': ['B-ORG', 'O']})
    """
    first, rows, width, total, lost = 1, list[list[str]](), len(columns), 0, 0
    for number, line in enumerate(_add_blank_line(_decoded(file, path, counts)), 1):
        # Only blanks and tabs separate cells: a word may contain a no-break space, and a cell may be empty.
        row_text = line.rstrip("\r\n")
        cells = row_text.split("\t") if "\t" in row_text else re.split(" +", row_text.strip(" "))
        if row_text.strip(" \t") and cells[0] != "-DOCSTART-":
            first = first if rows else number
            rows.append(cells)
            continue
        if not rows:
            continue
        width, total = width or len(rows[0]), total + 1
        wrong = [i for i, row in enumerate(rows) if len(row) != width or width < 2 or not row[0]]
        if wrong:
            lost += 1
            row = rows[wrong[0]]
            fault = f"{len(row)} columns of {max(width, 2)}" if row[0] else "no word before its columns"
            counts.note("mismatched", f"{path}:{first + wrong[0]} ({fault})")
        elif columns:
            yield f"{path}:{first}", {name: [row[i] for row in rows] for i, name in enumerate(columns)}
        else:
            yield f"{path}:{first}", {"tokens": [row[0] for row in rows], "tags": [row[-1] for row in rows]}
        rows = []
    if lost > MAX_MISMATCHED_SHARE * total and (lost > 1 or total == 1):
        raise UserError(f"{counts.at['mismatched']}: so in {lost} of {total} sentences: give every word all columns")


def _add_blank_line(lines: Iterator[str]) -> Iterator[str]:
    """Yield the lines and a blank one, which ends the last sentence."""
    yield from lines
    yield ""


def lines(file: BinaryIO, path: Path, counts: ReadStats, columns: Sequence[str]) -> Rows:
    """Yield each line of plain text as {"text": line}; blank lines are skipped."""
    for number, line in enumerate(_decoded(file, path, counts), 1):
        if text := line.strip():
            yield f"{path}:{number}", {"text": text}


def document(file: BinaryIO, path: Path, counts: ReadStats, columns: Sequence[str]) -> Rows:
    """Yield the records of a JSON file: SQuAD's as {"context", "question", "answers": [{"text", "start"}], "id"}, or a list of records.

    `answers` is [] for an unanswerable question of SQuAD 2.0, and None for a question of SQuAD 1.1 whose answers are missing.
    """
    raw = file.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        text = raw.decode("utf-8-sig", "replace")
        line = raw.count(b"\n", 0, error.start) + 1
        counts.note("bad_utf8", f"{path}:{line}")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: this is not JSON: {error}; JSON lines are called .jsonl") from None
    if type(found) is list and all(type(record) is dict for record in found):
        for number, record in enumerate(found, 1):
            yield f"{path}: record {number}", record
        return
    if type(found) is not dict or type(found.get("data")) is not list:
        raise UserError(
            f"{path}: this is neither SQuAD's JSON nor a list of records: there is no list 'data'; use .jsonl"
        )
    for article, one in enumerate(found["data"], 1):
        for paragraph, part in enumerate(_listed(one, "paragraphs", f"{path}: article {article}"), 1):
            where = f"{path}: article {article}, paragraph {paragraph}"
            context = replace_lone_surrogates(_field(part, "context", str, where))
            for number, question in enumerate(_listed(part, "qas", where), 1):
                yield _question(question, context, f"{path}", f"{where}, question {number}")


def _question(entry: Any, context: str, path: str, where: str) -> tuple[str, dict[str, Any]]:
    """Return the place and the record of one of SQuAD's questions; `where` is its place until its id is known."""
    name = _field(entry, "id", (str, int), where)
    place = f"{path}: question {name}"
    question = _field(entry, "question", str, place)
    answers: list[dict[str, Any]] | None = []
    if not entry.get("is_impossible", False):
        given = _listed(entry, "answers", place)
        answers = [
            {"text": _field(a, "text", str, place), "start": _field(a, "answer_start", int, place)} for a in given
        ]
        if not answers and "is_impossible" not in entry:
            answers = None  # SQuAD 1.1 has an answer to every question, so this one is missing
    return place, {"context": context, "question": question, "answers": answers, "id": str(name)}


def _field(holder: Any, name: str, kind: Any, where: str) -> Any:
    """Return a field of SQuAD's JSON.

    Raises:
        UserError: The field is missing or of another type; the message has its place.
    """
    value = holder.get(name) if type(holder) is dict else None
    if not isinstance(value, kind):
        wrong = f"there is no {name!r}" if value is None else f"{name!r} holds {str(value)[:40]!r}"
        raise UserError(f"{where}: {wrong}, so this is not SQuAD's JSON: fix or remove it")
    return value


def _listed(holder: Any, name: str, where: str) -> list[Any]:
    found: list[Any] = _field(holder, name, list, where)
    return found


Reader = Callable[[BinaryIO, Path, ReadStats, Sequence[str]], Rows]

READERS: dict[str, Reader] = {
    ".csv": delimited, ".tsv": tabbed, ".conll": sentences, ".bio": sentences, ".iob": sentences, ".json": document,
}  # fmt: skip
"""File name suffix -> function that reads it."""
