"""`firth doctor` prints what training will use."""

import sys

import pytest
import torch

from firth import doctor, kernel_choice, openmp
from firth.training.device import choose_precision, default_device, memory
from firth.types import UserError


def test_rows_agree_with_the_choices_of_training() -> None:
    rows = {row.name: row for row in doctor.doctor()}
    names = [
        "Python",
        "torch",
        "cores",
        "load",
        "waiting",
        "fp32",
        "bf16",
        "malloc",
        "denormals",
        "compiler",
        *kernel_choice.table(),
        "memory",
        "disk",
        "device",
    ]
    assert list(rows) == names
    assert rows["torch"].value == torch.__version__
    assert rows["device"].value.startswith(default_device().type)
    assert f"use {choose_precision('auto', torch.device('cpu'))}" in rows["bf16"].advice
    total, free = memory()
    assert 0 < free <= total


def test_the_advice_follows_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    for bf16, wanted in ((60e9, "4.2 times slower"), (250e9, "not much faster"), (500e9, "2.0 times as fast")):
        monkeypatch.setattr("firth.training.device.measured_speed", lambda bf16=bf16: {"fp32": 250e9, "bf16": bf16})
        assert wanted in next(row for row in doctor.doctor() if row.name == "bf16").advice


def test_problems_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("firth.training.device.memory", lambda: (4 << 30, 1 << 30))
    monkeypatch.setattr(doctor, "usable_cores", lambda: 0)
    wrong = {row.name for row in doctor.doctor() if not row.ok}
    assert {"memory", "cores"} <= wrong


@pytest.mark.parametrize(("local", "index"), [(None, 0), ("0", 0), ("1", 1)])
def test_each_rank_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch, local: str | None, index: int) -> None:
    """Regression: every rank took GPU 0, since LOCAL_RANK was not read."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert default_device() == torch.device("cuda", index)
    assert current == [index]


def test_a_rank_without_a_gpu_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"process 2 of this machine has no GPU .* --nproc-per-node 2\)"):
        default_device()


@pytest.mark.parametrize(("others", "ok"), [(0.1, True), (1.0, False)])
def test_doctor_says_when_the_machine_is_busy(monkeypatch: pytest.MonkeyPatch, others: float, ok: bool) -> None:
    monkeypatch.setattr(doctor, "usable_cores", lambda: 2)
    monkeypatch.setattr(doctor, "other_load", lambda: others)
    monkeypatch.setattr(doctor, "cpu_pressure", lambda: 24.58)
    row = next(row for row in doctor.doctor() if row.name == "load")
    assert row.value.startswith(f"{others:.1f} of 2 cores are used by other processes; in the last 10 seconds")
    assert "25% of the time" in row.value
    assert row.ok == ok
    assert ("the machine is busy" in row.advice) != ok


def test_load_excludes_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 10 seconds the cores were busy for 17, and this process for 5 of them: 1.2 cores are the others'."""
    if sys.platform != "linux":
        pytest.skip("the load average is all there is here")
    busy, own, clock = iter([100.0, 117.0]), iter([1.0, 6.0]), iter([50.0, 60.0])
    monkeypatch.setattr("firth.training.device._busy_seconds", lambda: next(busy))
    monkeypatch.setattr("firth.training.device.time.process_time", lambda: next(own))
    monkeypatch.setattr("firth.training.device.time.perf_counter", lambda: next(clock))
    assert doctor.other_load(0) == pytest.approx(1.2)


@pytest.mark.parametrize(
    ("given", "effective", "says"),
    [
        ({"GOMP_SPINCOUNT": str(openmp.GOMP_SPINS)}, True, "set by firth"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, True, "set by your environment"),
        ({"GOMP_SPINCOUNT": "7"}, False, "set by your environment"),
        ({}, False, "import firth first"),
    ],
)
def test_doctor_prints_the_wait_policy(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], effective: bool, says: str
) -> None:
    for name in {*openmp.GNU_VARIABLES, *openmp.LLVM_VARIABLES}:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(doctor, "openmp_library", lambda: "libgomp.so.1")
    monkeypatch.setattr(doctor, "other_load", lambda: 0.0)
    monkeypatch.setattr(openmp, "EFFECTIVE", effective)
    row = next(row for row in doctor.doctor() if row.name == "waiting")
    assert row.value == "libgomp.so.1: " + (", ".join(f"{k}={v}" for k, v in given.items()) or "its default")
    assert says in row.advice
    assert row.ok == bool(given)
