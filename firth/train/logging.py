"""What a run says while it trains: a file that others read, TensorBoard, and a line on the terminal.

metrics.jsonl has one JSON object per line:

    {"split": "train", "step": 40, "seconds": 12.5, "tokens": 163840, "loss": 4.1, "norm": 0.8, "rate": 0.003,
     "tokens_per_second": 13100, "flops_per_second": 9.2e11, "flops": 3.7e13, "skipped": 0, "crc": 2310844212}
    {"split": "valid", "step": 40, "seconds": 12.5, "tokens": 163840, "loss": 4.3, "bits_per_byte": 2.2}
    {"split": "rollouts", "step": 41, "seconds": 12.5, "tokens": 163840, "reward": 0.4, "kl_per_answer": 1.2}

step: optimizer steps behind, this one included. seconds: of training, without evaluation and checkpoints. tokens: real
ones read so far. flops: counted work so far (`firth.model.flops`). loss: the sum of the objective's terms, each a mean
over what it asked in this step (not smoothed). With several terms each is there as `loss/TERM`; measures stand under
their own names. norm: of the gradient before clipping. rate: `optimizer.lr` times the schedule's factor. skipped: steps
without a finite gradient so far. A number that is not finite is null. A row of the split rollouts tells of the answers
that the model wrote just before that step.
crc: a checksum of the row (`firth.io.json_files.row_line`), by which a damaged row is refused; every row has one.
A resumed run drops the rows after its checkpoint and goes on, so the file reads as one run.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from firth.io.atomic import write_text
from firth.io.json_files import read_rows, row_line
from firth.train.tensorboard import TensorBoardWriter


class MetricsLog:
    """metrics.jsonl and an event file in a run directory, from the step after `step` on."""

    def __init__(self, directory: Path, step: int):
        path = directory / "metrics.jsonl"
        keep_until(path, step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115
        self._events = TensorBoardWriter(directory, step + 1)

    def row(self, split: str, step: int, seconds: float, tokens: int, values: Mapping[str, float]) -> None:
        """One line, in the hands of the kernel when this returns."""
        said = {name: value if math.isfinite(value) else None for name, value in values.items()}
        place: dict[str, Any] = {"split": split, "step": step, "seconds": round(seconds, 3), "tokens": tokens}
        self._file.write(row_line(place | said))
        self._file.flush()
        self._events.scalars(step, {f"{split}/{name}": value for name, value in values.items()})

    def close(self) -> None:
        self._file.close()
        self._events.close()


def keep_until(path: Path, step: int) -> None:
    """Drop the rows of metrics.jsonl after `step`, and a last line that a kill has cut."""
    if not path.exists():
        return
    rows = read_rows(
        path, {"split": str, "step": int}, "remove the line, or delete the file: it is for reports alone", cut=True
    )
    write_text(path, "".join(row_line(row) for row in rows if row["step"] <= step))


class ProgressReporter(Protocol):
    """Where progress is told."""

    def progress(self, passed: float, text: str) -> None:
        """`passed`: the fraction of the run behind."""

    def say(self, text: str) -> None:
        """A line that stays."""

    def close(self) -> None: ...


class NullReporter:
    """For ranks above 0, and for callers with a display of their own."""

    def progress(self, passed: float, text: str) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class LineReporter:
    """Plain lines for a file or a pipe: the first progress, the last, and one every `every` seconds."""

    def __init__(self, name: str, every: float = 10.0):
        self.name, self.every, self.told = name, every, -math.inf

    def progress(self, passed: float, text: str) -> None:
        now = time.monotonic()
        if now - self.told >= self.every or passed >= 1:
            self.told = now
            print(f"{self.name} {100 * passed:3.0f}%  {text}", flush=True)

    def say(self, text: str) -> None:
        print(f"{self.name} {text}", flush=True)

    def close(self) -> None: ...


class BarReporter:
    """One moving line on a terminal, drawn by rich (imported here: its import takes a twentieth of a second)."""

    def __init__(self, name: str):
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        self._bar = Progress(
            TextColumn(name), BarColumn(bar_width=20), TaskProgressColumn(), TextColumn("{task.description}")
        )
        self._task = self._bar.add_task("", total=1.0)
        self._bar.start()

    def progress(self, passed: float, text: str) -> None:
        self._bar.update(self._task, completed=passed, description=text)

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def make_reporter(name: str) -> ProgressReporter:
    """A bar on a terminal, lines elsewhere."""
    return BarReporter(name) if sys.stdout.isatty() else LineReporter(name)


def short(n: float) -> str:
    """A number in three digits and a unit's letter.

    >>> short(4310), short(2.96e11), short(87)
    ('4.31k', '296G', '87')
    """
    for unit in ("", "k", "M", "G", "T", "P"):
        if abs(n) < 999.5 or unit == "P":
            return f"{n:.3g}{unit}"
        n /= 1000
    raise AssertionError


def clock(seconds: float) -> str:
    """
    >>> clock(75), clock(3675)
    ('1:15', '1:01:15')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{s:02}" if hours else f"{minutes}:{s:02}"
