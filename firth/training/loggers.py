"""Optional loggers of a run's metrics: TensorBoard, Weights & Biases and MLflow, chosen by `loggers` in the recipe.

    firth train gpt loggers=tensorboard        # tensorboard --logdir runs/gpt
    firth train gpt loggers=[wandb,mlflow]     # WANDB_PROJECT, MLFLOW_TRACKING_URI, ... say where to

Each gets the rows of metrics.jsonl, which is always written. A resumed run continues the same logged run: `loggers.json` in the
run directory keeps the ids of the logged runs, and steps that were logged before the interruption are not logged again. A
logger that raises is turned off with a warning; the run goes on.
"""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from firth.io.atomic import write_text
from firth.io.json_files import read_json
from firth.training.logging import FILE as METRICS
from firth.training.logging import OnMetrics, read_metrics
from firth.types import LOGGER, UserError

T = TypeVar("T")

FILE = "loggers.json"
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
    ids: dict[str, str] = read_json(directory / FILE) if names and resumed else {}
    logged = {(row["split"], row["step"]) for row in (read_metrics(directory / METRICS) if ids else ())}
    continued = set(ids)
    active = {name: LOGGERS[name][0]() for name in names}

    def attempt(name: str, call: Callable[[MetricsLogger], T]) -> T | None:
        try:
            return call(active[name])
        except Exception as error:  # whatever a logger does, the run goes on
            del active[name]
            LOGGER.warning(
                f"the logger {name} is turned off, because it failed with {type(error).__name__}: {error}; "
                f"{directory / METRICS} has all metrics"
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
        write_text(directory / FILE, json.dumps(ids) + "\n")
    try:
        yield pass_on
    finally:
        for name in list(active):
            attempt(name, lambda logger: logger.finish())
