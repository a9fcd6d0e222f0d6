"""Charts: what is drawn equals the data, for any data."""

import itertools
import math
import re

import numpy as np
import pytest

from firth.report.charts import Curve, Figure, Level, linear_ticks, log_ticks, number, spread, svg, thin
from tests.support.report_example import example


def one(y, x=None, **settings):
    axes = {k: settings.pop(k) for k in ("log_x", "log_y", "levels", "zero") if k in settings}
    return Figure("Title", "step", "nats", (Curve("a curve", x or range(len(y)), y, **settings),), **axes)


def points(picture):
    """Return the vertices of each polyline in pixels."""
    lines = re.findall(r'<polyline class="[^"]*" points="([^"]*)"', picture)
    return [np.array([[float(v) for v in p.split(",")] for p in line.split()]) for line in lines]


def test_a_straight_line_is_drawn_straight_to_scale():
    [drawn] = points(svg(one([0.0, 1.0, 2.0, 3.0, 4.0])))
    steps = np.diff(drawn, axis=0)
    assert np.allclose(steps, steps[0], atol=0.11)
    assert steps[0][0] > 0 > steps[0][1]  # up the page is down in pixels


def test_a_logarithmic_axis_makes_a_power_law_straight():
    [drawn] = points(svg(one([1000.0, 100.0, 10.0, 1.0], x=[1.0, 10.0, 100.0, 1000.0], log_x=True, log_y=True)))
    steps = np.diff(drawn, axis=0)
    assert np.allclose(steps, steps[0], atol=0.11)


def test_values_that_are_not_finite_break_the_line():
    assert len(points(svg(one([1.0, 2.0, math.nan, 2.0, 1.0])))) == 2
    assert len(points(svg(one([1.0, 2.0, -1.0, 2.0, 1.0], log_y=True)))) == 2
    assert "no values" in svg(one([math.nan, math.inf]))
    assert "no values" in svg(one([]))
    assert "nan" not in svg(one([1.0, math.inf, 2.0]))


@pytest.mark.parametrize("y", [[2.0], [2.0, 2.0, 2.0], [0.0], [-1e-9, 1e-9], [1e12, 2e12], [5.0, 5.0 + 1e-12]])
@pytest.mark.parametrize("size", [(704, 310), (340, 240)])
def test_degenerate_ranges_stay_inside(y, size):
    picture = svg(one(y), *size)
    width, height = (float(v) for v in re.search(r'viewBox="0 0 (\d+) (\d+)"', picture).groups())
    numbers = [float(v) for v in re.findall(r' (?:x|x1|x2|cx)="([-\d.]+)"', picture)]
    heights = [float(v) for v in re.findall(r' (?:y|y1|y2|cy)="([-\d.]+)"', picture)]
    assert min(numbers) >= 0
    assert max(numbers) <= width
    assert min(heights) >= 0
    assert max(heights) <= height


def test_a_spike_survives_thinning():
    y = np.zeros(100_000)
    y[54_321] = 9.0
    kept = thin(np.stack([np.arange(100_000.0), y], -1), 320)
    assert len(kept) < 700
    assert kept[:, 1].max() == 9.0
    assert kept[0, 0] == 0
    assert kept[-1, 0] == 99_999


def test_a_long_curve_is_a_small_picture():
    y = np.random.default_rng(0).random(200_000)
    assert len(svg(one(y.tolist(), smooth=100))) < 30_000


def test_smoothing_keeps_the_raw_line():
    noisy = (3 + np.random.default_rng(0).standard_normal(300)).tolist()
    raw, smooth = points(svg(one(noisy, smooth=20)))
    assert smooth[:, 1].std() < 0.5 * raw[:, 1].std()
    assert abs(smooth[:, 1].mean() - raw[:, 1].mean()) < 3


def test_names_do_not_overlap():
    ends = np.random.default_rng(0).uniform(20, 60, 9).tolist()
    placed = sorted(spread(ends, 15, 0, 300))
    assert min(b - a for a, b in itertools.pairwise(placed)) >= 15 - 1e-9
    curves = tuple(Curve(f"curve {i}", [0, 1], [0, 1 + i / 1000]) for i in range(5))
    picture = svg(Figure("t", "x", "y", curves))
    at = sorted(float(y) for y in re.findall(r'class="name c\d" x="[\d.]+" y="([\d.]+)"', picture))
    assert len(at) == 5
    assert min(b - a for a, b in itertools.pairwise(at)) >= 14.9


def test_long_names_go_into_a_key_above():
    long = Curve("a name that is too long for the end of its line", [0, 1], [0, 1])
    figure = Figure("t", "x", "y", (long, Curve("short", [0, 1], [1, 0])))
    picture = svg(figure, 340, 240)
    assert picture.count("a name that is too long") == 1 + 2  # the key, and the titles of two points
    assert float(re.search(r'viewBox="0 0 340 (\d+)"', picture)[1]) > 240


def test_points_have_their_value_as_title():
    picture = svg(one([1.0, 0.25], points=True))
    assert "<title>a curve, step 1: 0.25</title>" in picture
    assert "untrained" in svg(one([1.0, 2.0], levels=(Level("untrained", 9.0),)))


def test_zero_is_on_the_axis_if_requested():
    assert ">0</text>" in svg(one([26_000.0, 27_000.0], zero=True))
    assert ">0</text>" not in svg(one([26_000.0, 27_000.0], x=[1.0, 2.0]))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3.1, 9.4), (-5, 1e6), (1e-6, 2e-6), (0.999, 1.001)])
def test_ticks_enclose_the_range_in_round_steps(low, high):
    ticks = linear_ticks(low, high, 5)
    assert ticks[0] <= low < high <= ticks[-1]
    assert 3 <= len(ticks) <= 9
    assert np.allclose(np.diff(ticks), ticks[1] - ticks[0])
    assert log_ticks(1, 1e9)[::3] == (1.0, 1e3, 1e6, 1e9)


def test_numbers_are_formatted():
    assert [number(v) for v in (1e4, 999_999, 1.5e9, 0.1 + 0.2, -1e-7, 123.456)] == [
        "10k", "1M", "1.5G", "0.3", "−1e-7", "123.5"
    ]  # fmt: skip
    assert number(math.nan) == "not a number"


def test_a_curve_of_unequal_lengths_is_an_error():
    with pytest.raises(ValueError, match="2 x and 1 y"):
        Curve("c", [1, 2], [1])


def test_the_example_has_no_empty_figure():
    for section in example().sections:
        for figure in section.figures:
            assert "no values" not in svg(figure)


def test_intervals_are_vertical_lines_that_do_not_overlap() -> None:
    low, high = (
        Curve("low", (0.0, 1.0), (0.5, 0.6), points=True, intervals=((0.4, 0.6), (0.4, 0.8))),
        Curve("high", (0.0, 1.0), (0.7, 0.8), intervals=((math.nan, math.nan), (0.5, 1.1))),
    )
    picture = svg(Figure("Score", "FLOPs", "share", (low, high)))
    found = re.findall(r'<polyline class="whisker (c\d)" points="([\d.]+),([\d.]+) ([\d.]+),([\d.]+)"/>', picture)
    assert [color for color, *_ in found] == ["c0", "c0", "c1"]
    for _, x, y, x2, y2 in found:
        assert x == x2
        assert 0 < float(y2) < float(y) < 310 - 40 + 1e-6  # within the axes: 1.1 is the highest end
    assert float(found[2][1]) - float(found[1][1]) == pytest.approx(4.0, abs=0.11)  # px, at one x
    with pytest.raises(ValueError, match="2 y and 1 intervals"):
        Curve("x", (0, 1), (0, 1), intervals=((0.1, 0.2),))


def test_dots_without_a_line_are_all_drawn() -> None:
    x = np.linspace(0, 9, 100)
    picture = svg(Figure("Score", "KL", "reward", (Curve("truth", x, x[::-1], line=False),)))
    assert picture.count('class="dot c0"') == 100
    assert "<polyline" not in picture


def test_points_of_nearly_equal_x_are_drawn_close() -> None:
    """Runs of 6.00e12 and 6.02e12 FLOPs have practically equal compute."""
    curves = tuple(
        Curve(str(x), np.array([x]), np.array([y]), points=True) for x, y in ((6.00e12, 0.2), (6.02e12, 0.3))
    )
    picture = svg(Figure("t", "x", "y", curves))
    at = [float(x) for x in re.findall(r'<circle [^>]*cx="([\d.]+)"', picture)]
    assert len(at) == 2 and abs(at[1] - at[0]) < 20
    assert ">0<" in picture
