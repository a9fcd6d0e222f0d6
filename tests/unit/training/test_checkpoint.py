"""Checkpoints are atomic, every byte is verified, and a full disk loses nothing."""

import errno
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from firth.training import checkpoint
from firth.types import UserError

FILES = {
    "model": {"a.weight": torch.randn(3, 5), "b": torch.randn(2).bfloat16(), "empty": torch.zeros(0, 4)},
    "optimizer": {
        "step/a": torch.tensor(7.0),
        "mask": torch.tensor([True, False]),
        "t": torch.arange(6).view(2, 3).T,
        "ids": torch.tensor([65535, 3], dtype=torch.uint16),
    },
    "source": {},
}


def save(run: Path, step: int, score: float | None = None, seed: int = 0) -> Path:
    layout = {"threads": 1, "world": 1}
    return checkpoint.save(run, step, FILES, {"step": step, "x": seed}, layout=layout, recipe="abc", score=score)


def test_saved_tensors_are_plain_safetensors_and_load_again(tmp_path: Path) -> None:
    path = save(tmp_path, 12)
    assert path == tmp_path / "checkpoints" / "step-000012"
    assert sorted(p.name for p in path.iterdir()) == [
        "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json",
    ]  # fmt: skip
    found = checkpoint.load(path)
    assert (found.state, found.layout, found.recipe) == ({"step": 12, "x": 0}, {"threads": 1, "world": 1}, "abc")
    for name in ("model", "optimizer"):
        library = load_file(path / f"{name}.safetensors")
        for tensors in (found.files[name], library):
            assert tensors.keys() == FILES[name].keys()
            for key, x in FILES[name].items():
                assert tensors[key].dtype == x.dtype
                assert torch.equal(tensors[key], x)
    with safe_open(path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.slow
def test_every_flipped_byte_is_caught(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    flipped = 0
    for name in sorted(p.name for p in path.iterdir()):
        whole = (path / name).read_bytes()
        for at in range(len(whole)):
            for bit in (1, 0x80):
                changed = bytearray(whole)
                changed[at] ^= bit
                (path / name).write_bytes(changed)
                with pytest.raises(UserError, match=name):
                    checkpoint.load(path)
                flipped += 1
        (path / name).write_bytes(whole[:-1])
        with pytest.raises(UserError, match=name):
            checkpoint.load(path)
        (path / name).unlink()
        with pytest.raises(UserError, match=name):
            checkpoint.load(path)
        (path / name).write_bytes(whole)
    assert flipped > 2000
    checkpoint.load(path)


def test_newest_loads_the_last_valid_one_and_names_the_others(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-000020").mkdir()
    state = tmp_path / "checkpoints" / "step-000010" / "state.json"
    state.write_text(state.read_text().replace("0", "1"))
    messages: list[str] = []
    found = checkpoint.newest(tmp_path, messages.append)
    assert found is not None
    assert found.path.name == "step-000002"
    assert len(messages) == 2
    assert "step-000020" in messages[0]
    assert "the manifest is missing" in messages[0]
    assert "step-000010/state.json" in messages[1]
    assert checkpoint.newest(tmp_path / "nothing", messages.append) is None


def test_a_damaged_checkpoint_is_replaced(tmp_path: Path) -> None:
    path = save(tmp_path, 5, seed=1)
    (path / "manifest.json").unlink()
    save(tmp_path, 5, seed=2)
    assert checkpoint.load(path).state["x"] == 2
    assert [p.name for p in path.parent.iterdir()] == ["step-000005"]


def test_prune_keeps_the_last_and_the_best(tmp_path: Path) -> None:
    for step, score in enumerate((3.0, 1.0, 2.0, None, 2.5), start=1):
        save(tmp_path, step, score)
        checkpoint.prune(tmp_path, keep=2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000004", "step-000005"]


def fails_after(calls: int, number: int) -> Callable[[int], None]:
    """Return an fsync that raises the error `number` after so many calls."""
    real, remaining = os.fsync, [calls]

    def fsync(handle: int) -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise OSError(number, os.strerror(number))
        real(handle)

    return fsync


@pytest.mark.parametrize("calls", range(5))
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint.os, "fsync", fails_after(calls, errno.ENOSPC))
    with pytest.raises(UserError, match=r"step-000002: not enough disk space .* it resumes from step-000001") as error:
        save(tmp_path, 2)
    assert "\n" not in str(error.value)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    checkpoint.load(tmp_path / "checkpoints" / "step-000001")


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))  # the kernel cuts the file there
    try:
        with pytest.raises(UserError, match="not enough disk space"):
            save(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_other_write_errors_are_not_reported_as_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint.os, "fsync", fails_after(1, errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        save(tmp_path, 2)
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_partial_checkpoints_are_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "checkpoints" / "step-000002.partial").mkdir()
    (tmp_path / "checkpoints" / "step-000002.partial" / "model.safetensors").write_bytes(b"half")
    checkpoint.remove_partial(tmp_path)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]


def test_a_newer_format_is_rejected(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    body = json.loads((path / "manifest.json").read_text()) | {"format": 2}
    del body["manifest"]
    body["manifest"] = checkpoint._digest(body)
    (path / "manifest.json").write_bytes(checkpoint._json(body))
    with pytest.raises(UserError, match="format 2"):
        checkpoint.load(path)
