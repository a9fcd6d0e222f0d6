"""The board of runs: what each run is doing, and its metrics as they are written.

    GET /runs                              [{"name", "state", "step", ...}, ...]
    GET /runs/{name}/metrics?from=N        {"rows": [...], "next": M, "restarted": false}

A run is a directory with `recipe.yaml` or `metrics.jsonl`. Directories are looked for at every request, so runs that begin later
appear. metrics.jsonl is read from where the last request ended; a line that is not complete yet is left for the next one. A resumed
run removes the rows after its checkpoint: the client then reads from the first row again.
"""

from __future__ import annotations

import asyncio
import json
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
from firth.serve.errors import ApiError
from firth.training.logging import FILE
from firth.types import UserError

RUN_FILES = ("recipe.yaml", FILE)
"""Files by which a directory is a run."""
MAX_DEPTH = 3
"""Levels of directories below the given ones in which runs are looked for: RUNS/PIPELINE/STAGE."""
MAX_RUNS = 500
"""Most runs on a board."""
MAX_TRAIN_ROWS = 2000
"""Most rows of training steps in a response; of more, every k-th is sent. Rows of other splits are all sent."""
MAX_READ_BYTES = 64 << 20
"""Most bytes of metrics.jsonl that are read at once."""


@dataclass
class MetricsFile:
    """The rows of a metrics.jsonl that is being written.

    Args:
        path: The file.
        rows: Rows so far.
        offset: The byte after the last complete line that was read.
        last_line: This line, by which a rewritten file is noticed.
        version: How many times the file was read from its beginning again.
    """

    path: Path
    rows: list[dict[str, Any]] = field(default_factory=list)
    offset: int = 0
    last_line: bytes = b""
    version: int = 0

    def update(self) -> None:
        """Read the complete lines that were added. A line that is no row of metrics is skipped."""
        try:
            with self.path.open("rb") as file:
                if not self._continues(file):
                    self.rows, self.offset, self.last_line, self.version = [], 0, b"", self.version + 1
                file.seek(self.offset)
                added = file.read(MAX_READ_BYTES)
        except FileNotFoundError:
            return
        complete = added[: added.rfind(b"\n") + 1]
        self.offset += len(complete)
        for line in complete.splitlines(keepends=True):
            self.last_line = line
            row = _row(line)
            if row is not None:
                self.rows.append(row)

    def _continues(self, file: Any) -> bool:
        """Return whether the file still has the last line that was read, where it was."""
        file.seek(self.offset - len(self.last_line))
        return bool(file.read(len(self.last_line)) == self.last_line)


def _row(line: bytes) -> dict[str, Any] | None:
    """Return a line as a row without its checksum; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if type(row) is not dict or not isinstance(row.get("step"), int) or not isinstance(row.get("split"), str):
        return None
    row.pop("crc", None)
    return row


def thinned(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows without some training steps, at most MAX_TRAIN_ROWS; the last one is kept."""
    train = [i for i, row in enumerate(rows) if row["split"] == "train"]
    every = -(-len(train) // MAX_TRAIN_ROWS)
    if every <= 1:
        return list(rows)
    kept = set(train[::-1][::every])
    return [row for i, row in enumerate(rows) if row["split"] != "train" or i in kept]


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
        """Return the directory of each run by its name, which is its path as the directories were given."""
        found: dict[str, Path] = {}
        level = [(one, 0) for one in self.directories]
        while level and len(found) < MAX_RUNS:
            directory, depth = level.pop(0)
            if any((directory / name).is_file() for name in RUN_FILES):
                found[str(directory)] = directory
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
            restarted = version != file.version or first > len(file.rows)
            rows = file.rows[0 if restarted else first :]
            return {"rows": thinned(rows), "next": len(file.rows), "version": file.version, "restarted": restarted}

    def _metrics(self, name: str, directory: Path) -> MetricsFile:
        file = self._files.setdefault(name, MetricsFile(directory / FILE))
        file.update()
        return file

    def _summary(self, name: str, directory: Path) -> dict[str, Any]:
        rows = self._metrics(name, directory).rows
        recipe = self._recipe(name, directory / "recipe.yaml")
        budget = recipe.get("budget")
        objective = recipe.get("objective")
        parts = objective if isinstance(objective, list) else [objective]
        kinds = [str(one.get("kind")) if isinstance(one, dict) else str(one) for one in parts if one is not None]
        last = {split: _last(rows, split) for split in ("train", "valid", "rollouts")}
        return {
            "name": name,
            "state": state(directory, bool(rows)),
            "recipe": str(recipe.get("name", "")),
            "objective": " + ".join(kinds),
            "budget": {k: v for k, v in budget.items() if v} if isinstance(budget, dict) else {},
            "step": rows[-1]["step"] if rows else 0,
            "last": {split: row for split, row in last.items() if row is not None},
            "idle_seconds": round(time.time() - _modified(directory), 1),
        }

    def _recipe(self, name: str, path: Path) -> dict[str, Any]:
        """Return the recipe of a run, which is read again after it has changed; empty if it cannot be read."""
        try:
            changed = path.stat().st_mtime
            if self._recipes.get(name, (0.0, {}))[0] != changed:
                found = read_yaml(path)[0]
                self._recipes[name] = (changed, found if isinstance(found, dict) else {})
        except (FileNotFoundError, UserError):  # it is not written yet, or damaged: the metrics are shown anyway
            return {}
        return self._recipes[name][1]


def _last(rows: Sequence[dict[str, Any]], split: str) -> dict[str, Any] | None:
    return next((row for row in reversed(rows) if row["split"] == split), None)


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
    if (directory / "done.json").is_file():
        return "finished"
    try:
        process = int((directory / "lock").read_text("ascii"))
        os.kill(process, 0)
    except PermissionError:  # a process of another user
        return "training"
    except (OSError, ValueError, OverflowError):
        return "stopped" if has_rows or (directory / "lock").exists() else "preparing"
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
