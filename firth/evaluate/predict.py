"""Predict: what a finetuned run says of records without answers, one row for each record, in their order.

    firth predict runs/classify reviews.csv                        {"label": "good", "probability": 0.97, ...} a line
    echo "a fine film" | firth predict runs/classify -             one text a line
    firth predict runs/answer questions.json --out answers.csv

Records are read as in training (JSONL, CSV, TSV, Parquet; CoNLL's columns; SQuAD's JSON), with the fields of the run's recipe;
plain text has one text a line, for a tagger its words parted by blanks. What was read and cut is told on the side.
"""

from __future__ import annotations

import csv
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

from firth.evaluate.task import Progress, Subject, open_subject
from firth.evaluate.tasks import DEFAULTS, TASKS
from firth.types import UserError


def predict(directory: Path, file: str, given: TextIO, progress: Progress = lambda _: None) -> Iterator[dict[str, Any]]:
    """The rows. file: a file of records, of text by lines, or - for what `given` holds.

    Raises UserError where the model has no head of a task, and for records that do not fit it.
    """
    subject = open_subject(directory)
    task = next((DEFAULTS[part] for part in DEFAULTS if part in subject.model.parts), "")
    tell = TASKS[task].tell if task in TASKS else None
    if tell is None:
        there = ", ".join(subject.model.parts) or "no part"
        raise UserError(
            f"{directory}: this model has {there} and no task's head: finetune it (firth train classify, regress, choose, "
            "tag or answer)"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = _spooled(file, given, Path(folder), subject, task)
        yield from tell(subject, [path], progress)


def _spooled(file: str, given: TextIO, folder: Path, subject: Subject, task: str) -> str:
    """A file of records: the file itself, or one made of lines of text or of what comes in."""
    if file != "-" and Path(file).suffix not in (".txt", ".text", ""):
        return file
    if file == "-":
        lines = [line.rstrip("\r\n") for line in given]
    else:
        if not Path(file).is_file():
            raise UserError(f"{file}: there is no such file")
        lines = Path(file).read_text("utf-8", "replace").splitlines()
    first = next((line for line in lines if line.strip()), "")
    kind = "jsonl" if first.lstrip().startswith("{") else _table(first, subject.segment.get("text", "text"))
    rows = lines if kind else [json.dumps(_record(line, subject, task)) for line in lines if line.strip()]
    path = folder / f"given.{kind or 'jsonl'}"
    path.write_text("\n".join(rows) + "\n", "utf-8")
    return str(path)


def _table(head: str, field: str) -> str:
    """csv or tsv if a line is the head of a table with the field; empty if not.

    >>> _table("id,review", "review"), _table("a fine review, and long", "review")
    ('csv', '')
    """
    signs = {"\t": "tsv", ",": "csv", ";": "csv"}
    cells = {sign: [cell.strip('" \r') for cell in head.split(sign)] for sign in signs}
    return next((signs[sign] for sign in signs if len(cells[sign]) > 1 and field in cells[sign]), "")


def _record(line: str, subject: Subject, task: str) -> dict[str, Any]:
    """A line of text as the record that the task reads."""
    told = subject.segment
    if task == "tagging":
        return {told.get("words", "tokens"): line.split()}
    if task in ("classification", "regression") and not told.get("pair"):
        return {told.get("text", "text"): line}
    raise UserError(
        "this task reads more than one text of each record, so lines of text are not enough: give JSON lines"
    )


def write(rows: Iterator[dict[str, Any]], out: Path | None, say: Callable[[str], None]) -> int:
    """Write the rows as JSON lines, or as CSV where `out` ends so; to `say` a line at a time where it is None. Returns how
    many there were."""
    count = 0
    if out is None:
        for row in rows:
            say(json.dumps(row, ensure_ascii=False))
            count += 1
        return count
    partial = out.with_name(out.name + ".partial")
    with partial.open("w", encoding="utf-8", newline="") as file:
        writer: Any = None
        for row in rows:
            count += 1
            if out.suffix.lower() != ".csv":
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                continue
            flat = flattened(row)
            if writer is None:
                writer = csv.DictWriter(file, list(flat))
                writer.writeheader()
            writer.writerow(flat)
    partial.replace(out)
    return count


def flattened(row: dict[str, Any]) -> dict[str, Any]:
    """A row with a column for each class; lists as text.

    >>> flattened({"label": "good", "probabilities": {"bad": 0.1, "good": 0.9}, "tags": ["B", "O"]})
    {'label': 'good', 'probability_bad': 0.1, 'probability_good': 0.9, 'tags': 'B O'}
    """
    out: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            out |= {f"probability_{key}": one for key, one in value.items()}
        else:
            out[name] = (
                " ".join(map(str, value)) if isinstance(value, Sequence) and not isinstance(value, str) else value
            )
    return out
