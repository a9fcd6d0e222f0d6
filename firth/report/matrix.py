"""Confusion matrix as inline SVG: gold classes by row, predictions by column.

A cell is darker the larger its share of its row. The page's style sheet colors it, like the charts.

>>> picture = svg_matrix(Matrix("Confusion matrix", ("ham", "spam"), ((90, 10), (5, 45))))
>>> picture.count("<rect"), "<title>ham, predicted as spam: 10 of 100</title>" in picture
(4, True)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

CELL, LETTER, GAP = 46, 8.5, 6  # pixels


@dataclass(frozen=True)
class Matrix:
    """Confusion matrix.

    Args:
        title: Title above it.
        classes: Names of the classes.
        counts: How often each class (row) was predicted as each class (column).
        note: Text below it.
    """

    title: str
    classes: Sequence[str]
    counts: Sequence[Sequence[int]]
    note: str = ""

    def __post_init__(self) -> None:
        if len(self.counts) != len(self.classes) or any(len(row) != len(self.classes) for row in self.counts):
            raise ValueError(f"matrix {self.title!r}: {len(self.classes)} classes need as many rows and columns")


def svg_matrix(matrix: Matrix) -> Markup:
    """Draw a confusion matrix, as wide as its class names need."""
    names = [name if len(name) <= 14 else name[:13] + "…" for name in matrix.classes]
    left = max(len(name) for name in names) * LETTER + GAP
    wide = max(CELL, max(len(name) for name in names) * LETTER + GAP)
    width, height = left + wide * len(names), 20 + CELL * len(names)
    out = [
        f'<svg class="matrix" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}" role="img" '
        f'aria-label="{escape(matrix.title)}">'
    ]
    for column, name in enumerate(names):
        x = left + wide * (column + 0.5)
        out.append(f'<text class="quiet" x="{x:.0f}" y="13" text-anchor="middle">{escape(name)}</text>')
    for row, (name, counts) in enumerate(zip(names, matrix.counts, strict=True)):
        y, total = 20 + CELL * row, sum(counts)
        middle = y + CELL / 2 + 4
        out.append(f'<text x="{left - GAP:.0f}" y="{middle:.0f}" text-anchor="end">{escape(name)}</text>')
        for column, count in enumerate(counts):
            x = left + wide * column
            tooltip = f"{matrix.classes[row]}, predicted as {matrix.classes[column]}: {count} of {total}"
            share = count / total if total else 0.0
            out.append(
                f'<rect class="cell" x="{x:.0f}" y="{y}" width="{wide - 2:.0f}" height="{CELL - 2}" '
                f'fill-opacity="{0.06 + 0.5 * share:.2f}"><title>{escape(tooltip)}</title></rect>'
                f'<text x="{x + wide / 2:.0f}" y="{middle:.0f}" text-anchor="middle">{count}</text>'
            )
    return Markup("".join(out) + "</svg>")
