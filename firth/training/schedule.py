"""The training budget and the learning rate schedule.

Both are functions of one number, the fraction of the run that has passed. So a budget can be in steps, in seconds or in
counted FLOPs (for comparisons at equal compute) with the same schedules, and a schedule has no state to save. A warmup in
steps does not depend on the length of the run: runs of several lengths then share their first steps (`firth.scaling.sweep`).

>>> schedule = Schedule("wsd", warmup_ratio=0.1, decay_ratio=0.2)
>>> [round(schedule.factor(f), 2) for f in (0.0, 0.05, 0.1, 0.5, 0.8, 0.9, 1.0)]
[0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]

Cosine: Loshchilov & Hutter 2017 (SGDR, one cycle). Linear: Devlin et al. 2019, appendix A.2. Warmup-stable-decay:
Hu et al. 2024 (MiniCPM), section 4.2; its decay is linear here (not worse according to Haegele et al. 2024).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from firth.fields import NonNegativeFloat, NonNegativeInt, Share, Validated
from firth.types import UserError


@dataclass(frozen=True)
class Budget(Validated, section="budget"):
    """How long to train; exactly one field is set.

    A budget in seconds depends on the speed of the machine, so the run cannot be repeated bit for bit. One in FLOPs
    (`firth.model.flops`) can: the run ends with the first step that reaches it.

    Args:
        max_steps: Optimizer steps.
        max_seconds: Seconds of training time.
        max_flops: FLOPs of counted work.
    """

    max_steps: NonNegativeInt = 0
    max_seconds: NonNegativeFloat = 0.0
    max_flops: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if sum(value > 0 for value in (self.max_steps, self.max_seconds, self.max_flops)) != 1:
            raise UserError(
                f"the budget has max_steps={self.max_steps}, max_seconds={self.max_seconds:g} and max_flops={self.max_flops:g}: "
                "set exactly one of them to more than 0"
            )

    def passed(self, step: float, seconds: float, flops: float = 0.0) -> float:
        """Return the fraction of the run in [0, 1] that has passed after these steps, seconds and FLOPs."""
        if self.max_steps:
            return min(1.0, step / self.max_steps)
        return min(1.0, seconds / self.max_seconds if self.max_seconds else flops / self.max_flops)


@dataclass(frozen=True)
class Schedule(Validated, section="schedule"):
    """Configuration of the learning rate schedule: a factor on every learning rate.

    Args:
        kind: "cosine", "linear", "wsd" (warmup-stable-decay) or "constant".
        warmup_ratio: Fraction of the run in which the factor rises linearly from 0 to 1.
        decay_ratio: Fraction of the run in which "wsd" decays; the other kinds decay after the warmup.
        min_lr_ratio: The factor at the end.
        warmup_steps: Steps of the warmup in place of `warmup_ratio`, with "wsd" and "constant"; 0 takes `warmup_ratio`.
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_ratio: Share = 0.02
    decay_ratio: Share = 0.4
    min_lr_ratio: Share = 0.0
    warmup_steps: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps:
            if self.kind not in ("wsd", "constant"):
                raise UserError(
                    f"schedule.warmup_steps={self.warmup_steps} fits schedule.kind=wsd or constant, and this one is {self.kind}, "
                    "which decays from the end of the warmup: set schedule.warmup_ratio"
                )
        elif self.kind == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise UserError(
                f"schedule.warmup_ratio={self.warmup_ratio:g} and schedule.decay_ratio={self.decay_ratio:g} add up to more than "
                "the whole run"
            )

    def factor(self, passed: float, step: int = 0) -> float:
        """Return the factor on every learning rate.

        Args:
            passed: The fraction of the run that is done, in the middle of the step.
            step: Steps before this one; read with `warmup_steps` only.
        """
        if self.warmup_steps:
            if step < self.warmup_steps:
                return (step + 0.5) / self.warmup_steps
        elif passed < self.warmup_ratio:
            return passed / self.warmup_ratio
        start = 1 - self.decay_ratio if self.kind == "wsd" else self.warmup_ratio
        decayed = (passed - start) / (1 - start) if passed > start else 0.0
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * _DECAY[self.kind](min(1.0, decayed))


_DECAY: dict[str, Callable[[float], float]] = {
    "cosine": lambda f: (1 + math.cos(math.pi * f)) / 2,
    "linear": lambda f: 1 - f,
    "wsd": lambda f: 1 - f,
    "constant": lambda _: 1.0,
}
