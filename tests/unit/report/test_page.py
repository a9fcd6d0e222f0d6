"""report.html is complete, self-contained, safe, small, and legible for color-blind readers and in dark mode."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pytest

from firth.report import charts
from firth.report.page import Report, Section, StatCell, Table, TextSample, cells, prose, render, write
from tests.support.html_pages import Reader
from tests.support.report_example import HOSTILE, example

STRUCTURE = "html head meta title style body div header main section nav h1 h2 p dl dt dd ol li a figure figcaption b"
ALLOWED = {*f"{STRUCTURE} code pre table thead tbody tr th td svg text line polyline circle".split()}


def test_every_tag_is_closed_and_allowed():
    reader = Reader(render(example()))
    assert set(reader.tags) <= ALLOWED
    assert reader.tags.count("svg") == 2 * 5  # each figure for wide and for narrow screens
    assert reader.tags.count("tr") == 4 + 4


def test_the_parser_detects_unclosed_tags():
    with pytest.raises(AssertionError):
        Reader("<div><p>never closed</div>")


def test_nothing_is_loaded_and_nothing_runs():
    page = render(example())
    reader = Reader(page)
    assert not {"script", "img", "link", "iframe", "object", "form", "input"} & set(reader.tags)
    names = {name for name, _ in reader.attributes}
    assert not {"src", "srcset", "action", "style", "background", "data"} & names
    assert not [name for name in names if name.startswith("on")]
    assert all(value.startswith("#") for name, value in reader.attributes if name == "href")
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page


def test_hostile_text_is_escaped():
    reader = Reader(render(example()))
    assert "".join(reader.words).count("<script>alert('x')</script>") == 4
    assert "<b>not bold</b>" in "".join(reader.words)
    everywhere = Report(
        HOSTILE,
        (Section(HOSTILE, HOSTILE, tables=(Table(HOSTILE, [HOSTILE], [[HOSTILE]], HOSTILE),), listing=HOSTILE),),
        text="`" + HOSTILE.replace("`", "") + "`",
        numbers=(StatCell(HOSTILE, HOSTILE, HOSTILE),),
        facts={HOSTILE: HOSTILE},
    )
    assert set(Reader(render(everywhere)).tags) <= ALLOWED


def test_contents_link_to_their_sections():
    reader = Reader(render(example()))
    links = [value[1:] for name, value in reader.attributes if name == "href"]
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids)) == 6
    assert links == ids
    assert links[3:5] == ["alignment", "alignment-4"]


def test_the_file_is_small_and_complete(tmp_path):
    path = write(example(), tmp_path / "report.html")
    assert 20_000 < path.stat().st_size < 2_000_000
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8").endswith("</html>")


def test_an_empty_report_is_a_page():
    Reader(render(Report("Nothing yet")))
    Reader(render(Report("One", (Section("Part", samples=(TextSample("p", {}),), tables=(Table("t", ["a"], []),)),))))


def test_cells_are_aligned():
    table = Table("t", ["who", "n", "loss", "gap"], [["a", 12345, 12.5, None], ["b", -7, 3.14159, math.inf]])
    assert [[c.text for c in row] for row in cells(table)] == [["a", "12,345", "12.50", "–"], ["b", "−7", "3.14", "∞"]]
    assert [c.numeric for c in cells(table)[0]] == [False, True, True, True]


def test_the_best_cells_are_bold_including_ties():
    rows = cells(Table("t", ["x", "y"], [[1, 0.5], [3, 0.2], [3, None]], best={"x": "max", "y": "min"}))
    assert [[c.best for c in row] for row in rows] == [[False, False], [True, True], [True, False]]


def test_inconsistent_tables_are_errors():
    with pytest.raises(ValueError, match="a row of 1 cells under 2"):
        Table("t", ["a", "b"], [["only one"]])
    with pytest.raises(ValueError, match="no column 'c'"):
        Table("t", ["a", "b"], [], best={"c": "max"})


def test_prose_marks_code_and_nothing_else():
    assert str(prose("a `b<c` d\n\n*e*")) == "<p>a <code>b&lt;c</code> d</p>\n<p>*e*</p>"
    assert str(prose("")) == ""


# ---------------------------------------------------------------- colors

TEMPLATE = (Path(__file__).parents[3] / "firth/report/template.html.j2").read_text(encoding="utf-8")


def palette(dark):
    """Return name -> linear RGB of the light or the dark theme."""
    blocks = re.findall(r":root \{(.*?)\}", TEMPLATE, re.S)
    found = dict(re.findall(r"--(\w+): #(\w{6});", blocks[1 if dark else 0]))
    rgb = {name: np.array([int(h[i : i + 2], 16) for i in (0, 2, 4)]) / 255 for name, h in found.items()}
    return {n: np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) for n, c in rgb.items()}


def contrast(a, b):
    """Return the WCAG 2 contrast ratio of two linear colors."""
    light = sorted(float(c @ (0.2126, 0.7152, 0.0722)) + 0.05 for c in (a, b))
    return light[1] / light[0]


# Machado, Oliveira & Fernandes 2009, severity 1, on linear RGB.
SIGHT = {
    "full": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}


def oklab(linear):
    """Convert to Ottosson's perceptual color space, where a distance of 0.02 is just noticeable."""
    to_lms = np.array(
        [[0.4122214708, 0.5363325363, 0.0514459929], [0.2119034982, 0.6806995451, 0.1073969566],
         [0.0883024619, 0.2817188376, 0.6299787005]]
    )  # fmt: skip
    to_lab = np.array(
        [[0.2104542553, 0.7936177850, -0.0040720468], [1.9779984951, -2.4285922050, 0.4505937099],
         [0.0259040371, 0.7827717662, -0.8086757660]]
    )  # fmt: skip
    return to_lab @ np.cbrt(to_lms @ np.clip(linear, 0, 1))


@pytest.mark.parametrize("dark", [False, True])
def test_colors_contrast_with_the_background(dark):
    colors = palette(dark)
    for name in ("ink", "quiet", "c0", "c1", "c2", "c3", "c4", "c5"):
        assert contrast(colors[name], colors["paper"]) >= 4.5, name
    assert contrast(colors["ink"], colors["wash"]) >= 7


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("sight", SIGHT)
def test_first_four_colors_differ_for_all_color_vision(dark, sight):
    assert charts.DISTINCT == 4
    colors = palette(dark)
    seen = {n: oklab(np.asarray(SIGHT[sight]) @ colors[n]) for n in ("c0", "c1", "c2", "c3")}
    for a, b in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[a] - seen[b]) > 0.1, (a, b)
