"""The loop: steps until the run is long enough. (First version.)"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from firth.train.optimizer import Mover, Optimizer
from firth.train.schedule import Length, Schedule
from firth.train.step import step as train_step

if TYPE_CHECKING:
    from firth.data.batch import Batches
    from firth.model.lm import LM
    from firth.objectives.objective import Objective

Evaluate = Callable[["LM", int], dict[str, float]]
"""Measures the model at a step: name -> number."""


@dataclass(frozen=True)
class Trained:
    """What a run came to."""

    step: int
    seconds: float
    metrics: dict[str, float]


def train(
    model: LM,
    objective: Objective,
    batches: Batches,
    directory: Path,
    *,
    length: Length,
    optimizer: Optimizer = Optimizer(),
    schedule: Schedule = Schedule(),
    evaluate: Evaluate | None = None,
    evaluate_every: int = 0,
    log_every: int = 10,
) -> Trained:
    """Train `model` in place."""
    directory.mkdir(parents=True, exist_ok=True)
    mover = Mover(optimizer, model)
    model.train()
    start, step, metrics = time.monotonic(), 0, {}
    with open(directory / "metrics.jsonl", "a") as log:
        while (passed := length.passed(step, time.monotonic() - start)) < 1:
            batches.source.prepare(model, step)
            metrics = {k: float(v) for k, v in train_step(model, objective, batches.batches(step)).items()}
            metrics["norm"] = float(mover.clip())
            mover.move(schedule.factor(passed))
            step += 1
            last = length.passed(step, time.monotonic() - start) >= 1
            if evaluate and (last or (evaluate_every and step % evaluate_every == 0)):
                model.eval()
                metrics |= evaluate(model, step)
                model.train()
            if step % log_every == 0 or last:
                print(step, metrics, flush=True)
                log.write(json.dumps({"step": step, "seconds": time.monotonic() - start} | metrics) + "\n")
    return Trained(step, time.monotonic() - start, metrics)
