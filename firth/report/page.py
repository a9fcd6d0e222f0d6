"""Self-contained report.html from plain data.

A report has a title, key numbers, sections of prose, figures, tables and samples, and commands to run next. `render`
turns it into one page that loads nothing: no script, font or picture (its content security policy forbids them, so text
from a corpus cannot inject one).

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
from firth.report.charts import COLORS, Figure, Matrix, number, svg, svg_matrix
from firth.report.parallel import ParallelCoordinates, svg_parallel

Cell = str | int | float | None


@dataclass(frozen=True)
class StatCell:
    """Key number at the top of the page.

    Args:
        label: What it measures.
        value: The number.
        note: Data it was measured on, or a baseline.
    """

    label: str
    value: Cell
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Table. A column whose cells are all numbers (or None) is right-aligned with equal decimals.

    Args:
        title: Title above it.
        head: Column names.
        rows: Cells of each row.
        note: Text below it.
        best: Column name -> "max" or "min"; the best cells of that column are bold.
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
    """Prompt and completions.

    Args:
        prompt: The prompt.
        answers: Label -> completion, in the order shown, such as {"before training": ..., "after": ...}.
        note: Text below it.
    """

    prompt: str
    answers: Mapping[str, str]
    note: str = ""


@dataclass(frozen=True)
class Command:
    """Command to run next.

    Args:
        what: What it does, in a few words.
        line: The exact command, one or more lines.
    """

    what: str
    line: str


@dataclass(frozen=True)
class Section:
    """Section of a report; its contents are shown in the order of the arguments.

    Args:
        title: Heading.
        text: Prose; blank lines separate paragraphs, `backticks` mark code.
        figures: Charts.
        parallels: Parallel coordinates.
        matrices: Confusion matrices.
        tables: Tables.
        samples: Prompts and completions.
        listing: Preformatted text.
    """

    title: str
    text: str = ""
    figures: Sequence[Figure] = ()
    parallels: Sequence[ParallelCoordinates] = ()
    matrices: Sequence[Matrix] = ()
    tables: Sequence[Table] = ()
    samples: Sequence[TextSample] = ()
    listing: str = ""


@dataclass(frozen=True)
class Report:
    """Report page.

    Args:
        title: Title of the page.
        sections: The sections.
        text: Summary, in a few sentences.
        numbers: Key numbers.
        commands: Commands to run next.
        facts: Versions, durations and the like, at the bottom.
    """

    title: str
    sections: Sequence[Section] = ()
    text: str = ""
    numbers: Sequence[StatCell] = ()
    commands: Sequence[Command] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def render(report: Report) -> str:
    """Render a report as HTML. All text is escaped; only the SVG of figures is not."""
    template = _ENVIRONMENT.get_template("template.html.j2")
    return template.render(report=report, anchors=_anchors(report.sections), num_colors=COLORS)


def write(report: Report, path: Path) -> Path:
    """Write a report to `path` atomically; return the path."""
    write_text(path, render(report))
    return path


def prose(text: str) -> Markup:
    """Return HTML with paragraphs and `code`; everything else is escaped.

    >>> str(prose("Type `make`.\\n\\n1 < 2"))
    '<p>Type <code>make</code>.</p>\\n<p>1 &lt; 2</p>'
    """
    paragraphs = [p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()]
    coded = (re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(p))) for p in paragraphs)
    return Markup("\n".join(f"<p>{p}</p>" for p in coded))


def figure_value(value: Cell) -> str:
    """Format a key number or word."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else number(value)


@dataclass(frozen=True)
class FormattedCell:
    """Formatted cell."""

    text: str
    numeric: bool
    best: bool


def cells(table: Table) -> list[list[FormattedCell]]:
    """Format the rows of a table column by column: equal decimals, minus signs, thousands separators, best cells.

    >>> [[c.text for c in row] for row in cells(Table("t", ["model", "loss"], [["a", 12.5], ["b", 3.14159]]))]
    [['a', '12.50'], ['b', '3.14']]
    """
    columns = [_column([row[k] for row in table.rows], table.best.get(name)) for k, name in enumerate(table.head)]
    return [list(row) for row in zip(*columns, strict=True)]


def _column(values: Sequence[Cell], best: str | None) -> list[FormattedCell]:
    known = [v for v in values if isinstance(v, int | float)]
    if len(known) + sum(v is None for v in values) < len(values):
        return [FormattedCell(figure_value(v), False, False) for v in values]
    top = (max if best == "max" else min)(known) if best and known else None
    return [FormattedCell(_aligned(v, known), True, v is not None and v == top) for v in values]


def _aligned(value: Cell, column: Sequence[float]) -> str:
    """Format a number with the decimals of its column: three digits of its smallest number, at most four of its largest."""
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
    """Return a distinct id for every section."""
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
_ENVIRONMENT.filters |= {
    "prose": prose,
    "value": figure_value,
    "svg": svg,
    "matrix": svg_matrix,
    "parallel": svg_parallel,
    "cells": cells,
}
