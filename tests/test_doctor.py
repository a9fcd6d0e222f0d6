"""The doctor says what training will do."""

import pytest
import torch

from firth import doctor
from firth.train import precision
from firth.types import UserError


def test_rows_are_there_and_agree_with_what_training_chooses() -> None:
    rows = {row.name: row for row in doctor.doctor()}
    assert list(rows) == ["Python", "torch", "cores", "fp32", "bf16", "malloc", "denormals", "memory", "disk", "device"]
    assert rows["torch"].value == torch.__version__
    assert rows["device"].value.startswith(doctor.device().type)
    assert f"use {precision.choose('auto', torch.device('cpu'))}" in rows["bf16"].advice
    total, free = doctor.memory()
    assert 0 < free <= total


def test_the_advice_follows_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    for bf16, wanted in ((60e9, "4.2 times slower"), (250e9, "not worth its rounding"), (500e9, "2.0 times as fast")):
        monkeypatch.setattr(precision, "measured_speed", lambda bf16=bf16: {"fp32": 250e9, "bf16": bf16})
        assert wanted in next(row for row in doctor.doctor() if row.name == "bf16").advice


def test_what_is_wrong_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "memory", lambda: (4 << 30, 1 << 30))
    monkeypatch.setattr(doctor, "usable_cores", lambda: 0)
    wrong = {row.name for row in doctor.doctor() if not row.well}
    assert {"memory", "cores"} <= wrong


@pytest.mark.parametrize(("local", "index"), [(None, 0), ("0", 0), ("1", 1)])
def test_each_rank_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch, local: str | None, index: int) -> None:
    """Every rank took GPU 0: the number that torchrun gives was never read."""
    current = [0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.__setitem__(0, device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert doctor.device() == torch.device("cuda", index)
    assert current == [index]


def test_a_rank_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"process 2 of this machine has no GPU .* --nproc-per-node 2\)"):
        doctor.device()
