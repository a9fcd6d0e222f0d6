"""Calibrate a law on a text by one short run on it: how hard the text is for this recipe and vocabulary is measured, not assumed."""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from firth.io.integrity import read_done
from firth.runs.recipe import Recipe
from firth.runs.run import run
from firth.scaling.fit import Estimate
from firth.scaling.fitted import FittedLaw, LawPoint
from firth.scaling.sizes import planned_recipe
from firth.types import LogLine, UserError


@dataclass(frozen=True)
class Calibration:
    """A short run on the text of a plan.

    Args:
        point: Where the law is read for it.
        measured: Its bits per byte on held-out text.
    """

    point: LawPoint
    measured: float

    def bits(self, law: FittedLaw, point: LawPoint) -> Estimate:
        """Return the bits per byte of a longer run: those of the short one, times the ratio of the two by the law."""
        return law.ratio(point, self.point).times(self.measured)


def calibrate(base: Recipe, width: int, steps: int, point: LawPoint, log: LogLine) -> Calibration:
    """Train a short run in a temporary directory.

    Args:
        base: The recipe of the plan.
        width: Width of the model.
        steps: Optimizer steps.
        point: Where the law is read for this run.
        log: Receives messages.

    Raises:
        UserError: The run reports no bits per byte.
    """
    recipe = dataclasses.replace(planned_recipe(base, width, steps), sample_prompts=(), loggers=())
    log(f"calibration: width {width}, {steps} steps")
    with tempfile.TemporaryDirectory(prefix="firth-") as place:
        run(recipe, Path(place) / "run", log=lambda _: None)
        done = read_done(Path(place) / "run")
    bits = (done or {}).get("metrics", {}).get("valid/bits_per_byte")
    if bits is None or not np.isfinite(bits):
        raise UserError("the calibration run reports no bits per byte of held-out text: plan without --calibrate")
    log(f"calibration: {bits:.3f} bits per byte")
    return Calibration(point, float(bits))
