"""Writes are atomic, and errors of the operating system become one line that names the right path."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from firth.io.atomic import make_directory, new_directory, new_file, write_text
from firth.io.integrity import sealed, verify
from firth.io.safetensors import safetensors_blocks
from firth.types import UserError


@contextmanager
def full_disk(size: int = 100) -> Iterator[None]:
    """Limit the size of files to `size` bytes: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_text(file, "old")
    with full_disk(), pytest.raises(UserError, match=r"a\.json: .*; free some room and run the same command again$"):
        write_text(file, "x" * 1000)
    assert file.read_text() == "old" and list(tmp_path.iterdir()) == [file]


def test_a_full_disk_leaves_the_old_directory(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with new_directory(place) as partial:
        (partial / "a").write_text("old")
    with full_disk(), pytest.raises(UserError, match=r"model: .*free some room"), new_directory(place) as partial:
        (partial / "a").write_text("x" * 1000)
    assert (place / "a").read_text() == "old" and list(tmp_path.iterdir()) == [place]
    with new_directory(place) as partial:
        (partial / "b").write_text("new")
    assert [p.name for p in place.iterdir()] == ["b"] and list(tmp_path.iterdir()) == [place]


KILLED = """
import os, signal, sys
from pathlib import Path
from firth.io.atomic import new_directory
with new_directory(Path(sys.argv[1])) as partial:
    (partial / "half").write_text("x")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_files_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    place = tmp_path / "out"
    done = subprocess.run([sys.executable, "-c", KILLED, str(place)], check=False)
    assert done.returncode == -signal.SIGKILL and [p.name[:13] for p in tmp_path.iterdir()] == [".out.partial-"]
    with new_directory(place) as partial, new_directory(place):  # the directory of a live writer is kept
        assert partial.exists() and len(list(tmp_path.iterdir())) == 2
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize(
    ("name", "cure"), [("file/run", "a file is where a directory should be"), ("file", "a file is"), ("n" * 300, "choose a shorter name")]
)  # fmt: skip
def test_a_directory_that_cannot_be_created(name: str, cure: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=cure) as error:
        make_directory(tmp_path / name)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    with pytest.raises(UserError, match=cure), new_directory(tmp_path / name):
        pass


def test_an_error_on_an_input_names_the_input(tmp_path: Path) -> None:
    given = tmp_path / "given"
    given.mkdir()
    with pytest.raises(UserError, match=rf"^{given}: is a directory"), new_file(tmp_path / "out"):
        given.open("wb")
    with pytest.raises(UserError, match=rf"^{tmp_path / 'missing'}: no such file"), new_file(tmp_path / "out"):
        (tmp_path / "missing").read_bytes()


def test_every_bit_flip_is_detected(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(os.urandom(64))
    record = sealed({"shape": [1, (2, 3)], "name": "ü"}, tmp_path, ["a"])
    verify(record, tmp_path, tmp_path / "record", "cure")
    whole = (tmp_path / "a").read_bytes()
    for bit in range(0, 512, 7):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "a").write_bytes(flipped)
        with pytest.raises(UserError, match=r"content hash differs\): cure"):
            verify(record, tmp_path, tmp_path / "record", "cure")
    (tmp_path / "a").write_bytes(whole)
    for wrong in ({"name": "u"}, {"files": {}}, {"digest": "0"}, {"more": 1}):
        with pytest.raises(UserError, match="digest differs"):
            verify(record | wrong, tmp_path, tmp_path / "record", "cure")


def test_tensors_are_aligned_and_the_library_reads_them(tmp_path: Path) -> None:
    state = {
        "odd": torch.arange(3, dtype=torch.uint8), "f": torch.randn(2, 3), "d": torch.randn(3).double(),
        "none": torch.zeros(0, 4), "b": torch.randn(5).bfloat16(), "turned": torch.randn(3, 2).t(),
    }  # fmt: skip
    file = tmp_path / "a.safetensors"
    file.write_bytes(b"".join(bytes(block) for block in safetensors_blocks(state)))
    with safe_open(file, "pt") as found:
        assert all(torch.equal(found.get_tensor(name), x) for name, x in state.items())
