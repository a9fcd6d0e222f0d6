"""The text cache: the files of a run are opened once, and their hashes are those of their bytes."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import resource
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import zstandard

from firth.corpora import readers
from firth.data import text_cache
from firth.data.text_cache import ReadOnce, read_once
from firth.runs.input_hashes import RunInputs
from firth.runs.prepare import RunData
from firth.runs.recipe import load
from firth.runs.tokenizer import tokenizer_of

TEXT = "the film {} is good, and so is the book that it was made of\n\n"


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """40 documents in every kind of file that is read as a stream."""
    made = tmp_path / "texts"
    made.mkdir()
    for i in range(30):
        (made / f"{i:02d}.txt").write_text(TEXT.format(i) * 3)
    (made / "a.txt.gz").write_bytes(gzip.compress(TEXT.format("a").encode() * 9) + gzip.compress(b"more"))
    (made / "b.txt.zst").write_bytes(zstandard.compress(TEXT.format("b").encode() * 9))
    (made / "c.jsonl").write_text("".join(json.dumps({"text": TEXT.format(f"c{i}")}) + "\n" for i in range(8)))
    yield made
    text_cache.forget()


OPENED: list[str] = []


def _note(event: str, args: tuple[object, ...]) -> None:
    if event == "open":
        OPENED.append(str(args[0]))


def opened(folder: Path) -> Counter[int]:
    """Count files by how often they were opened."""
    found = Counter(path for path in OPENED if path.startswith(str(folder)))
    return Counter(found.values())


@pytest.mark.parametrize("given", [False, True])
def test_a_run_opens_each_file_once(folder: Path, tmp_path: Path, given: bool) -> None:
    """With an existing tokenizer, the text is hashed before it is read."""
    settings = [f"data.path={folder}", "tokenizer.vocab_size=400", "data.validation_fraction=0.2"]
    if given:
        tokenizer_of(load("gpt", settings), tmp_path / "first", lambda _: None)
        settings.append(f"tokenizer.path={tmp_path / 'first' / 'tokenizer'}")
        text_cache.forget()
    recipe, directory = load("gpt", settings), tmp_path / "run"
    directory.mkdir()
    if not OPENED:
        sys.addaudithook(_note)  # cannot be removed: it costs a list entry per opened file
    OPENED.clear()
    inputs = RunInputs.read(recipe, directory, lambda _: None)
    tokenizer = tokenizer_of(recipe, directory, lambda _: None, inputs)
    train, valid = RunData(recipe.data, tokenizer, directory).stores()
    assert opened(folder) == {1 + given: 33}
    assert valid is not None and len(train) + len(valid) == 40
    for path in folder.iterdir():
        status = path.stat()
        known = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
        assert inputs.files[str(path)] == [*known, hashlib.sha256(path.read_bytes()).hexdigest()]
    assert os.listdir(directory / "data") != []
    assert not [p for p in directory.rglob("*") if p.is_file() and "tmp" in p.name]  # the copy has no name


def test_other_ranks_hash_the_text_without_reading_it(folder: Path, tmp_path: Path) -> None:
    recipe = load("gpt", [f"data.path={folder}", "tokenizer.vocab_size=400"])
    inputs = RunInputs.read(recipe, tmp_path, lambda _: None, first={})
    assert not text_cache._cache
    assert inputs == RunInputs.read(recipe, tmp_path, lambda _: None)
    assert len(text_cache._cache) == 1


def test_copied_documents_equal_the_originals(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = list(readers.documents([str(folder)]))
    for memory in (1 << 20, 100):
        monkeypatch.setattr(text_cache, "MEMORY_BYTES", memory)
        found = ReadOnce([str(folder)], "text", "file", 0.2, folder.parent)
        assert list(found.documents()) == plain
        train_documents, held = list(found.documents(False)), list(found.documents(True))
        assert held and sorted(train_documents + held) == sorted(plain)
        assert {d.name for d in held} == found.held.names


def test_a_file_that_has_changed_is_read_again(folder: Path) -> None:
    first = read_once([str(folder)], field="text", split="file")
    assert read_once([str(folder)], field="text", split="file") is first
    (folder / "00.txt").write_text("other words")
    assert next(read_once([str(folder)], field="text", split="file").documents()).text == "other words"


def test_files_are_read_again_if_the_disk_is_full(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_cache, "MEMORY_BYTES", 100)
    plain = list(readers.documents([str(folder)]))
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, was[1]))
    try:
        found = ReadOnce([str(folder)], "text", "file", 0.2, folder.parent)
        assert list(found.documents()) == plain
        assert len(list(found.documents(True))) == len(found.held.names)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
