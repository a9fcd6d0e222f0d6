"""Metrics of a run (metrics.jsonl), and its progress: a bar on a terminal, else messages of the Python logger "firth".

metrics.jsonl has one JSON object per line:

    {"split": "train", "step": 40, "seconds": 12.5, "tokens": 163840, "loss": 4.1, "norm": 0.8, "rate": 0.003,
     "tokens_per_second": 13100, "flops_per_second": 9.2e11, "flops": 3.7e13, "skipped": 0, "crc": 2310844212}
    {"split": "valid", "step": 40, "seconds": 12.5, "tokens": 163840, "loss": 4.3, "bits_per_byte": 2.2}
    {"split": "rollouts", "step": 41, "seconds": 12.5, "tokens": 163840, "reward": 0.4, "kl_per_answer": 1.2}

    step        optimizer steps so far, this one included
    seconds     training time, without evaluation and checkpoints
    tokens      tokens read so far, without padding
    flops       counted work so far (`firth.model.flops`)
    loss        sum of the objective's loss terms, each a mean over its labels in this step, not smoothed. With several terms,
                each one is also logged as `loss/TERM`; other metrics have their own names
    norm        gradient norm before clipping
    rate        `optimizer.lr` times the schedule's factor
    skipped     steps without a finite gradient so far
    crc         checksum of the row (`firth.io.json_files.row_line`), by which a damaged row is detected

A number that is not finite is null. A row of the split "rollouts" describes the answers that the model generated just before
that step. A resumed run removes the rows after its checkpoint and appends, so the file reads as one run.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from firth.io.atomic import write_text
from firth.io.json_files import read_rows, row_line
from firth.types import LOGGER

OnMetrics = Callable[[dict[str, Any]], None]
"""A user's function that is called with each row of metrics: "split", "step", "seconds", "tokens" and the metrics by name."""


FILE = "metrics.jsonl"


class MetricsLog:
    """Writes metrics.jsonl into a run directory.

    Args:
        directory: The run directory.
        step: The last step that is kept; rows after it are removed.
        on_row: Called with each row as it is written.
    """

    def __init__(self, directory: Path, step: int, on_row: OnMetrics | None = None):
        path = directory / FILE
        keep_until(path, step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._on_row = on_row

    def row(self, split: str, step: int, seconds: float, tokens: int, values: Mapping[str, float]) -> None:
        """Append a row; it is flushed to the kernel on return.

        Args:
            split: "train", "valid" or "rollouts".
            step: Optimizer steps so far.
            seconds: Training time so far.
            tokens: Tokens read so far.
            values: The metrics.
        """
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        position: dict[str, Any] = {"split": split, "step": step, "seconds": round(seconds, 3), "tokens": tokens}
        self._file.write(row_line(position | finite))
        self._file.flush()
        if self._on_row is not None:
            self._on_row(position | finite)

    def close(self) -> None:
        self._file.close()


def keep_until(path: Path, step: int) -> None:
    """Remove the rows of metrics.jsonl after `step`, and an incomplete last line of a killed run."""
    if path.exists():
        write_text(path, "".join(row_line(row) for row in read_metrics(path) if row["step"] <= step))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl without an incomplete last line; none if there is no file."""
    return read_rows(
        path, {"split": str, "step": int}, "remove the line, or delete the file: only reports need it", cut=True
    )


class ProgressReporter(Protocol):
    """Receives the progress of a run."""

    def progress(self, passed: float, text: str) -> None:
        """Update the progress line; `passed` is the fraction of the run that is done."""

    def log(self, text: str) -> None:
        """Log a message."""

    def close(self) -> None: ...


class NullReporter:
    """Reports nothing: for ranks above 0, and for callers that report progress themselves."""

    def progress(self, passed: float, text: str) -> None: ...

    def log(self, text: str) -> None: ...

    def close(self) -> None: ...


class LineReporter:
    """Logs plain lines: the first progress, the last, and at most one in `every` seconds.

    Args:
        name: The start of every line.
        every: Seconds between progress lines.
    """

    def __init__(self, name: str, every: float = 10.0):
        self.name, self.every, self.logged_at = name, every, -math.inf

    def progress(self, passed: float, text: str) -> None:
        now = time.monotonic()
        if now - self.logged_at >= self.every or passed >= 1:
            self.logged_at = now
            LOGGER.info(f"{self.name} {100 * passed:3.0f}%  {text}")

    def log(self, text: str) -> None:
        LOGGER.info(f"{self.name} {text}")

    def close(self) -> None: ...


class BarReporter:
    """Draws a progress bar on a terminal with rich, which is imported here because its import takes 0.05 s."""

    def __init__(self, name: str):
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._bar = Progress(
            TextColumn(name), BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}")
        )
        self._task = self._bar.add_task("", total=1.0)
        self._bar.start()

    def progress(self, passed: float, text: str) -> None:
        self._bar.update(self._task, completed=passed, description=text)

    def log(self, text: str) -> None:
        LOGGER.info(text)  # rich prints above the bar what is written to standard output

    def close(self) -> None:
        self._bar.stop()


def make_reporter(name: str) -> ProgressReporter:
    """Return a progress bar on a terminal; elsewhere progress is logged."""
    return BarReporter(name) if sys.stdout.isatty() else LineReporter(name)


def short(n: float) -> str:
    """Format a number with three digits and a unit prefix.

    >>> short(4310), short(2.96e11), short(87)
    ('4.31k', '296G', '87')
    """
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(n) < 999.5 or unit == "P":
            return f"{n:.3g}{unit}"
        n /= 1000
    raise AssertionError


def clock(seconds: float) -> str:
    """Format seconds as a clock.

    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
