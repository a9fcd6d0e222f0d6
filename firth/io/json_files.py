"""JSON files that are read back with checks: each may have been cut off, damaged or edited.

    done = read_object(run / "done.json", {"steps": int, "metrics": dict}, "delete it")
    rows = read_rows(run / "metrics.jsonl", {"split": str, "step": int}, "train again", cut=True)
    text = "".join(row_line(row) for row in rows)

Each line of `row_line` has a checksum in the field "crc": CRC-32, which detects any flipped byte and costs 2 microseconds.
`cure`, an argument of most functions here, is the end of the error message: what the user can do.
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
"""Maximum size of a JSON file that is read."""

CHECKSUM = "crc"
"""Field of a row that holds the CRC-32 of the other fields."""

Fields = Mapping[str, Any]
"""Field -> the type of its value, or a tuple of types."""


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; empty if the file does not exist.

    Raises:
        UserError: The file is not a JSON object, contains NaN or Infinity, or is too large.
    """
    return read_object(file) if file.exists() else {}


def read_object(file: Path, needs: Fields | None = None, cure: str = "copy it again") -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        file: The JSON file.
        needs: Required fields and their types.
        cure: What the user can do about a damaged file.

    Raises:
        UserError: The file is not a JSON object, or a field is missing or of another type.
    """
    found = parsed(file, cure)
    if type(found) is not dict:
        raise UserError(f"{file} is not a JSON object: {cure}")
    _check(found, needs or {}, f"{file}", cure)
    return found


def read_rows(file: Path, needs: Fields, cure: str, *, cut: bool = False) -> list[dict[str, Any]]:
    """Return the objects of a JSON lines file; none if the file does not exist.

    Checksums are verified and removed. A file without checksums is of an older version.

    Args:
        file: The JSON lines file.
        needs: Required fields and their types.
        cure: What the user can do about a damaged file.
        cut: Whether to drop an incomplete last line, which a killed writer leaves in a file that is appended to.

    Raises:
        UserError: A line is not a JSON object, its checksum differs, or a field is missing or of another type.
    """
    check_regular_file(file)
    if not file.exists():
        return []
    try:
        lines = file.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error}): {cure}") from None
    rows = []
    has_checksums = any(f'"{CHECKSUM}"' in line for line in lines)
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
            if has_checksums and row.pop(CHECKSUM, None) != _checksum(row):
                raise UserError(f"{file}, line {number}: this is not as it was written (its checksum differs): {cure}")
            _check(row, needs, f"{file}, line {number}", cure)
            rows.append(row)
    return rows


def row_line(row: Mapping[str, Any], *, ascii_only: bool = True) -> str:
    """Return a row as a line of JSON with its checksum.

    Args:
        row: JSON values by field.
        ascii_only: Whether other characters are escaped.
    """
    return json.dumps({**row, CHECKSUM: _checksum(row)}, ensure_ascii=ascii_only) + "\n"


def _checksum(row: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())


def _check(found: Mapping[str, Any], needs: Fields, place: str, cure: str) -> None:
    for name, kinds in needs.items():
        if name not in found or not isinstance(found[name], kinds):
            raise UserError(f"{place}: the field {name!r} is missing or of another type: {cure}")


def check_all(rows: Iterable[Any], needs: Fields, place: str, cure: str) -> None:
    """Check that each value is an object with the required fields.

    Raises:
        UserError: One is not.
    """
    for row in rows:
        if type(row) is not dict:
            raise UserError(f"{place}: this is not a JSON object: {cure}")
        _check(row, needs, place, cure)


def parsed(file: Path, cure: str = "copy it again") -> Any:
    """Return the parsed content of a JSON file.

    Raises:
        UserError: The file is not JSON, contains NaN or Infinity, or is too large.
    """
    check_regular_file(file)
    if file.stat().st_size > MAX_BYTES:
        raise UserError(
            f"{file} has {file.stat().st_size:,} bytes, more than the maximum of {MAX_BYTES:,}: it is not read"
        )
    try:
        return json.loads(file.read_text(encoding="utf-8"), parse_constant=no_number)
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{file} is not JSON ({fault}): {cure}") from None


def no_number(name: str) -> float:
    """Reject the constants NaN and Infinity, which Python writes and JSON does not have."""
    raise ValueError(f"{name} is not a number")
