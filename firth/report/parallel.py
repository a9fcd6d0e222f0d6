"""Parallel coordinates in SVG: one vertical axis for each quantity, one line for each row.

>>> axes = (ParallelAxis("lr", (0.001, 0.01), log=True), ParallelAxis("size", ("8", "16")), ParallelAxis("loss", (2.0, 1.5)))
>>> picture = svg_parallel(ParallelCoordinates("Trials", axes, ("best", "finished"), ("a", "b")))
>>> picture.count("<polyline"), "<title>a: lr 0.001, size 8, loss 2</title>" in picture
(2, True)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from firth.report.charts import number

STYLES = {"finished": "whisker c5", "pruned": "whisker c1 dashed", "best": "curve c0"}
"""Kind of a row -> style of its line, in the order that they are drawn."""
MAX_CHOICES = 8
"""Most choices of an axis with a label each."""
_DIGIT_PX = 6.5


@dataclass(frozen=True)
class ParallelAxis:
    """An axis.

    Args:
        label: Its name.
        values: A number or a choice for each row; None where the row ends.
        log: Whether the axis is logarithmic.
    """

    label: str
    values: Sequence[float | str | None]
    log: bool = False

    @property
    def choices(self) -> list[str]:
        """The choices in their order, numbers by size; none for an axis of numbers."""
        found = list(dict.fromkeys(value for value in self.values if isinstance(value, str)))
        return sorted(found, key=_size)

    def place(self, value: float | str) -> float:
        """Return the place of a value, from 0 at the bottom to 1 at the top."""
        if isinstance(value, str):
            return self.choices.index(value) / (len(self.choices) - 1) if len(self.choices) > 1 else 0.5
        numbers = [self._scaled(one) for one in self.values if isinstance(one, int | float)]
        low, high = min(numbers), max(numbers)
        return (self._scaled(value) - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """Return the place and the text of each label."""
        if self.choices:
            return [(self.place(one), one) for one in self.choices][:MAX_CHOICES]
        numbers = sorted({one for one in self.values if isinstance(one, int | float)})
        return (
            [(self.place(one), number(one, 3)) for one in dict.fromkeys((numbers[0], numbers[-1]))] if numbers else []
        )

    def _scaled(self, value: float) -> float:
        return math.log(value) if self.log else float(value)


def _size(text: str) -> tuple[int, float, str]:
    try:
        return 0, float(text), text
    except ValueError:
        return 1, 0.0, text


@dataclass(frozen=True)
class ParallelCoordinates:
    """Parallel coordinates.

    Args:
        title: Title above the picture.
        axes: The axes, from left to right.
        kinds: Kind of each row: best, finished or pruned.
        names: Name of each row, shown under the pointer.
        note: Text below.
    """

    title: str
    axes: Sequence[ParallelAxis]
    kinds: Sequence[str]
    names: Sequence[str]
    note: str = ""


def svg_parallel(chart: ParallelCoordinates, width: int = 704, height: int = 320, style: str = "wide") -> Markup:
    """Draw parallel coordinates; colors come from the page's style sheet.

    Args:
        chart: The chart.
        width: Width in CSS pixels.
        height: Height in CSS pixels.
        style: Class of the picture. The page draws each "wide" and "narrow" and shows the one that fits.
    """
    count = len(chart.axes)
    rows = 1 + (count > 2 and max(len(axis.label) for axis in chart.axes) * _DIGIT_PX > width / count)
    top, bottom = 18 + 15 * rows, height - 10
    right = max((len(text) for _, text in chart.axes[-1].ticks()), default=1) * _DIGIT_PX + 12
    step = (width - right - 8) / max(1, count - 1)
    out = [
        f'<svg class="plot {style}" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{escape(chart.title)}">'
    ]

    def y(place: float) -> float:
        return bottom - place * (bottom - top)

    for i, axis in enumerate(chart.axes):
        x = 8 + i * step
        out.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{bottom}"/>')
        anchor = "start" if i == 0 else "end" if i == count - 1 else "middle"
        edge = 0 if i == 0 else width if i == count - 1 else x
        out.append(
            f'<text class="name" x="{edge:.1f}" y="{13 + 15 * (i % rows)}" text-anchor="{anchor}">{escape(axis.label)}</text>'
        )
    for kind, line_style in STYLES.items():
        for row, name in enumerate(chart.names):
            if chart.kinds[row] != kind:
                continue
            known = [(i, axis, axis.values[row]) for i, axis in enumerate(chart.axes)]
            points = [f"{8 + i * step:.1f},{y(axis.place(value)):.1f}" for i, axis, value in known if value is not None]
            text = ", ".join(
                f"{axis.label} {value if isinstance(value, str) else number(value)}"
                for _, axis, value in known
                if value is not None
            )
            title = f"<title>{escape(f'{name}: {text}')}</title>"
            out.append(f'<polyline class="{line_style}" points="{" ".join(points)}">{title}</polyline>')
    for i, axis in enumerate(chart.axes):  # over the lines
        x = 8 + i * step
        for place, text in axis.ticks():
            out.append(f'<circle class="dot c5" cx="{x:.1f}" cy="{y(place):.1f}" r="2"/>')
            shift = 12 if place > 0.9 else -3 if place < 0.1 else 4
            out.append(f'<text class="tick halo" x="{x + 6:.1f}" y="{y(place) + shift:.1f}">{escape(text)}</text>')
    return Markup("".join(out) + "</svg>")
