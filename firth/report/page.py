"""One self-contained report.html: what a new user sees first.

A report is plain data: a title, the numbers that matter, sections of prose, figures, tables and samples, and the
commands to type next. `render` turns it into one page that loads nothing: no script, no font, no picture from
elsewhere (its own content policy forbids all of them, so text from a corpus cannot smuggle one in).

>>> report = Report("A run", numbers=(StatCell("bits per byte", 2.31, "held-out plays"),),
...                 sections=(Section("Samples", samples=(TextSample("ROMEO:", {"after": "<b>Good morrow.</b>"}),)),))
>>> "&lt;b&gt;Good morrow.&lt;/b&gt;" in render(report)
True
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from firth.io.atomic import write_text
from firth.report.charts import COLORS, Figure, number, svg
from firth.report.matrix import Matrix, svg_matrix

Cell = str | int | float | None


@dataclass(frozen=True)
class StatCell:
    """A number that matters, for the head of the page. note: on what, against what."""

    label: str
    value: Cell
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows under a head. A column is set right with aligned decimals if all its cells are numbers (or None).

    best: column name -> "max" or "min": that column's best cells are set in bold.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    note: str = ""
    best: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.head):
                raise ValueError(f"table {self.title!r}: a row of {len(row)} cells under {len(self.head)} columns")
        unknown = [name for name in self.best if name not in self.head]
        if unknown:
            raise ValueError(f"table {self.title!r} has no column {unknown[0]!r} to mark the best of")


@dataclass(frozen=True)
class TextSample:
    """A prompt and what one or more models made of it: {"before training": ..., "after": ...}, in that order."""

    prompt: str
    answers: Mapping[str, str]
    note: str = ""


@dataclass(frozen=True)
class Command:
    """Something to type next. what: the reason, in a few words; line: the exact command, one or more lines."""

    what: str
    line: str


@dataclass(frozen=True)
class Section:
    """Prose (blank lines part paragraphs, `backticks` set code), then figures, tables of confusions, tables, samples and a listing."""

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    matrices: Sequence[Matrix] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[TextSample] = ()
    listing: str = ""


@dataclass(frozen=True)
class Report:
    """The whole page. text: what happened, in a few sentences. facts: what it ran on, with what, for how long."""

    title: str
    sections: Sequence[Section] = ()
    text: str = ""
    numbers: Sequence[StatCell] = ()
    commands: Sequence[Command] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def render(report: Report) -> str:
    """The page as HTML. Every word of the report is escaped; only the figures' own SVG is not."""
    template = _ENVIRONMENT.get_template("template.html.j2")
    return template.render(report=report, anchors=_anchors(report.sections), colours=COLORS)


def write(report: Report, path: Path) -> Path:
    """Render to `path`, replacing it whole: a reader never finds half a page."""
    write_text(path, render(report))
    return path


def prose(text: str) -> Markup:
    """Paragraphs and `code`, everything else escaped.

    >>> str(prose("Type `make`.\\n\\n1 < 2"))
    '<p>Type <code>make</code>.</p>\\n<p>1 &lt; 2</p>'
    """
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
    coded = (re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(p))) for p in paragraphs)
    return Markup("\n".join(f"<p>{p}</p>" for p in coded))


def figure_value(value: Cell) -> str:
    """One number (or word) for the head of the page."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else number(value)


@dataclass(frozen=True)
class Column:
    """A cell ready to print."""

    text: str
    numeric: bool
    best: bool


def cells(table: Table) -> list[list[Column]]:
    """The rows of a table, formatted column by column: equal decimals, minus signs, thousands, the best marked.

    >>> [[c.text for c in row] for row in cells(Table("t", ["model", "loss"], [["a", 12.5], ["b", 3.14159]]))]
    [['a', '12.50'], ['b', '3.14']]
    """
    columns = [_column([row[k] for row in table.rows], table.best.get(name)) for k, name in enumerate(table.head)]
    return [list(row) for row in zip(*columns, strict=True)]


def _column(values: Sequence[Cell], best: str | None) -> list[Column]:
    known = [v for v in values if isinstance(v, int | float)]
    if len(known) + sum(v is None for v in values) < len(values):
        return [Column(figure_value(v), False, False) for v in values]
    top = (max if best == "max" else min)(known) if best and known else None
    return [Column(_aligned(v, known), True, v is not None and v == top) for v in values]


def _aligned(value: Cell, column: Sequence[float]) -> str:
    """A number with the decimals of its column: three figures of its smallest, at most four of its largest."""
    if value is None or isinstance(value, str):
        return "–"
    if not math.isfinite(value):
        return number(value)
    sizes = [abs(v) for v in column if v and math.isfinite(v)]
    whole = all(isinstance(v, int) for v in column) or not sizes
    decimals = 0 if whole else max(0, min(2 - _magnitude(min(sizes)), 3 - _magnitude(max(sizes))))
    return f"{value:,.{decimals}f}".replace("-", "−")


def _magnitude(size: float) -> int:
    return math.floor(math.log10(size))


def _anchors(sections: Sequence[Section]) -> list[str]:
    """A distinct id for every section."""
    out: list[str] = []
    for section in sections:
        slug = re.sub(r"[^a-z0-9]+", "-", section.title.lower()).strip("-") or "section"
        out.append(slug if slug not in out else f"{slug}-{len(out)}")
    return out


_ENVIRONMENT = Environment(
    loader=PackageLoader("firth.report", "."),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {"prose": prose, "value": figure_value, "svg": svg, "matrix": svg_matrix, "cells": cells}
