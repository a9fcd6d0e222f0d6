"""JSON that is read back: every file may have been cut off, damaged or edited, and each fault is one sentence.

done = read_object(run / "done.json", {"steps": int, "metrics": dict}, "delete it")
rows = read_rows(run / "metrics.jsonl", {"split": str, "step": int}, "train again", cut=True)
text = "".join(row_line(row) for row in rows)

A line that `row_line` makes has a checksum in the field "crc": CRC-32, which finds any flipped byte and costs 2 microseconds.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from firth.io.atomic import check_regular_file
from firth.types import UserError

MAX_BYTES = 32 << 20
"""Bytes of the longest JSON file that is read whole."""

CHECKSUM = "crc"
"""Field of a row that holds the CRC-32 of the others."""

Fields = Mapping[str, Any]
"""Field -> the type that its value has, or a tuple of types."""


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty where there is no file.

    Raises:
        UserError: It holds anything else, NaN and too long a text too.
    """
    return read_object(file) if file.exists() else {}


def read_object(file: Path, needs: Fields | None = None, cure: str = "copy it again") -> dict[str, Any]:
    """Return the object in a JSON file that has certain fields. cure: what the user can do where it has not."""
    found = parsed(file, cure)
    if type(found) is not dict:
        raise UserError(f"{file} is not a JSON object: {cure}")
    _check(found, needs or {}, f"{file}", cure)
    return found


def read_rows(file: Path, needs: Fields, cure: str, *, cut: bool = False) -> list[dict[str, Any]]:
    """Return the objects of a file of JSON lines, each with certain fields; none where there is no file.

    Checksums are compared and removed. A file without any is of an older version.

    cut: whether a last line without its end is left out, as a kill leaves it in a file that is appended to.
    """
    check_regular_file(file)
    if not file.exists():
        return []
    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error}): {cure}") from None
    rows = []
    summed = any(f'"{CHECKSUM}"' in line for line in lines)
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                if cut and number == len(lines):
                    break
                raise UserError(f"{file}, line {number}: this is not JSON: {cure}") from None
            if type(row) is not dict:
                raise UserError(f"{file}, line {number}: this is not a JSON object: {cure}")
            if summed and row.pop(CHECKSUM, None) != _checksum(row):
                raise UserError(f"{file}, line {number}: this is not as it was written (its checksum differs): {cure}")
            _check(row, needs, f"{file}, line {number}", cure)
            rows.append(row)
    return rows


def row_line(row: Mapping[str, Any], *, ascii_only: bool = True) -> str:
    """Return a row as a line of JSON with its checksum. ascii_only: whether other characters are written as escapes."""
    return json.dumps({**row, CHECKSUM: _checksum(row)}, ensure_ascii=ascii_only) + "\n"


def _checksum(row: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())


def _check(found: Mapping[str, Any], needs: Fields, place: str, cure: str) -> None:
    for name, kinds in needs.items():
        if name not in found or not isinstance(found[name], kinds):
            raise UserError(f"{place}: the field {name!r} is missing or of another kind: {cure}")


def check_all(rows: Iterable[Any], needs: Fields, place: str, cure: str) -> None:
    """Raise a UserError if one of the values is not an object with certain fields."""
    for row in rows:
        if type(row) is not dict:
            raise UserError(f"{place}: this is not a JSON object: {cure}")
        _check(row, needs, place, cure)


def parsed(file: Path, cure: str = "copy it again") -> Any:
    """Return what a JSON file holds."""
    check_regular_file(file)
    if file.stat().st_size > MAX_BYTES:
        raise UserError(f"{file} has {file.stat().st_size:,} bytes, which no such file needs: it is not read")
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=no_number)
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{file} is not JSON that can be read ({fault}): {cure}") from None


def no_number(name: str) -> float:
    """Refuse the constants that JSON has not and Python writes: NaN, Infinity."""
    raise ValueError(f"{name} is no number")
