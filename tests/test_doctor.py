"""The doctor says what training will do."""

import pytest
import torch

from firth import doctor
from firth.train import precision


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
