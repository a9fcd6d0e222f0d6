"""Logging of a run: metrics.jsonl, optional loggers, and progress (a bar on a terminal, else messages of the Python logger "firth").

metrics.jsonl has one JSON object per line:

    {"split": "train", "step": 40, "seconds": 12.5, "tokens": 163840, "loss": 4.1, "norm": 0.8, "rate": 0.003,
     "tokens_per_second": 13100, "flops_per_second": 9.2e11, "mfu": 0.41, "flops": 3.7e13, "skipped": 0, "crc": 2310844212}
    {"split": "valid", "step": 40, "seconds": 12.5, "tokens": 163840, "loss": 4.3, "bits_per_byte": 2.2}
    {"split": "rollouts", "step": 41, "seconds": 12.5, "tokens": 163840, "reward": 0.4, "kl_per_answer": 1.2}

    step        optimizer steps so far, this one included
    seconds     training time, without evaluation and checkpoints
    tokens      tokens read so far, without padding
    flops       counted work so far (`firth.model.flops`)
    mfu         model FLOPs utilization: `flops_per_second` over the machine's peak (`firth.training.device`)
    loss        sum of the objective's loss terms, each a mean over its labels in this step, not smoothed. With several terms,
                each one is also logged as `loss/TERM`; other metrics have their own names
    norm        gradient norm before clipping
    rate        `optimizer.lr` times the schedule's factor
    skipped     steps without a finite gradient so far
    crc         checksum of the row (`firth.io.json_files.row_line`), by which a damaged row is detected

A number that is not finite is null. A row of the split "rollouts" describes the answers that the model generated just
before that step. A resumed run removes the rows after its checkpoint and appends, so the file reads as one run.

Optional loggers are TensorBoard, Weights & Biases and MLflow, chosen by `loggers` in the recipe.

    firth train gpt loggers=tensorboard        # tensorboard --logdir runs/gpt
    firth train gpt loggers=[wandb,mlflow]     # WANDB_PROJECT, MLFLOW_TRACKING_URI, ... say where to

Each gets the rows of metrics.jsonl, which is always written. A resumed run continues the same logged run: `loggers.json` in
the run directory keeps the ids of the logged runs, and steps that were logged before the interruption are not logged again.
A logger that raises is turned off with a warning; the run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from firth.io.atomic import write_text
from firth.io.json_files import read_json, read_rows, row_line
from firth.types import LOGGER, UserError

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


T = TypeVar("T")

RUN_IDS = "loggers.json"
"""File in the run directory: logger -> id of its logged run."""


class MetricsLogger(Protocol):
    """Receives the metrics of a run. Any method may raise; the logger is then turned off."""

    def start(self, name: str, recipe: Mapping[str, Any], directory: Path, run_id: str) -> str:
        """Begin a logged run, or continue one.

        Args:
            name: The name of the run.
            recipe: The resolved recipe as plain data.
            directory: The run directory.
            run_id: The id that the first `start` returned, if the run is resumed; else empty.

        Returns:
            The id of the logged run.
        """

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics (`train/loss`, `valid/loss`, ...) at an optimizer step; steps never decrease."""

    def finish(self) -> None:
        """End the logged run."""


class TensorBoardLogger:
    """Writes event files into the run directory."""

    def start(self, name: str, recipe: Mapping[str, Any], directory: Path, run_id: str) -> str:
        from torch.utils.tensorboard import SummaryWriter

        if not run_id:  # a run that ended before its first checkpoint may have left some
            for events in directory.glob("events.out.tfevents.*"):
                events.unlink()
        self._writer = SummaryWriter(directory)
        if not run_id:
            self._writer.add_text("recipe", f"```json\n{json.dumps(recipe, indent=1)}\n```")
        return name

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()  # a killed run keeps its rows

    def finish(self) -> None:
        self._writer.close()


class WandbLogger:
    """Logs to Weights & Biases; the variables of wandb (WANDB_PROJECT, WANDB_MODE, ...) apply."""

    def start(self, name: str, recipe: Mapping[str, Any], directory: Path, run_id: str) -> str:
        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "firth"), name=name, config=dict(recipe), dir=directory,
            id=run_id or secrets.token_hex(4), resume="allow",
        )  # fmt: skip
        return str(self._run.id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self) -> None:
        self._run.finish()


class MLflowLogger:
    """Logs to MLflow; the variables of mlflow (MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME, ...) apply."""

    PARAMS_PER_CALL, MAX_PARAM_CHARACTERS = 100, 500
    """Limits of MLflow's servers."""

    def start(self, name: str, recipe: Mapping[str, Any], directory: Path, run_id: str) -> str:
        import mlflow

        self._mlflow = mlflow
        run = mlflow.start_run(run_id=run_id or None, run_name=None if run_id else name, nested=True)
        if not run_id:
            params = [(key, str(value)[: self.MAX_PARAM_CHARACTERS]) for key, value in _flat(recipe)]
            for first in range(0, len(params), self.PARAMS_PER_CALL):
                mlflow.log_params(dict(params[first : first + self.PARAMS_PER_CALL]))
        return str(run.info.run_id)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(metrics), step=step)

    def finish(self) -> None:
        self._mlflow.end_run()


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested mappings with dotted names.

    >>> list(_flat({"seed": 0, "batch": {"size": 16}}))
    [('seed', 0), ('batch.size', 16)]
    """
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


LOGGERS: dict[str, tuple[Callable[[], MetricsLogger], str]] = {
    "tensorboard": (TensorBoardLogger, "tensorboard"),
    "wandb": (WandbLogger, "wandb"),
    "mlflow": (MLflowLogger, "mlflow"),
}
"""Name -> the logger and the module that it needs."""


def check_loggers(names: Sequence[str]) -> None:
    """Raise a UserError if the library of a logger is not installed."""
    for name in names:
        spec = importlib.util.find_spec(LOGGERS[name][1])
        if spec is None or spec.origin is None:  # without origin: a folder of wandb's or mlflow's own files
            raise UserError(f"loggers={name}: {name} is not installed; install it with: pip install 'firth[logging]'")


@contextmanager
def metrics_loggers(
    names: Sequence[str], recipe: Mapping[str, Any], directory: Path, resumed: bool, on_metrics: OnMetrics | None
) -> Iterator[OnMetrics]:
    """Start loggers and yield a function that passes a row of metrics.jsonl on to them; they finish when the context ends.

    Args:
        names: Names in LOGGERS.
        recipe: The resolved recipe as plain data.
        directory: The run directory; the logged run has its name.
        resumed: Whether the run continues from a checkpoint.
        on_metrics: The user's function, which is called with every row.
    """
    ids: dict[str, str] = read_json(directory / RUN_IDS) if names and resumed else {}
    logged = {(row["split"], row["step"]) for row in (read_metrics(directory / FILE) if ids else ())}
    continued = set(ids)
    active = {name: LOGGERS[name][0]() for name in names}

    def attempt(name: str, call: Callable[[MetricsLogger], T]) -> T | None:
        try:
            return call(active[name])
        except Exception as error:  # whatever a logger does, the run goes on
            del active[name]
            LOGGER.warning(
                f"the logger {name} is turned off, because it failed with {type(error).__name__}: {error}; "
                f"{directory / FILE} has all metrics"
            )
            return None

    def pass_on(row: dict[str, Any]) -> None:
        split, step = row["split"], row["step"]
        metrics = {f"{split}/{k}": v for k, v in row.items() if k not in ("split", "step") and v is not None}
        for name in list(active):
            if name not in continued or (split, step) not in logged:
                attempt(name, lambda logger: logger.log(metrics, step))
        if on_metrics is not None:
            on_metrics(row)

    for name in names:
        run_id = ids.get(name, "")
        started = attempt(name, lambda logger, run_id=run_id: logger.start(directory.name, recipe, directory, run_id))  # type: ignore[misc]
        ids |= {name: started} if started else {}
    if names:
        write_text(directory / RUN_IDS, json.dumps(ids) + "\n")
    try:
        yield pass_on
    finally:
        for name in list(active):
            attempt(name, lambda logger: logger.finish())
