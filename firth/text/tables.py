"""Files of records that are no JSON lines: CSV and TSV, CoNLL's columns, SQuAD's JSON. `firth.text.read` opens them.

    .csv             a head, quoted cells (RFC 4180); semicolons or tabs where the head has these and no comma
    .tsv             a head, no quoting: a quotation mark is one (IANA; GLUE's files are so)
    .conll .bio .iob a word a line with its columns, a blank line behind a sentence, -DOCSTART- lines left out
    .json            SQuAD 1.1 or 2.0, or a list of records

A table without a head has its columns named by whoever asks for it. A row with more or fewer cells than its head is left
out, counted and named; more than one such row in a hundred is an error, for then the quoting is wrong.

>>> import io
>>> rows = delimited(io.BytesIO(b'text,label\\n"good, really",yes\\nbad\\n' + b"a,b\\n" * 200), Path("a.csv"), Tally(), ())
>>> next(rows)
('a.csv:2', {'text': 'good, really', 'label': 'yes'})
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from firth.text.normalize import whole
from firth.types import UserError

Rows = Iterator[tuple[str, dict[str, Any]]]

LONGEST_CELL = 4 << 20
"""Characters of one cell."""

LOST = 0.01
"""The share of a table's rows that may have another number of cells than the head."""


class Mends(Protocol):
    """What a reader counts."""

    bad_utf8: int
    mismatched: int
    mismatched_at: str


@dataclass
class Tally:
    """The counts of one reader alone."""

    bad_utf8: int = 0
    mismatched: int = 0
    mismatched_at: str = ""


def delimited(file: BinaryIO, path: Path, counts: Mends, columns: Sequence[str], tabs: bool = False) -> Rows:
    """The rows of a table as records of text. columns: their names, of a table without a head. tabs: a TSV."""
    csv.field_size_limit(LONGEST_CELL)
    lines = _decoded(file, path, counts)
    head = next(lines, "")
    sign = "\t" if tabs else _sign(head)
    rows = csv.reader(
        _again(head, lines), delimiter=sign, strict=not tabs, quoting=csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    )
    names, total, lost = list(columns), 0, 0
    while True:
        place = f"{path}:{rows.line_num + 1}"
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise UserError(f"{place}: this row cannot be read: {error}; mend its quotation marks") from None
        if row is None:
            break
        if not row or row == [""]:
            continue
        if not names:
            names = row
            twice = [name for name in names if names.count(name) > 1]
            if twice:
                raise UserError(f"{place}: two columns are called {twice[0]!r}: name them apart")
            continue
        total += 1
        if len(row) == len(names):
            yield place, dict(zip(names, row, strict=True))
            continue
        lost += 1
        counts.mismatched += 1
        counts.mismatched_at = counts.mismatched_at or f"{place} ({len(row)} cells under {len(names)} columns)"
    if lost > LOST * total:
        raise UserError(
            f"{counts.mismatched_at}: so in {lost} of {total} rows: quote the cells that hold a separator or a line break"
        )


def _sign(head: str) -> str:
    """What parts the cells of a CSV: as its head has it."""
    return max(",;\t", key=lambda sign: (sign in head, -",;\t".index(sign))) if "," not in head else ","


def _again(first: str, rest: Iterator[str]) -> Iterator[str]:
    if first:
        yield first
    yield from rest


def _decoded(file: BinaryIO, path: Path, counts: Mends) -> Iterator[str]:
    """The lines as text, with their ends; what is not UTF-8 is read as U+FFFD and counted, NUL is removed."""
    for number, raw in enumerate(file):
        if not number:
            if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                raise UserError(f"{path}: this is UTF-16 and UTF-8 is read; convert it: iconv -f UTF-16 -t UTF-8")
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            line = raw.decode("utf-8", "replace")
            counts.bad_utf8 += 1
        yield line.replace("\0", "")


def tabbed(file: BinaryIO, path: Path, counts: Mends, columns: Sequence[str]) -> Rows:
    """The rows of a TSV."""
    return delimited(file, path, counts, columns, tabs=True)


def sentences(file: BinaryIO, path: Path, counts: Mends, columns: Sequence[str]) -> Rows:
    """CoNLL's columns: a record is a sentence, {"tokens": its first column, "tags": its last}, or all by their names.

    >>> import io
    >>> text = b"-DOCSTART- -X- O\\n\\nEU NNP B-ORG\\nrejects VBZ O\\n"
    >>> next(sentences(io.BytesIO(text), Path("a.conll"), Tally(), ()))
    ('a.conll:3', {'tokens': ['EU', 'rejects'], 'tags': ['B-ORG', 'O']})
    """
    first, rows, width, total, lost = 1, list[list[str]](), len(columns), 0, 0
    for number, line in enumerate(_again_blank(_decoded(file, path, counts)), 1):
        cells = line.rstrip("\r\n").split("\t") if "\t" in line else line.split()
        if cells and cells[0] and cells[0] != "-DOCSTART-":
            first = first if rows else number
            rows.append(cells)
            continue
        if not rows:
            continue
        width, total = width or len(rows[0]), total + 1
        wrong = [i for i, row in enumerate(rows) if len(row) != width or width < 2]
        if wrong:
            lost += 1
            counts.mismatched += 1
            told = f"{path}:{first + wrong[0]} ({len(rows[wrong[0]])} columns of {max(width, 2)})"
            counts.mismatched_at = counts.mismatched_at or told
        elif columns:
            yield f"{path}:{first}", {name: [row[i] for row in rows] for i, name in enumerate(columns)}
        else:
            yield f"{path}:{first}", {"tokens": [row[0] for row in rows], "tags": [row[-1] for row in rows]}
        rows = []
    if lost > LOST * total:
        raise UserError(f"{counts.mismatched_at}: so in {lost} of {total} sentences: give every word all columns")


def _again_blank(lines: Iterator[str]) -> Iterator[str]:
    """The lines and a blank one, which ends the last sentence."""
    yield from lines
    yield ""


def lines(file: BinaryIO, path: Path, counts: Mends, columns: Sequence[str]) -> Rows:
    """Plain text with a record a line, {"text": the line}; blank lines are passed over."""
    for number, line in enumerate(_decoded(file, path, counts), 1):
        if text := line.strip():
            yield f"{path}:{number}", {"text": text}


def document(file: BinaryIO, path: Path, counts: Mends, columns: Sequence[str]) -> Rows:
    """A JSON file: SQuAD's articles as {"context", "question", "answers": [{"text", "start"}], "id"}, or a list of records.

    A question of SQuAD 2.0 that has no answer has no `answers`.
    """
    try:
        found = json.loads(file.read().decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: this is not JSON: {error}; JSON lines are called .jsonl") from None
    if type(found) is list and all(type(record) is dict for record in found):
        for number, record in enumerate(found, 1):
            yield f"{path}: record {number}", record
        return
    try:
        articles = [(p["context"], q) for article in found["data"] for p in article["paragraphs"] for q in p["qas"]]
        for context, asked in articles:
            impossible = asked.get("is_impossible", False)
            answers = [{"text": a["text"], "start": a["answer_start"]} for a in asked["answers"] if not impossible]
            record = {
                "context": whole(context),
                "question": asked["question"],
                "answers": answers,
                "id": str(asked["id"]),
            }
            yield f"{path}: question {asked['id']}", record
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: this is neither SQuAD's JSON nor a list of records ({error}): use .jsonl") from None


Reader = Callable[[BinaryIO, Path, Mends, Sequence[str]], Rows]

READERS: dict[str, Reader] = {
    ".csv": delimited, ".tsv": tabbed, ".conll": sentences, ".bio": sentences, ".iob": sentences, ".json": document,
}  # fmt: skip
"""The ends of names -> who reads such a file."""
