"""Tables of runs: columns and formats, and every input that gives a sentence instead of a number."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from firth.scaling.fitted import describe, fit_points
from firth.scaling.report import fit_and_report
from firth.scaling.table import read_points
from firth.types import UserError
from tests.support.scaling import CHINCHILLA, runs

Rows = list[dict[str, Any]]


def rows(**options: Any) -> Rows:
    points = runs(CHINCHILLA, **options)
    return [
        {"parameters": N, "tokens": D, "loss": L, "flops": C}
        for N, D, L, C in zip(*map(np.ndarray.tolist, (points.N, points.D, points.loss, points.C)), strict=True)
    ]


def write(path: Path, table: Rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in table))
    return path


def test_csv_and_json_lines_with_other_names(tmp_path: Path) -> None:
    jsonl = read_points(write(tmp_path / "a.jsonl", rows()))
    lines = ["Params,D,Loss,note", *(f"{r['parameters']},{r['tokens']:.0f},{r['loss']},x" for r in rows())]
    (tmp_path / "b.csv").write_text("\n".join(lines) + "\n")
    table = read_points(tmp_path / "b.csv")
    assert np.allclose(jsonl.N, table.N) and np.allclose(jsonl.loss, table.loss) and np.allclose(jsonl.C, table.C)
    assert jsonl.has_flops and not table.has_flops
    assert table.where[0].endswith("b.csv:2") and (table.epochs == 1).all()


def test_epochs_or_unique_tokens_state_repeats(tmp_path: Path) -> None:
    table = rows()
    table[0]["epochs"], table[1]["unique_tokens"] = 4, table[1]["tokens"] / 8
    for row in table[1:]:
        row["epochs"] = None
    by_epochs = read_points(
        write(tmp_path / "a.jsonl", [{k: v for k, v in r.items() if k != "unique_tokens"} for r in table])
    )
    assert by_epochs.epochs[:2].tolist() == pytest.approx([4, 1])
    by_tokens = read_points(write(tmp_path / "b.jsonl", [{k: v for k, v in r.items() if k != "epochs"} for r in table]))
    assert by_tokens.epochs[:3].tolist() == pytest.approx([1, 8, 1])


def nan(table: Rows) -> None:
    table[4]["loss"] = float("nan")


def missing(table: Rows) -> None:
    table[4]["loss"] = None


def outlier(table: Rows) -> None:
    table[4]["loss"] = 9.5


def breakthrough(table: Rows) -> None:
    table[4]["loss"] *= 0.7


def bits_and_nats(table: Rows) -> None:
    for row in table[::2]:
        row["loss"] *= 0.36


def millions(table: Rows) -> None:
    table[3]["tokens"] /= 1e9


def billions(table: Rows) -> None:
    for row in table:
        row["parameters"] /= 1e6


def no_column(table: Rows) -> None:
    for row in table:
        row["steps"] = row.pop("tokens")


def word(table: Rows) -> None:
    table[2]["tokens"] = "20M"


def negative(table: Rows) -> None:
    table[2]["parameters"] = -5e7


def one_size(table: Rows) -> None:
    for row in table:
        row["parameters"] = 1e8
        row["flops"] = 6e8 * row["tokens"]


def few(table: Rows) -> None:
    del table[7:]


def wrong_flops(table: Rows) -> None:
    table[5]["flops"] *= 1e-3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nan, r"table.jsonl:5: the loss is nan, so this run diverged: delete the row, or .* --skip-diverged"),
        (missing, r"table.jsonl:5: the loss is None, so this run diverged"),
        (
            outlier,
            r"table.jsonl:5: the loss 9.5 is far from the \d\.\d+ of the other runs: this run diverged, or its unit",
        ),
        (
            breakthrough,
            r"table.jsonl:5: .* this model learned what the others have not, and the runs follow no common law",
        ),
        (bits_and_nats, r"losses are of two levels .*: write all of them in nats per token, or all in bits per byte"),
        (millions, r"table.jsonl:4: tokens is .*, which looks like millions or billions: write the whole number"),
        (billions, r"parameters is .*, which looks like millions or billions"),
        (no_column, r"there is no column tokens; it has parameters, loss, flops, steps"),
        (word, r"table.jsonl:3: tokens is '20M': write a plain number"),
        (negative, r"table.jsonl:3: parameters is -50000000.0: it must be a number above 0"),
        (one_size, r"parameters has 1 different values: at least three"),
        (few, r"7 points are too few for a law of five constants: train at least 8"),
        (wrong_flops, r"table.jsonl:6: its FLOPs are 0.001 times 6 x parameters x tokens: check the units"),
    ],
)
def test_bad_input_is_a_sentence(change: Callable[[Rows], None], message: str, tmp_path: Path) -> None:
    table = rows(noise=0.002)
    fit_points(read_points(write(tmp_path / "good.jsonl", table)), draws=1)
    change(table)
    with pytest.raises(UserError, match=message):
        fit_points(read_points(write(tmp_path / "table.jsonl", table)), draws=1)


@pytest.mark.parametrize("change", [nan, missing, outlier])
def test_diverged_runs_can_be_left_out(change: Callable[[Rows], None], tmp_path: Path) -> None:
    table = rows()
    change(table)
    path = write(tmp_path / "table.jsonl", table)
    found = fit_points(read_points(path, skip_diverged=True), draws=1, skip_diverged=True)
    assert len(found.points) == len(table) - 1
    assert len(found.excluded) == 1 and "table.jsonl:5" in found.excluded[0]
    assert found.fitted.law.alpha == pytest.approx(CHINCHILLA.alpha, rel=1e-3)


@pytest.mark.slow
def test_a_wide_interval_is_a_sentence() -> None:
    """Noise of 15% leaves the best size open: the text names no number for it."""
    result = fit_points(runs(CHINCHILLA, noise=0.08, sizes=3, budgets=(1e19, 1.5e19, 2e19)), draws=40)
    text = describe(result, [1e21])
    assert "the best size for 1e+21 FLOPs is not determined: its interval is" in text
    assert "best for 1e+21 FLOPs:" not in text


def test_text_read_again_only_is_too_little(tmp_path: Path) -> None:
    table = [row | {"epochs": 4} for row in rows()]
    with pytest.raises(UserError, match="only 0 of 48 points read their text once"):
        fit_points(read_points(write(tmp_path / "table.jsonl", table)), draws=1)
    mixed = [row | {"epochs": 4 if i < 2 else 1} for i, row in enumerate(rows())]
    few_repeats = fit_points(read_points(write(tmp_path / "mixed.jsonl", mixed)), draws=1)
    assert "2 runs read text again, too few to say what a repeat is worth" in describe(few_repeats, [1e21])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.csv: there is no such table"):
        read_points(tmp_path / "none.csv")
    (tmp_path / "text.jsonl").write_text("parameters tokens loss\n")
    with pytest.raises(UserError, match=r"text.jsonl:1: this is not JSON"):
        read_points(tmp_path / "text.jsonl")
    (tmp_path / "empty.csv").write_text("parameters,tokens,loss\n")
    with pytest.raises(UserError, match=r"empty.csv: the table is empty"):
        read_points(tmp_path / "empty.csv")


def test_the_page_has_its_charts_in_both_sizes(tmp_path: Path) -> None:
    table = [row | {"bits_per_byte": row["loss"] * 0.3} for row in rows(noise=0.003)]
    text = fit_and_report(write(tmp_path / "table.jsonl", table), (3e22,), 20, False, 0, tmp_path / "fit")
    page = (tmp_path / "fit" / "fit.html").read_text()
    titles = ("Held-out loss by compute", "IsoFLOP curves", "Best size by compute", "Residuals")
    assert all(page.count(f"{title}:") == 2 for title in titles)  # a wide and a narrow drawing of each
    assert "your budget" in page and "frontier" in page
    assert "<script" not in page and "src=" not in page and 'href="http' not in page
    assert str(tmp_path / "fit" / "fit.json") in text and "envelope" in text
