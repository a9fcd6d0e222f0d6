"""Parallel coordinates: where values are on their axes, and that the picture has them."""

import re

import pytest

from firth.report.page import Report, Section, render
from firth.report.parallel import ParallelAxis, ParallelCoordinates, svg_parallel

LR = ParallelAxis("optimizer.lr", (1e-4, 1e-3, 1e-2), log=True)
SIZE = ParallelAxis("batch.size", ("16", "8", "128"))
LOSS = ParallelAxis("loss", (2.0, None, 1.0))
CHART = ParallelCoordinates(
    "Each line is a trial", (LR, SIZE, LOSS), ("finished", "pruned", "best"), ("a", "b", "c<d>")
)


def test_values_are_placed_on_their_axes() -> None:
    assert [LR.place(value) for value in LR.values if value] == pytest.approx([0, 0.5, 1])
    assert SIZE.choices == ["8", "16", "128"]
    assert [SIZE.place(value) for value in ("8", "16", "128")] == [0, 0.5, 1]
    assert ParallelAxis("x", (3.0, 3.0)).place(3.0) == 0.5


def test_each_row_is_a_line_through_its_values() -> None:
    picture = str(svg_parallel(CHART, 704, 320))
    lines = re.findall(r'<polyline class="([^"]*)" points="([^"]*)">', picture)
    assert [style for style, _ in lines] == ["whisker c5", "whisker c1 dashed", "curve c0"]  # the best is drawn last
    points = [[tuple(map(float, point.split(","))) for point in row.split()] for _, row in lines]
    assert [len(row) for row in points] == [3, 2, 3]
    lowest, middle, highest = (row[0][1] for row in points)
    assert lowest > middle > highest and middle == pytest.approx((lowest + highest) / 2, abs=0.1)
    assert "c&lt;d&gt;: optimizer.lr 0.01, batch.size 128, loss 1" in picture and "c<d>" not in picture


@pytest.mark.parametrize("width", [704, 340])
def test_everything_is_within_the_picture(width: int) -> None:
    picture = str(svg_parallel(CHART, width, 300))
    xs = [float(x) for x in re.findall(r'(?:x|x1|cx)="([\d.-]+)"', picture)]
    assert min(xs) >= 0 and max(xs) <= width
    page = render(Report("A sweep", (Section("Trials", parallels=(CHART,)),)))
    assert page.count('aria-label="Each line is a trial"') == 2
