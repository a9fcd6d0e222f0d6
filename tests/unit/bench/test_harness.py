"""Arithmetic of the benchmarks: turns, ratios, noisy rounds and the time at which a curve crosses a loss."""

from __future__ import annotations

import time

import pytest

from bench import harness
from bench.harness import EndSample, Report, Sample, compare, other_load
from bench.speed.time_to_loss import Result, Run

SECOND = 0.05


def quick(end_sample: EndSample) -> None:
    """Do 100 units in a twentieth of a second."""
    while True:
        time.sleep(SECOND)
        end_sample(100)


def slow(end_sample: EndSample) -> None:
    """Do the same in three times the time, after a long setup that must not be timed."""
    time.sleep(10 * SECOND)
    while True:
        time.sleep(3 * SECOND)
        end_sample(100)


def failing(end_sample: EndSample) -> None:
    end_sample(1)
    raise ZeroDivisionError("an error of the candidate")


@pytest.mark.slow
def test_ratio_of_two_sleepers_without_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "MAX_OTHER_LOAD", 2.0)  # other load does not slow a sleeper down
    monkeypatch.setattr(harness, "machine", dict)
    report = compare({"slow": slow, "quick": quick}, rounds=3, peer="slow")
    assert len(report.rounds) == 3
    middle, low, high = report.ratio("quick")
    assert 2.2 < low <= middle <= high < 3.5
    assert report.ratio("slow", "quick")[0] == pytest.approx(1 / middle, rel=0.2)
    assert all(5 < mb < 20_000 for mb in report.peak_mb.values())


@pytest.mark.slow
def test_a_failing_candidate_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "machine", dict)
    with pytest.raises(RuntimeError, match="'failing' ended before its sample was over"):
        compare({"failing": failing}, rounds=2, peer="failing")


@pytest.mark.slow
def test_noisy_rounds_are_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = iter([0.9, 0.9, 0.0, 0.5, 0.0, 0.0])  # warm-up, then a round whose second sample is noisy, a clean round
    monkeypatch.setattr(harness, "other_load", lambda *_: next(shares))
    monkeypatch.setattr(harness, "machine", dict)
    report = compare({"quick": quick, "slow": slow}, rounds=1, peer="slow")
    assert (len(report.rounds), report.discarded) == (1, 1)


def test_the_ratio_is_the_median_over_rounds() -> None:
    rounds = [(1.0, 2.0), (10.0, 10.0), (3.0, 12.0)]  # (theirs, ours): ratios 2, 1, 4
    report = Report("tokens", "theirs")
    report.rounds = [{"theirs": Sample(a, 1.0, 0.0), "ours": Sample(b, 1.0, 0.0)} for a, b in rounds]
    assert report.ratio("ours") == (2.0, 1.0, 4.0)


def test_cpu_share_of_other_processes() -> None:
    cores = harness.os.cpu_count() or 1
    assert other_load(10.0, 10.0 + cores, own=cores / 2, seconds=1.0) == pytest.approx(0.5)
    assert other_load(10.0, 10.9, own=1.0, seconds=1.0) == 0  # clock resolution
    assert other_load(None, None, own=1.0, seconds=1.0) is None


def test_time_at_which_a_curve_reaches_a_loss() -> None:
    curve = [(10.0, 5, 6.0), (20.0, 10, 5.0), (40.0, 20, 5.5), (60.0, 30, 4.0)]
    result = Result(Run("firth", 60.0, 0, None), curve, parameters=1, others=0.0)
    assert result.reaches(7.0) == 10.0  # at the first mark or before, which is reported as the mark
    assert result.reaches(5.25) == pytest.approx(17.5)
    assert result.reaches(4.75) == pytest.approx(50.0)
    assert result.reaches(3.9) is None
    assert result.final == 4.0
