"""Charts in SVG: curves, bars, and matrices.

Line charts as inline SVG, colored by the page's style sheet in light and dark themes.

A plotting library would write fixed colors into the picture. Here every stroke is a class of the style sheet (`c0`..`c5`,
a color-blind-safe palette with a light and a dark set), so one picture of a few kilobytes serves both themes. Curves are
labeled at their ends, not in a legend; the value under the pointer is a plain `<title>`, which needs no script.

>>> figure = Figure("Loss", "step", "nats per token", (Curve("train", (0, 1, 2), (3.0, 2.0, 1.5)),))
>>> picture = svg(figure)
>>> picture.count("<polyline"), "<title>train, step 2: 1.5</title>" in picture
(1, True)

Confusion matrix as inline SVG: gold classes by row, predictions by column.

A cell is darker the larger its share of its row. The page's style sheet colors it, like the charts.

>>> picture = svg_matrix(Matrix("Confusion matrix", ("ham", "spam"), ((90, 10), (5, 45))))
>>> picture.count("<rect"), "<title>ham, predicted as spam: 10 of 100</title>" in picture
(4, True)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from markupsafe import Markup, escape

COLORS = 6
"""Number of colors in the style sheet; a figure with more curves repeats them."""

DISTINCT = 4
"""Number of colors that color-blind readers can distinguish (tests/unit/report/test_page.py); later curves are also dashed."""

_DIGIT_PX = 6.5  # a generous mean width of one digit at the 12 px of the style sheet
_BOLD_PX = 7.3  # the same for a letter of a curve's name
_LINE_PX = 15.0  # between two end labels
_MAX_POINTS = 320  # of a polyline: about two per pixel column
_DODGE_PX = 4.0  # between the points of two curves with intervals at one x
_HOVER_POINTS = 48  # points of a curve with a value under the pointer


@dataclass(frozen=True)
class Curve:
    """One curve.

    Args:
        label: Name, drawn at the end of the curve.
        x: Values of x.
        y: Values of y, as many as x; points that are not finite break the curve.
        smooth: Half-width in points of the moving average drawn over the raw line; 0 draws the raw line only.
        color: Index in the palette; -1 takes the next color.
        dashed: Whether the line is dashed, for baselines.
        points: Whether every point is marked, for a curve of few measurements.
        line: Whether the points are joined.
        intervals: Low and high end in y of an interval around each point (NaN where unknown). Curves with intervals and
            a common x are drawn a few pixels from each other, so that all can be read.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    smooth: int = 0
    color: int = -1
    dashed: bool = False
    points: bool = False
    line: bool = True
    intervals: Sequence[tuple[float, float]] = ()

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"curve {self.label!r} has {len(self.x)} x and {len(self.y)} y")
        if self.intervals and len(self.intervals) != len(self.y):
            raise ValueError(f"curve {self.label!r} has {len(self.y)} y and {len(self.intervals)} intervals")


@dataclass(frozen=True)
class Level:
    """Horizontal reference line, such as chance or a baseline."""

    label: str
    y: float


@dataclass(frozen=True)
class Figure:
    """Curves on one pair of axes.

    Args:
        title: Title above the figure.
        x: Label of the x axis with its unit.
        y: Label of the y axis with its unit.
        curves: The curves.
        note: Text below the figure.
        levels: Horizontal reference lines.
        log_x: Whether x is logarithmic.
        log_y: Whether y is logarithmic.
        zero: Whether the y axis includes 0.
    """

    title: str
    x: str
    y: str
    curves: tuple[Curve, ...]
    note: str = ""
    levels: tuple[Level, ...] = ()
    log_x: bool = False
    log_y: bool = False
    zero: bool = False


def number(value: float, digits: int = 4) -> str:
    """Format a number with `digits` significant figures, with k, M, G, T from 10,000, and with an exponent from 10,000 T.

    >>> [number(v) for v in (0, 3, 2.5, 0.000125, 9999, 12000, 3_250_000, -0.5, 6e23)]
    ['0', '3', '2.5', '0.000125', '9,999', '12k', '3.25M', '−0.5', '6e+23']
    """
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "not a number")
    sign, size = ("−" if value < 0 else ""), float(f"{abs(value):.{digits}g}")
    if size >= 1e16:  # FLOPs of large runs
        return f"{sign}{size:.{digits}g}"
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit and size >= 1e4:
            return f"{sign}{size / unit:.{digits}g}{letter}"
    if size and size < 1e-4:
        mantissa, exponent = f"{size:.{digits - 1}e}".split("e")
        return f"{sign}{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 1000:
        return f"{sign}{size:,.0f}"
    return f"{sign}{size:.10f}".rstrip("0").rstrip(".")


@dataclass(frozen=True)
class _Axis:
    """Scale from values to pixels, with the values of its ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool
    ticks: tuple[float, ...]

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def labels(ticks: Sequence[float]) -> list[str]:
    """Return tick labels with equal decimals.

    >>> labels((0.0, 0.25, 0.5)), labels((0.0, 1e6, 2e6)), labels((0.1, 1.0, 10.0))
    (['0.00', '0.25', '0.50'], ['0', '1M', '2M'], ['0.1', '1', '10'])
    """
    texts = [number(t) for t in ticks]
    steps = {round(b - a, 12) for a, b in itertools.pairwise(ticks)}
    decimals = max((len(t.partition(".")[2]) for t in texts), default=0)
    if len(steps) != 1 or not decimals or any(t[-1].isalpha() or "e" in t for t in texts):
        return texts
    return [f"{t:.{decimals}f}".replace("-", "−") for t in ticks]


def linear_ticks(low: float, high: float, wanted: int) -> tuple[float, ...]:
    """Return about `wanted` round values that enclose [low, high].

    >>> linear_ticks(0.13, 0.92, 5)
    (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    >>> linear_ticks(0.0, 1e-12, 2)
    (0.0, 5e-13, 1e-12)
    """
    if high <= low:
        pad = abs(low) * 0.1 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / max(1, wanted)
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * min((m for m in (1, 2, 2.5, 5, 10) if m * unit >= rough * (1 - 1e-9)), default=10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    digits = 12 - min(0, math.floor(math.log10(step)))  # below the step, so that learning rates of 1e-12 have ticks
    return tuple(round(k * step, digits) for k in range(first, last + 1))


def log_ticks(low: float, high: float) -> tuple[float, ...]:
    """Return the powers of ten in the range; times 1, 2 and 5 if it spans less than two decades.

    >>> log_ticks(0.5, 3000), log_ticks(2, 30)
    ((1.0, 10.0, 100.0, 1000.0), (2.0, 5.0, 10.0, 20.0))
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    digits = (1, 2, 5) if high / low < 100 else (1,)
    return tuple(
        float(d * 10.0**k)
        for k in decades
        for d in digits
        if low <= d * 10.0**k * (1 + 1e-9) and d * 10.0**k <= high * (1 + 1e-9)
    )


def _finite(curve: Curve, figure: Figure) -> np.ndarray:
    """Return the points of a curve (n, 2), NaN where it breaks; values that a log axis cannot show are breaks."""
    points = np.stack([np.asarray(curve.x, np.float64), np.asarray(curve.y, np.float64)], -1).reshape(-1, 2)
    bad = ~np.isfinite(points).all(-1)
    bad |= (figure.log_x & (points[:, 0] <= 0)) | (figure.log_y & (points[:, 1] <= 0))
    return np.where(bad[:, None], np.nan, points)


def average(y: np.ndarray, half: int) -> np.ndarray:
    """Return the moving average over 2*half+1 points; breaks remain.

    The window shrinks symmetrically at the left end, where a loss is steep, and is cut off at the right end.

    >>> average(np.array([0.0, 3.0, 6.0, 3.0]), 1).tolist()
    [0.0, 3.0, 4.0, 4.5]
    """
    known = np.isfinite(y)
    total = np.concatenate(([0.0], np.cumsum(np.where(known, y, 0.0))))
    count = np.concatenate(([0], np.cumsum(known)))
    i = np.arange(len(y))
    reach = np.minimum(half, i)
    low, high = i - reach, np.minimum(len(y), i + reach + 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = (total[high] - total[low]) / (count[high] - count[low])
    return np.where(known, mean, np.nan)


def thin(points: np.ndarray, most: int) -> np.ndarray:
    """Return about `most` of the points, with the lowest and highest of every bin so that no spike is lost."""
    if len(points) <= most:
        return points
    kept = [0, len(points) - 1]
    for indices in np.array_split(np.arange(len(points)), most // 2):
        y = points[indices, 1]
        if np.isfinite(y).any():
            kept += [int(indices[np.nanargmin(y)]), int(indices[np.nanargmax(y)])]
        if not np.isfinite(y).all():
            kept.append(int(indices[np.flatnonzero(~np.isfinite(y))[0]]))
    return points[sorted(set(kept))]


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return positions close to the wanted ones, in their order, at least `gap` from each other and within [low, high].

    >>> spread([10, 12, 50], 10, 0, 55)
    [10, 20, 50]
    >>> spread([50, 52], 10, 0, 55)
    [45, 55]
    """
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [min(max(wanted[i], low), high) for i in order]
    for k in range(1, len(placed)):
        placed[k] = max(placed[k], placed[k - 1] + gap)
    for k in reversed(range(len(placed))):
        placed[k] = min(placed[k], high if k == len(placed) - 1 else placed[k + 1] - gap)
    by_index = dict(zip(order, placed, strict=True))
    return [by_index[i] for i in range(len(wanted))]


@dataclass(frozen=True)
class _Box:
    """Size of the picture and room for the curve names: a right margin, or a key above the axes."""

    width: float
    height: float
    top: float
    right: float
    key: str


def _box(width: float, height: float, names: Sequence[tuple[str, str]]) -> _Box:
    """Return the layout: names at the ends of the curves if that leaves three quarters of the width, else in a key above.

    Args:
        width: Width in pixels.
        height: Height in pixels without the key.
        names: Label and style of each name, in the order drawn.
    """
    widest = max(len(label) for label, _ in names) * _BOLD_PX + 12
    if widest <= 0.27 * width:
        return _Box(width, height, 26, widest, "")
    out, x, y = [], 0.0, 12.0
    for label, style in names:
        long = len(label) * _BOLD_PX + 14
        if x and x + long > width:
            x, y = 0.0, y + _LINE_PX + 1
        out.append(f'<text class="{style}" x="{x:.0f}" y="{y:.0f}">{escape(label)}</text>')
        x += long
    return _Box(width, height + y + 8, y + 34, 8, "".join(out))


def _axes(figure: Figure, lines: Sequence[np.ndarray], box: _Box) -> tuple[_Axis, _Axis]:
    """Return both scales, with room on the left for tick labels and on the right for curve names."""
    known = np.concatenate([line[np.isfinite(line[:, 0])] for line in lines])
    interval_ends = [end for curve in figure.curves for pair in curve.intervals for end in pair if math.isfinite(end)]
    values = np.concatenate([known[:, 1], interval_ends, [level.y for level in figure.levels], [0.0] * figure.zero])
    x_low, x_high = float(known[:, 0].min()), float(known[:, 0].max())
    y_low, y_high = float(values.min()), float(values.max())
    if figure.log_y:
        y_low, y_high = y_low / 1.1, y_high * 1.1
        y_ticks = log_ticks(y_low, y_high)
    else:
        y_ticks = linear_ticks(y_low, y_high, 5 if box.height > 240 else 4)
        y_low, y_high = y_ticks[0], y_ticks[-1]
    left = max((len(t) for t in labels(y_ticks)), default=1) * _DIGIT_PX + 8
    if not figure.log_x and 0 < 0.8 * x_high < x_low:
        x_low = 0.0  # nearly equal x would otherwise be drawn far from each other
    if x_high <= x_low:
        x_low, x_high = (x_low / 2, x_high * 2) if figure.log_x else (x_low - 0.5, x_high + 0.5)
    elif any(curve.intervals for curve in figure.curves) and not figure.log_x:  # room for points moved sideways
        margin = _DODGE_PX * len(lines) / 2 * (x_high - x_low) / (box.width - left - box.right)
        x_low, x_high = x_low - margin, x_high + margin
    wanted = max(3, int((box.width - left - box.right) / 75))
    x_ticks = log_ticks(x_low, x_high) if figure.log_x else linear_ticks(x_low, x_high, wanted)
    shown = tuple(t for t in x_ticks if x_low <= t <= x_high)
    across = _Axis(x_low, x_high, left, box.width - box.right, figure.log_x, shown)
    return across, _Axis(y_low, y_high, box.height - 40, box.top, figure.log_y, y_ticks)


def _whiskers(curve: Curve, color: str, across: _Axis, up: _Axis) -> list[str]:
    """Return a vertical line through each point that has an interval."""
    return [
        f'<polyline class="whisker {color}" points="{across(x):.1f},{up(low):.1f} {across(x):.1f},{up(high):.1f}"/>'
        for x, (low, high) in zip(curve.x, curve.intervals, strict=False)
        if math.isfinite(low)
    ]


def _path(line: np.ndarray, across: _Axis, up: _Axis, style: str) -> str:
    """Return one polyline per unbroken stretch."""
    stretches: list[list[str]] = [[]]
    for x, y in thin(line, _MAX_POINTS):
        if math.isfinite(x):
            stretches[-1].append(f"{across(x):.1f},{up(y):.1f}")
        elif stretches[-1]:
            stretches.append([])
    return "".join(f'<polyline class="{style}" points="{" ".join(s)}"/>' for s in stretches if len(s) > 1)


def svg(figure: Figure, width: int = 704, height: int = 310, style: str = "wide") -> Markup:
    """Draw a figure as an `<svg>`; colors and fonts come from the page's style sheet.

    Args:
        figure: The figure.
        width: Width in CSS pixels.
        height: Height in CSS pixels, without a key.
        style: Class of the picture. The page draws each figure "wide" and "narrow" and shows the one that fits.
    """
    lines = [_finite(curve, figure) for curve in figure.curves]
    if not any(np.isfinite(line).any() for line in lines):
        text = f'<text class="quiet" x="{width / 2}" y="{height / 2}" text-anchor="middle">no values</text></svg>'
        return Markup(_open(figure, style, width, height) + text)
    names = [(level.label, "quiet") for level in figure.levels]
    names += [(curve.label, f"name {_style(i, curve)}") for i, curve in enumerate(figure.curves)]
    box = _box(width, height, names)
    across, up = _axes(figure, lines, box)
    out = [_open(figure, style, width, box.height), box.key]
    for tick, label in zip(up.ticks, labels(up.ticks), strict=True):
        y = up(tick)
        out.append(f'<line class="grid" x1="{across.start:.1f}" x2="{across.end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        out.append(f'<text class="tick" x="{across.start - 6:.1f}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    base = f"{up.start:.1f}"
    for tick, label in zip(across.ticks, labels(across.ticks), strict=True):
        x = f"{across(tick):.1f}"
        out.append(f'<line class="axis" x1="{x}" x2="{x}" y1="{base}" y2="{up.start + 4:.1f}"/>')
        out.append(f'<text class="tick" x="{x}" y="{up.start + 17:.1f}" text-anchor="middle">{label}</text>')
    out.append(f'<line class="axis" x1="{across.start:.1f}" x2="{across.end:.1f}" y1="{base}" y2="{base}"/>')
    out.append(f'<text class="unit" x="0" y="{box.top - 14:.0f}">{escape(figure.y)}</text>')
    out.append(
        f'<text class="unit" x="{across.end:.1f}" y="{box.height - 5:.0f}" text-anchor="end">{escape(figure.x)}</text>'
    )

    ends: list[tuple[str, str, float, float]] = []  # label, style, and where the line ends
    for level in figure.levels:
        y = up(level.y)
        out.append(f'<line class="level" x1="{across.start:.1f}" x2="{across.end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        ends.append((level.label, "quiet", across.end, y))
    xs = [x for curve in figure.curves for x in set(curve.x)]
    dodge = _DODGE_PX if len(set(xs)) < len(xs) else 0.0
    for i, (curve, line) in enumerate(zip(figure.curves, lines, strict=True)):
        if np.isfinite(line).any():
            drawn = np.stack([line[:, 0], average(line[:, 1], curve.smooth)], -1) if curve.smooth else line
            shift = dodge * (i - (len(lines) - 1) / 2) * bool(curve.intervals)
            at = replace(across, start=across.start + shift, end=across.end + shift)
            color = _style(i, curve)
            out += _whiskers(curve, color, at, up)
            if curve.smooth:
                out.append(_path(line, across, up, f"raw {color}"))
            if curve.line:
                out.append(_path(drawn, at, up, f"curve {color}" + " dashed" * (curve.dashed or i >= DISTINCT)))
            out += _points(curve, drawn, color, figure.x, at, up)
            x, y = drawn[np.isfinite(drawn[:, 0])][-1]
            ends.append((curve.label, f"name {color}", across(x), up(y)))
    if not box.key:
        out += _names(ends, across, up)
    return Markup("".join(out) + "</svg>")


def _open(figure: Figure, style: str, width: float, height: float) -> str:
    label = escape(f"{figure.title}: {figure.y} against {figure.x}")
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return f'<svg class="plot {style}" {size} role="img" aria-label="{label}">'


def _style(i: int, curve: Curve) -> str:
    return f"c{(i if curve.color < 0 else curve.color) % COLORS}"


def _points(curve: Curve, line: np.ndarray, color: str, unit: str, across: _Axis, up: _Axis) -> list[str]:
    """Return circles with their value as title; visible for a curve with points, else only under the pointer."""
    known = line[np.isfinite(line[:, 0])]
    visible = curve.points or not curve.line or len(known) == 1
    most = _HOVER_POINTS if curve.line else _MAX_POINTS
    shown = known[np.unique(np.linspace(0, len(known) - 1, most).round().astype(int))]
    mark, radius = ("dot", 3) if visible else ("hit", 6)
    return [
        f'<circle class="{mark} {color}" cx="{across(x):.1f}" cy="{up(y):.1f}" r="{radius}">'
        f"<title>{escape(f'{curve.label}, {unit} {number(x)}: {number(y)}')}</title></circle>"
        for x, y in shown
    ]


def _names(ends: Sequence[tuple[str, str, float, float]], across: _Axis, up: _Axis) -> list[str]:
    """Return the name at the end of each line, moved where names would overlap, with a thin leader line if moved."""
    out = []
    label_ys = spread([y for *_, y in ends], _LINE_PX, up.end, up.start)
    for (label, style, x, y), label_y in zip(ends, label_ys, strict=True):
        if abs(label_y - y) > 5 or across.end - x > 5:
            x1, x2 = f"{x + 3:.1f}", f"{across.end + 7:.1f}"
            out.append(f'<line class="leader" x1="{x1}" y1="{y:.1f}" x2="{x2}" y2="{label_y:.1f}"/>')
        out.append(f'<text class="{style}" x="{across.end + 9:.1f}" y="{label_y + 4:.1f}">{escape(label)}</text>')
    return out


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
