"""Read a table of training runs: parameters, tokens and loss of each, from CSV or JSON lines, with checks of the numbers.

parameters (N)   tokens (D)   loss (L)        in every row
flops (C)                                     6 N D where it is left out
unique_tokens (U) or epochs                   tokens where they are left out: text read once
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firth.io.atomic import check_regular_file
from firth.types import UserError

COLUMNS = {
    "parameters": ("parameters", "params", "n"),
    "tokens": ("tokens", "d"),
    "loss": ("loss", "l"),
    "flops": ("flops", "compute", "c"),
    "unique_tokens": ("unique_tokens", "unique", "u"),
    "epochs": ("epochs",),
    "bits_per_byte": ("bits_per_byte",),
    "seconds": ("seconds",),
}
"""Quantity -> the names that its column may have, in any case."""
REQUIRED = ("parameters", "tokens", "loss")

MIN_POINTS = 8
"""Fewest points of a fit: five constants need more than five numbers."""
MIN_COUNT = 1000.0
"""Fewer parameters or tokens than this are taken for millions or billions."""
MAX_FLOPS_FACTOR = 30.0
"""How much FLOPs may differ from 6 N D before a unit must be wrong."""


@dataclass(frozen=True)
class Points:
    """Columns of a table, one entry for each run.

    Args:
        N: Parameters.
        D: Tokens read.
        loss: Held-out loss.
        C: FLOPs.
        unique: Unique tokens among them.
        where: File and line of each.
        has_flops: Whether the table states the FLOPs.
        bits_per_nat: Bits per byte for each unit of loss; 0 if the table does not state bits per byte.
        flops_per_second: Median speed; 0 if the table does not state seconds.
        skipped: Rows that were left out, with the reason.
    """

    N: np.ndarray
    D: np.ndarray
    loss: np.ndarray
    C: np.ndarray
    unique: np.ndarray
    where: tuple[str, ...]
    has_flops: bool
    bits_per_nat: float = 0.0
    flops_per_second: float = 0.0
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.N)

    @property
    def epochs(self) -> np.ndarray:
        """How often the text was read, at least 1."""
        return np.maximum(1.0, self.D / self.unique)

    def take(self, index: np.ndarray) -> Points:
        """Return some of the rows; `index` may repeat them."""
        where = tuple(self.where[i] for i in np.arange(len(self))[index])
        return Points(
            self.N[index], self.D[index], self.loss[index], self.C[index], self.unique[index], where, self.has_flops,
            self.bits_per_nat, self.flops_per_second, self.skipped,
        )  # fmt: skip


def read_points(path: Path, skip_diverged: bool = False) -> Points:
    """Read a table.

    Args:
        path: A CSV, TSV or JSONL file.
        skip_diverged: Leave out rows whose loss is missing, NaN or infinite.

    Raises:
        UserError: A column is missing, a number cannot be read, a run diverged, or numbers have different units.
    """
    rows = _rows(path)
    if not rows:
        raise UserError(f"{path}: the table is empty")
    names = _columns(path, [key for _, row in rows for key in row])
    found: dict[str, list[float]] = {name: [] for name in names}
    where, skipped = [], []
    for line, row in rows:
        place = f"{path}:{line}"
        values = {
            name: _number(row.get(column), f"{place}: {column}", name == "loss") for name, column in names.items()
        }
        if not math.isfinite(values["loss"]):
            why = f"{place}: the loss is {row.get(names['loss'])}, so this run diverged"
            if not skip_diverged:
                raise UserError(f"{why}: delete the row, or leave such rows out with --skip-diverged")
            skipped.append(why)
            continue
        for name, value in values.items():
            if name not in REQUIRED and row.get(names[name]) in (None, ""):
                continue
            if not (math.isfinite(value) and value > 0):
                raise UserError(f"{place}: {names[name]} is {row.get(names[name])}: it must be a number above 0")
        for name, value in values.items():
            found[name].append(value)
        where.append(place)
    columns = {name: np.array(values, float) for name, values in found.items()}
    return _points(path, columns, tuple(where), tuple(skipped))


def _points(path: Path, columns: Mapping[str, np.ndarray], where: tuple[str, ...], skipped: tuple[str, ...]) -> Points:
    """Return the points of a table after the checks of its units."""
    N, D, loss = columns["parameters"], columns["tokens"], columns["loss"]
    if len(N) < MIN_POINTS:
        raise UserError(
            f"{path}: {len(N)} points are too few for a law of five constants: train at least {MIN_POINTS}, of three sizes and "
            "three budgets"
        )
    for name, values in (("parameters", N), ("tokens", D)):
        if len(np.unique(values.round())) < 3:
            raise UserError(
                f"{path}: {name} has {len(np.unique(values.round()))} different values: at least three are needed"
            )
        small = np.flatnonzero(values < MIN_COUNT)
        if len(small):
            raise UserError(
                f"{where[small[0]]}: {name} is {values[small[0]]:g}, which looks like millions or billions: write "
                "the whole number in every row"
            )
    none = np.full(len(N), np.nan)
    unique = columns.get("unique_tokens", D / columns.get("epochs", none))
    unique = np.where(np.isnan(unique), D, unique)
    stated = columns.get("flops", none)
    C = np.where(np.isnan(stated), 6 * N * D, stated)
    ratio = C / (6 * N * D)
    odd = np.flatnonzero((ratio > MAX_FLOPS_FACTOR) | (ratio < 1 / MAX_FLOPS_FACTOR))
    if len(odd):
        raise UserError(
            f"{where[odd[0]]}: its FLOPs are {ratio[odd[0]]:.3g} times 6 x parameters x tokens: check the units of the three columns"
        )
    bits, seconds = columns.get("bits_per_byte", none) / loss, columns.get("seconds", none)
    points = Points(
        N,
        D,
        loss,
        C,
        np.minimum(unique, D),
        where,
        bool(np.isfinite(stated).all()),
        _median(bits),
        _median(C / seconds),
        skipped,
    )
    check_units(points)
    return points


def check_units(points: Points) -> None:
    """Raise a UserError if the losses are of two units: two levels where one plane of log N and log D should be."""
    X = np.stack([np.ones(len(points)), np.log(points.N), np.log(points.D)], -1)
    y = np.log(points.loss)
    order = np.argsort(y)
    gaps = np.diff(y[order])
    for cut in np.argsort(gaps)[::-1][:3]:  # the two units have the widest gap, or nearly so
        second = np.zeros(len(y))
        second[order[cut + 1 :]] = 1.0
        if not 2 <= second.sum() <= len(y) - 2:
            continue
        with_level, left, *_ = np.linalg.lstsq(np.column_stack([X, second]), y, rcond=None)
        _, plain, *_ = np.linalg.lstsq(X, y, rcond=None)
        explained = float(plain.sum()) > 20 * max(float(left.sum()), 1e-12)
        if explained and with_level[-1] > 0.4 and gaps[cut] > 0.1:
            low, high = order[cut], order[cut + 1]
            raise UserError(
                f"{points.where[low]} and {points.where[high]}: the losses are of two levels ({points.loss[low]:.3g} and "
                f"{points.loss[high]:.3g}, a factor of {math.exp(with_level[-1]):.2g} at equal size): write all of them in nats per "
                "token, or all in bits per byte"
            )


def _median(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else 0.0


def _rows(path: Path) -> list[tuple[int, Mapping[str, Any]]]:
    """Return line number and fields of each row."""
    check_regular_file(path)
    if not path.is_file():
        raise UserError(f"{path}: there is no such table; `firth scale run` writes one")
    text = path.read_text(encoding="utf-8-sig", errors="replace")
    if path.suffix.lower() in (".csv", ".tsv"):
        reader = csv.DictReader(text.splitlines(), delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        return [(reader.line_num, row) for row in reader]
    rows: list[tuple[int, Mapping[str, Any]]] = []
    for line, content in enumerate(text.splitlines(), 1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except ValueError:
            raise UserError(f"{path}:{line}: this is not JSON: a table is .csv, .tsv, or JSON lines") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{line}: this is no object with parameters, tokens and loss")
        rows.append((line, row))
    return rows


def _columns(path: Path, keys: Sequence[str]) -> dict[str, str]:
    """Return quantity -> column for the columns that the table has."""
    names = {str(key).strip().lower(): str(key) for key in keys}
    found = {}
    for name, known in COLUMNS.items():
        column = next((names[one] for one in known if one in names), None)
        if column is not None:
            found[name] = column
    missing = [name for name in REQUIRED if name not in found]
    if missing:
        raise UserError(f"{path}: there is no column {' and none '.join(missing)}; it has {', '.join(names.values())}")
    return found


def _number(value: Any, place: str, may_be_missing: bool) -> float:
    """Return a number; NaN for an empty cell of a loss, of bits per byte or of seconds."""
    if value is None or value == "":
        return math.nan
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        if may_be_missing and isinstance(value, str) and value.strip().lower() in ("diverged", "none", "null", "-"):
            return math.nan
        raise UserError(f"{place} is {value!r}: write a plain number, such as 1200000 or 1.2e6") from None
