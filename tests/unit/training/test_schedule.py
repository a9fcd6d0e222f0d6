"""Learning rate schedules, and budgets in steps, seconds and FLOPs."""

import itertools
import math

import pytest

from firth.training.schedule import Budget, Schedule
from firth.types import UserError


@pytest.mark.parametrize("kind", ["cosine", "linear", "wsd", "constant"])
def test_every_kind_warms_up_and_ends_at_the_minimum(kind: str) -> None:
    schedule = Schedule(kind, warmup_ratio=0.1, decay_ratio=0.3, min_lr_ratio=0.1)
    assert schedule.factor(0.0) == 0
    assert schedule.factor(0.05) == pytest.approx(0.5)
    assert schedule.factor(0.1) == pytest.approx(1.0)
    assert schedule.factor(1.0) == pytest.approx(1.0 if kind == "constant" else 0.1)
    after = [schedule.factor(0.1 + 0.9 * i / 200) for i in range(201)]
    assert all(a >= b for a, b in itertools.pairwise(after))


def test_the_middle_of_each_decay() -> None:
    assert Schedule("cosine", warmup_ratio=0.0).factor(0.25) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert Schedule("linear", warmup_ratio=0.2).factor(0.6) == pytest.approx(0.5)
    assert Schedule("wsd", warmup_ratio=0.0, decay_ratio=0.4).factor(0.6) == 1
    assert Schedule("wsd", warmup_ratio=0.0, decay_ratio=0.4).factor(0.9) == pytest.approx(0.25)


def test_a_budget_is_in_steps_seconds_or_flops() -> None:
    assert Budget(max_steps=200).passed(50, 1e9) == 0.25
    assert Budget(max_seconds=60).passed(10**9, 15) == 0.25
    assert Budget(max_seconds=60).passed(0, 61) == 1
    assert Budget(max_flops=1e12).passed(10**9, 1e9, 2.5e11) == 0.25
    for wrong in ({}, {"max_steps": 1, "max_seconds": 1.0}, {"max_seconds": 1.0, "max_flops": 1e9}):
        with pytest.raises(UserError, match="exactly one"):
            Budget(**wrong)


def test_invalid_values_are_rejected_by_name() -> None:
    with pytest.raises(UserError, match=r"schedule.kind='cosin' should be 'cosine', "):
        Schedule("cosin")
    with pytest.raises(UserError, match=r"schedule.warmup_ratio=100 should be less than or equal to 1"):
        Schedule(warmup_ratio=100)
    with pytest.raises(UserError, match="more than the whole run"):
        Schedule("wsd", warmup_ratio=0.5, decay_ratio=0.6)


def test_a_warmup_in_steps_is_the_same_in_runs_of_any_length() -> None:
    short, long = (Schedule("wsd", warmup_steps=7, decay_ratio=share) for share in (0.5, 0.25))
    first = [[one.factor((s + 0.5) / n, s) for s in range(30)] for one, n in ((short, 60), (long, 40))]
    assert first[0] == first[1]  # to the bit
    assert first[0][:8] == [(s + 0.5) / 7 for s in range(7)] + [1.0]
    assert short.factor(0.75, 45) == pytest.approx(0.5)
    assert Schedule("wsd", warmup_steps=7, warmup_ratio=0.9, decay_ratio=0.9).factor(0.05, 3) == 0.5
    with pytest.raises(
        UserError, match=r"schedule.warmup_steps=7 fits schedule.kind=wsd or constant, and this one is cosine"
    ):
        Schedule("cosine", warmup_steps=7)
