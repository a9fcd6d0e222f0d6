"""The board of runs: what each run is doing, and its metrics as they are written.

    GET /runs                              [{"name", "state", "step", ...}, ...]
    GET /runs/{name}/metrics?from=N        {"rows": [...], "next": M, "restarted": false}

A run is a directory with `recipe.yaml` or `metrics.jsonl`. Directories are looked for at every request, so runs that begin later
appear. metrics.jsonl is read from where the last request ended; a line that is not complete yet is left for the next one. Of long runs
every k-th row is kept. A resumed run removes the rows after its checkpoint: the client then reads from the first row again.

What is odd in one run (a damaged file, a number that is none, a name that is no text) is left out or replaced, so that the others are
shown.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from firth.io.yaml_files import read_yaml
from firth.serve.responses import ApiError
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.training.logging import FILE
from firth.types import UserError

RUN_FILES = ("recipe.yaml", FILE)
"""Files by which a directory is a run."""
MAX_DEPTH = 3
"""Levels of directories below the given ones in which runs are looked for: RUNS/PIPELINE/STAGE."""
MAX_RUNS = 500
"""Most runs on a board."""
MAX_ROWS = 2000
"""Most rows of a split that are kept; of more, every k-th is, and the last one."""
MAX_SPLITS = 16
"""Most splits of a run."""
MAX_LINE_BYTES = 1 << 20
"""Most bytes of a line of metrics.jsonl; a longer one is no row."""
MAX_TEXT = 200
"""Most characters of a name in a recipe."""


@dataclass
class ThinnedLines:
    """The lines of one split, at most MAX_ROWS: of more, every k-th is kept.

    Args:
        lines: Number of the row in the file, and its line.
        every: k.
        count: Rows of the split so far.
    """

    lines: list[tuple[int, bytes]] = field(default_factory=list)
    every: int = 1
    count: int = 0

    def add(self, number: int, line: bytes) -> None:
        """Add the row with a number."""
        if self.count % self.every == 0:
            self.lines.append((number, line))
        self.count += 1
        if len(self.lines) > MAX_ROWS:
            self.lines, self.every = self.lines[::2], 2 * self.every


@dataclass
class MetricsFile:
    """What is kept of a metrics.jsonl that is being written: some rows of each split, as text, and the last ones.

    Args:
        path: The file.
        count: Rows so far.
        last: The last row of each split, with its number.
        curves: The kept rows of each split.
        offset: The byte after the last complete line that was read.
        last_line: This line, by which a rewritten file is noticed.
        version: How many times the file was read from its beginning again.
    """

    path: Path
    count: int = 0
    last: dict[str, tuple[int, dict[str, Any]]] = field(default_factory=dict)
    curves: dict[str, ThinnedLines] = field(default_factory=dict)
    offset: int = 0
    last_line: bytes = b""
    version: int = 0

    def update(self) -> None:
        """Read the complete lines that were added. A line that is no row of metrics is skipped."""
        if not os.path.isfile(self.path):  # none yet, or a pipe, which would block
            return
        try:
            with self.path.open("rb") as file:
                if not self._continues(file):
                    self.count, self.last, self.curves, self.offset, self.last_line = 0, {}, {}, 0, b""
                    self.version += 1
                file.seek(self.offset)
                while line := file.readline(MAX_LINE_BYTES):
                    if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                        break  # not complete yet
                    self.offset += len(line)
                    self.last_line = line
                    self._add(line)
        except OSError:  # it is gone, or may not be read
            return

    def _add(self, line: bytes) -> None:
        row = _row(line)
        if row is not None and (row["split"] in self.curves or len(self.curves) < MAX_SPLITS):
            self.curves.setdefault(row["split"], ThinnedLines()).add(self.count, line)
            self.last[row["split"]] = self.count, row
            self.count += 1

    def since(self, first: int) -> list[dict[str, Any]]:
        """Return the rows from a number on that are kept, and the last ones."""
        kept = {number: line for curve in self.curves.values() for number, line in curve.lines if number >= first}
        rows = {number: row for number, line in kept.items() if (row := _row(line)) is not None}
        rows |= {number: row for number, row in self.last.values() if number >= first}
        return [rows[number] for number in sorted(rows)]

    def _continues(self, file: Any) -> bool:
        """Return whether the file still has the last line that was read, where it was."""
        file.seek(self.offset - len(self.last_line))
        return bool(file.read(len(self.last_line)) == self.last_line)


def _row(line: bytes) -> dict[str, Any] | None:
    """Return a line as a row of single values without its checksum; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if type(row) is not dict or type(row.get("step")) is not int or not isinstance(row.get("split"), str):
        return None
    row.pop("crc", None)
    return _single_values(row)


def _single_values(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the texts and numbers of a mapping in a form that JSON has; NaN and infinities are None."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, str):
            value = replace_lone_surrogates(value)
        elif isinstance(value, float) and not math.isfinite(value):
            value = None
        elif value is not None and not isinstance(value, int | float):
            continue
        found[replace_lone_surrogates(str(name))] = value
    return found


def _text(value: Any) -> str:
    """Return a value as a short text."""
    return replace_lone_surrogates(str(value) if isinstance(value, str | int | float) else "")[:MAX_TEXT]


class Board:
    """The runs below some directories.

    Args:
        directories: Runs, or directories of runs; they may not exist yet.
    """

    def __init__(self, directories: Sequence[Path]) -> None:
        self.directories = list(dict.fromkeys(directories))
        self._files: dict[str, MetricsFile] = {}
        self._recipes: dict[str, tuple[float, dict[str, Any]]] = {}
        self._lock = threading.Lock()

    def runs(self) -> dict[str, Path]:
        """Return the directory of each run by its name: its path as the directories were given; bytes that are no text are \\xff."""
        found: dict[str, Path] = {}
        level = [(one, 0) for one in self.directories]
        while level and len(found) < MAX_RUNS:
            directory, depth = level.pop(0)
            if any(os.path.isfile(directory / name) for name in RUN_FILES):
                found[os.fsencode(directory).decode("utf-8", "backslashreplace")] = directory
            elif depth < MAX_DEPTH:
                level += [(one, depth + 1) for one in _subdirectories(directory)]
        return found

    def summaries(self) -> list[dict[str, Any]]:
        """Return a summary of each run, the one that was written last first."""
        with self._lock:
            found = [self._summary(name, directory) for name, directory in self.runs().items()]
        return sorted(found, key=lambda one: one["idle_seconds"])

    def metrics(self, name: str, first: int, version: int) -> dict[str, Any]:
        """Return the rows of a run from the row `first` on.

        Args:
            name: A name in `runs`.
            first: Rows that the client has.
            version: The version of the file that these rows are of.

        Returns:
            "rows", thinned; "next", the number of rows; "version"; "restarted", whether the rows are all rows of another version.

        Raises:
            ApiError: There is no such run.
        """
        with self._lock:
            runs = self.runs()
            if name not in runs:
                raise ApiError(404, f"there is no run {name[:100]!r}", code="run_not_found")
            file = self._metrics(name, runs[name])
            restarted = version != file.version or first > file.count
            rows = file.since(0 if restarted else first)
            return {"rows": rows, "next": file.count, "version": file.version, "restarted": restarted}

    def _metrics(self, name: str, directory: Path) -> MetricsFile:
        file = self._files.setdefault(name, MetricsFile(directory / FILE))
        file.update()
        return file

    def _summary(self, name: str, directory: Path) -> dict[str, Any]:
        last = self._metrics(name, directory).last
        recipe = self._recipe(name, directory / "recipe.yaml")
        budget = recipe.get("budget")
        objective = recipe.get("objective")
        parts = objective if isinstance(objective, list) else [objective]
        kinds = [_text(one.get("kind") if isinstance(one, dict) else one) for one in parts if one is not None]
        return {
            "name": name,
            "state": state(directory, bool(last)),
            "recipe": _text(recipe.get("name", "")),
            "objective": " + ".join(kinds),
            "budget": {k: v for k, v in _single_values(budget).items() if v} if isinstance(budget, dict) else {},
            "step": max(last.values(), key=lambda one: one[0])[1]["step"] if last else 0,
            "last": {split: last[split][1] for split in ("train", "valid", "rollouts") if split in last},
            "idle_seconds": round(time.time() - _modified(directory), 1),
        }

    def _recipe(self, name: str, path: Path) -> dict[str, Any]:
        """Return the recipe of a run, which is read again after it has changed; empty if it cannot be read."""
        try:
            changed = path.stat().st_mtime
            if name not in self._recipes or self._recipes[name][0] != changed:
                found = read_yaml(path)[0]
                self._recipes[name] = (changed, found if isinstance(found, dict) else {})
        except (OSError, UserError):  # it is not written yet, or damaged: the metrics are shown anyway
            return {}
        return self._recipes[name][1]


def _subdirectories(directory: Path) -> list[Path]:
    """Return the directories in a directory that are not hidden, sorted; none if it does not exist or cannot be read."""
    try:
        with os.scandir(directory) as entries:
            names = [one.name for one in entries if one.is_dir(follow_symlinks=False) and not one.name.startswith(".")]
    except OSError:
        return []
    return [directory / name for name in sorted(names)]


def _modified(directory: Path) -> float:
    """Return when a run was last written to."""
    times = [0.0]
    for name in (*RUN_FILES, "lock"):
        try:
            times.append((directory / name).stat().st_mtime)
        except OSError:
            continue
    return max(times)


def state(directory: Path, has_rows: bool) -> str:
    """Return "finished", "training", "preparing" or "stopped".

    A run has a lock file with its process id. The lock itself is not tried, since that could stop a run that is just starting.

    Args:
        directory: The run directory.
        has_rows: Whether it has metrics.
    """
    if os.path.isfile(directory / "done.json"):
        return "finished"
    try:
        process = int((directory / "lock").read_text("ascii")) if os.path.isfile(directory / "lock") else 0
        if process <= 0:  # os.kill would mean a group of processes
            raise ValueError
        os.kill(process, 0)
    except PermissionError:  # a process of another user
        return "training"
    except (OSError, ValueError, OverflowError):
        return "stopped" if has_rows or os.path.exists(directory / "lock") else "preparing"
    return "training"


def board_routes(board: Board) -> list[BaseRoute]:
    """Return the routes of a board."""

    async def runs(request: Request) -> Response:
        return JSONResponse({"runs": await asyncio.to_thread(board.summaries)})

    async def metrics(request: Request) -> Response:
        first, version = (_number(request.query_params, name) for name in ("from", "version"))
        return JSONResponse(await asyncio.to_thread(board.metrics, request.path_params["name"], first, version))

    return [Route("/runs", runs), Route("/runs/{name:path}/metrics", metrics)]


def _number(query: Mapping[str, str], name: str) -> int:
    text = query.get(name, "0")
    if not text.isascii() or not text.isdecimal() or len(text) > 12:
        raise ApiError(400, f"{name}={text[:20]!r}: give a row number from 0 on", param=name)
    return int(text)
