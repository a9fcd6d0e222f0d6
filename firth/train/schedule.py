"""How long a run is, and what part of the full rate each moment of it gets.

Both are functions of one number, the fraction of the run that has passed, so a run can be measured in steps, in wall
seconds or in counted FLOPs (comparisons at equal compute) with the same shapes, and a resumed run needs to remember
nothing.

>>> plan = Schedule("wsd", warmup_ratio=0.1, decay_ratio=0.2)
>>> [round(plan.factor(f), 2) for f in (0.0, 0.05, 0.1, 0.5, 0.8, 0.9, 1.0)]
[0.0, 0.5, 1.0, 1.0, 1.0, 0.5, 0.0]

Cosine: Loshchilov & Hutter 2017 (SGDR, one cycle). Linear: Devlin et al. 2019, appendix A.2. Warmup-stable-decay:
Hu et al. 2024 (MiniCPM), section 4.2; its decay is linear here (Haegele et al. 2024 found no worse).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from firth.types import UserError
from firth.validated import NonNegativeFloat, NonNegativeInt, Ranged, Share


@dataclass(frozen=True)
class Budget(Ranged, section="budget"):
    """How long to train: `steps` optimizer steps, `seconds` of wall time, or `flops` of counted work; exactly one is set.

    A run measured in seconds depends on the speed of its machine, so it cannot be repeated bit for bit. One measured in
    FLOPs (`firth.model.flops`) can: it ends with the first step that reaches them.
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
        """The fraction of the run that has passed after these steps, seconds of training and FLOPs, in [0, 1]."""
        if self.max_steps:
            return min(1.0, step / self.max_steps)
        return min(1.0, seconds / self.max_seconds if self.max_seconds else flops / self.max_flops)


@dataclass(frozen=True)
class Schedule(Ranged, section="schedule"):
    """The factor on every rate, by the fraction of the run that has passed.

    warmup: fraction of the run over which the factor rises linearly from 0 to 1.
    decay: fraction of the run over which "wsd" falls; the other kinds fall from the end of the warmup.
    floor: the factor at the very end.
    """

    kind: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    warmup_ratio: Share = 0.02
    decay_ratio: Share = 0.4
    min_lr_ratio: Share = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind not in _FALL:
            raise UserError(f"schedule.kind is {self.kind!r}: use one of {', '.join(_FALL)}")
        if self.kind == "wsd" and self.warmup_ratio + self.decay_ratio > 1:
            raise UserError(
                f"schedule.warmup_ratio={self.warmup_ratio:g} and schedule.decay_ratio={self.decay_ratio:g} add up to more than the whole run"
            )

    def factor(self, passed: float) -> float:
        """What every rate is multiplied by when the fraction `passed` of the run is behind."""
        if passed < self.warmup_ratio:
            return passed / self.warmup_ratio
        start = 1 - self.decay_ratio if self.kind == "wsd" else self.warmup_ratio
        falling = (passed - start) / (1 - start) if passed > start else 0.0
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * _FALL[self.kind](min(1.0, falling))


_FALL: dict[str, Callable[[float], float]] = {
    "cosine": lambda f: (1 + math.cos(math.pi * f)) / 2,
    "linear": lambda f: 1 - f,
    "wsd": lambda f: 1 - f,
    "constant": lambda _: 1.0,
}
