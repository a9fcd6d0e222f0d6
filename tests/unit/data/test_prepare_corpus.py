"""`firth prepare`: the same bytes for any number of workers, after a kill and after a full disk; files that are added or changed."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from firth.corpora import readers, remote
from firth.corpora.input_files import ReadStats
from firth.data.corpus import PreparedCorpus, open_stores
from firth.data.filters import FilterConfig
from firth.data.pieces import list_pieces
from firth.data.prepare_corpus import TokenizerChoice, prepare_corpus
from firth.data.prepare_part import PartSettings
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError
from tests.support.tiny_corpus import TEXTS, tokenizer

ROOT = Path(__file__).parents[3]
NO_FILTERS = FilterConfig()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A large file of records, small texts, a compressed file, a Parquet file and an empty file; and a tokenizer."""
    place = tmp_path_factory.mktemp("prepare")
    tokenizer().save(place / "tokenizer")
    text = place / "text"
    text.mkdir()
    (text / "a.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in TEXTS))
    for number, one in enumerate(TEXTS[:6]):
        (text / f"b{number}.txt").write_text(f"Copy {number}. {one}")
    (text / "c.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps({"text": one[::-1]}) + "\n" for one in TEXTS[:9]).encode())
    )
    pyarrow.parquet.write_table(
        pyarrow.table({"text": [one.upper() for one in TEXTS]}), text / "d.parquet", row_group_size=5
    )
    (text / "e.txt").write_text("")
    return place


def prepare(
    folder: Path, out: Path, workers: int = 1, text: str = "text", part_bytes: int = 60_000,
    filters: FilterConfig = NO_FILTERS, log: list[str] | None = None,
) -> PreparedCorpus:  # fmt: skip
    return prepare_corpus(
        [str(folder / text)], out, settings=PartSettings("", validation_fraction=0.1, part_bytes=part_bytes, filters=filters),
        tokenizer=TokenizerChoice(str(folder / "tokenizer")), workers=workers, log=(log if log is not None else []).append,
    )  # fmt: skip


def contents(out: Path) -> dict[str, str]:
    """Return the hash of every file of the parts and of corpus.json."""
    return {
        path.relative_to(out).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in ("lock", "plan.json")
    }


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, str]:
    prepare(folder, folder / "whole")
    return contents(folder / "whole")


def test_workers_change_no_byte(folder: Path, whole: dict[str, str], tmp_path: Path) -> None:
    prepare(folder, tmp_path / "out", workers=3)
    assert contents(tmp_path / "out") == whole
    assert sum(name.endswith("train/tokens.bin") for name in whole) > 5


def test_the_parts_hold_every_document_once(folder: Path, whole: dict[str, str]) -> None:
    t = Tokenizer.load(folder / "tokenizer")
    stored = []
    for store in open_stores([folder / "whole"], t):
        assert store is not None
        offsets = np.asarray(store.offsets)
        stored += [t.decode(store.tokens[a + 1 : b - 1]) for a, b in pairwise(offsets)]
    expected = [document.text for document in readers.documents([str(folder / "text")])]
    assert sorted(stored) == sorted(expected)
    held_out = open_stores([folder / "whole"], t)[1]
    assert held_out is not None and 3 < len(held_out) < 25


def test_large_files_are_cut_between_lines(folder: Path) -> None:
    pieces = [piece for piece in list_pieces([str(folder / "text")], 60_000, ReadStats()) if piece.name == "a.jsonl"]
    raw = (folder / "text" / "a.jsonl").read_bytes()
    assert len(pieces) > 3
    assert b"".join(raw[piece.span[0] : piece.span[1]] for piece in pieces if piece.span) == raw
    assert all(raw[piece.span[1] - 1 :][:1] == b"\n" for piece in pieces if piece.span)
    rows = [
        piece.span for piece in list_pieces([str(folder / "text")], 60_000, ReadStats()) if piece.name == "d.parquet"
    ]
    assert rows[0] is not None and rows[0][0] == 0
    assert [span[0] for span in rows[1:] if span] == [span[1] for span in rows[:-1] if span]


def test_a_second_call_builds_nothing(folder: Path, whole: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folder / "whole", tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")}
    lines: list[str] = []
    prepare(folder, tmp_path / "out", log=lines)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.bin")} == before
    assert f"{len(list((tmp_path / 'out/parts').iterdir()))} parts of" in lines[0]


def test_touched_files_are_hashed_and_kept(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "text", tmp_path / "text")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    prepare(tmp_path, tmp_path / "out")
    tokens = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("tokens.bin")}
    os.utime(tmp_path / "text" / "a.jsonl", (1, 1))
    prepare(tmp_path, tmp_path / "out")
    assert {path: path.stat().st_ino for path in (tmp_path / "out").rglob("tokens.bin")} == tokens


@pytest.mark.parametrize("change", ["removed", "changed"])
def test_a_copy_comes_back_when_its_original_is_gone(folder: Path, tmp_path: Path, change: str) -> None:
    """The copy is in another part, which is complete. A change of the same size keeps the part of the original."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    for number, one in enumerate([*TEXTS[:8], TEXTS[3]]):
        (tmp_path / "text" / f"{number:02d}.txt").write_text(one)
    filters, t = FilterConfig(deduplicate=True), Tokenizer.load(folder / "tokenizer")

    def texts() -> str:
        stores = open_stores([tmp_path / "out"], t)
        return "".join(t.decode(np.asarray(store.tokens)) for store in stores if store is not None)

    first = prepare(tmp_path, tmp_path / "out", part_bytes=10_000, filters=filters)
    assert first.manifest["dropped"] == {"duplicate": 1} and texts().count(TEXTS[3]) == 1
    original = tmp_path / "text" / "03.txt"
    if change == "removed":
        original.unlink()
    else:
        original.write_text(TEXTS[3][::-1])
    second = prepare(tmp_path, tmp_path / "out", part_bytes=10_000, filters=filters)
    assert second.manifest["dropped"] == {} and texts().count(TEXTS[3]) == 1
    assert (TEXTS[3][::-1] in texts()) == (change == "changed")
    before = contents(tmp_path / "out")
    prepare(tmp_path, tmp_path / "out", part_bytes=10_000, filters=filters)
    assert contents(tmp_path / "out") == before


def test_a_corpus_is_outside_of_its_text(folder: Path, tmp_path: Path) -> None:
    """Its own files would be text in the next call."""
    with pytest.raises(UserError, match=r"is inside of .*, all of whose files are prepared"):
        prepare(folder, folder / "text" / "corpus")
    assert not (folder / "text" / "corpus").exists()
    (tmp_path / "out" / "lock").mkdir(parents=True)
    with pytest.raises(UserError, match="this is a directory"):
        prepare(folder, tmp_path / "out")


def test_another_vocabulary_needs_another_directory(folder: Path, tmp_path: Path) -> None:
    def call(size: int) -> PreparedCorpus:
        choice = TokenizerChoice(vocab_size=size)
        return prepare_corpus(
            [str(folder / "text" / "b0.txt")], tmp_path / "out", settings=PartSettings(""), tokenizer=choice, workers=1,
            log=[].append,
        )  # fmt: skip

    content = call(300).content
    assert call(300).content == content
    with pytest.raises(UserError, match="--algorithm byte-bpe --vocab-size 300: repeat these options"):
        call(400)


def test_added_files_add_parts(folder: Path, tmp_path: Path) -> None:
    """Also a file in the middle of the order; the parts that exist keep their bytes, and the sum is all documents."""
    shutil.copytree(folder / "text", tmp_path / "text")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    prepare(tmp_path, tmp_path / "out")
    before = contents(tmp_path / "out")
    (tmp_path / "text" / "b2a.txt").write_text("A new file. " + TEXTS[8])
    corpus = prepare(tmp_path, tmp_path / "out")
    after = contents(tmp_path / "out")
    assert all(after[name] == digest for name, digest in before.items() if name.startswith("parts/"))
    assert (
        len({name.split("/")[1] for name in after if name.startswith("parts/")})
        == len({name.split("/")[1] for name in before if name.startswith("parts/")}) + 1
    )
    assert corpus.manifest["documents"] == 40 + 6 + 9 + 40 + 1


def test_changed_and_removed_files_replace_their_parts(folder: Path, tmp_path: Path) -> None:
    """A change of the same size is found too."""
    shutil.copytree(folder / "text", tmp_path / "text")
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    t = Tokenizer.load(folder / "tokenizer")
    prepare(tmp_path, tmp_path / "out")
    (tmp_path / "text" / "b1.txt").unlink()
    changed = (tmp_path / "text" / "b2.txt").read_text().replace("Copy", "Cops")
    (tmp_path / "text" / "b2.txt").write_text(changed)
    lines: list[str] = []
    prepare(tmp_path, tmp_path / "out", log=lines)
    assert any("1 part of files that have changed or are gone will be replaced" in line for line in lines)
    found = [t.decode(np.asarray(store.tokens)) for store in open_stores([tmp_path / "out"], t) if store is not None]
    assert "Cops 2" in "".join(found) and "Copy 2" not in "".join(found) and "Copy 1" not in "".join(found)


COMMAND = """
import sys
from pathlib import Path
from firth.data.prepare_part import PartSettings
from firth.data.prepare_corpus import TokenizerChoice, prepare_corpus
folder, out = map(Path, sys.argv[1:])
prepare_corpus(
    [str(folder / "text")], out, settings=PartSettings("", validation_fraction=0.1, part_bytes=60_000),
    tokenizer=TokenizerChoice(str(folder / "tokenizer")), workers=2, log=print,
)
"""


@pytest.mark.parametrize("victim", ["all", "worker"])
def test_a_killed_preparation_resumes_to_the_same_bytes(
    victim: str, folder: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, str(folder), str(out)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True)
    complete: list[Path] = []
    while process.poll() is None and not complete:
        complete = list(out.glob("parts/*/part.json"))
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    for child in children[: 2 if victim == "all" else 1]:
        os.kill(int(child), signal.SIGKILL)
    if victim == "all":
        process.kill()
    assert process.stderr is not None
    message = process.stderr.read()
    assert process.wait() != 0
    if victim == "worker":
        assert "a process that prepares text was killed by signal 9" in message
    assert not (out / "corpus.json").exists()
    prepare(folder, out, workers=2)
    assert contents(out) == whole


def test_a_full_disk_is_reported_and_resumed(folder: Path, whole: dict[str, str], tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (45_000, before[1]))  # the workers inherit it
    try:
        with pytest.raises(UserError, match=r"(could not be written|file too large).*free (disk|some)"):
            prepare(folder, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    prepare(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_errors_have_the_line_of_the_whole_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    rows = [json.dumps({"text": one}) for one in TEXTS]
    rows[31] = "{not json"
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(rows))
    with pytest.raises(UserError, match=r"a\.jsonl:32: this line is not JSON: .*fix or remove it"):
        prepare(tmp_path, tmp_path / "out")
    (tmp_path / "text" / "a.jsonl").write_text("\n".join(json.dumps({"text": one}) for one in TEXTS))
    assert prepare(tmp_path, tmp_path / "out").manifest["documents"] == 40


def test_a_torn_part_is_built_again(folder: Path, whole: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folder / "whole", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "parts" / "00001")  # what the error about a damaged part says
    prepare(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_other_settings_need_another_directory(folder: Path, whole: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"was prepared with other settings \(part_bytes\): choose another --out"):
        prepare(folder, folder / "whole", part_bytes=1000)
    (folder / "whole" / "lock").touch()
    with pytest.raises(UserError, match=r"no document|there is no text"):
        prepare(folder, folder / "none", text="text/e.txt")


@pytest.mark.slow
def test_duplicates_are_dropped_alike_for_any_workers(folder: Path, tmp_path: Path) -> None:
    """Copies in other parts, with other blanks; a text with one word changed is a near duplicate. Files that are added change nothing."""
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "text").mkdir()
    for number, one in enumerate(TEXTS[:12]):
        (tmp_path / "text" / f"{number:02d}.txt").write_text(one)
    (tmp_path / "text" / "20.txt").write_text("  " + TEXTS[3].replace("\n", "\n\n "))
    (tmp_path / "text" / "21.txt").write_text(TEXTS[4].replace(" the ", " THAT ", 1))
    filters = FilterConfig(deduplicate=True, near_duplicates=True)
    one = prepare(tmp_path, tmp_path / "one", workers=1, part_bytes=10_000, filters=filters)
    prepare(tmp_path, tmp_path / "three", workers=3, part_bytes=10_000, filters=filters)
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert one.manifest["dropped"] == {"duplicate": 1, "near duplicate": 1}
    assert one.manifest["documents"] == len(list_pieces([str(tmp_path / "text")], 10_000, ReadStats())) - 2
    assert one.manifest["examples"]["duplicate"][0].startswith("20.txt: ")
    before = contents(tmp_path / "one")
    (tmp_path / "text" / "00a.txt").write_text(TEXTS[3])
    again = prepare(tmp_path, tmp_path / "one", workers=2, part_bytes=10_000, filters=filters)
    after = contents(tmp_path / "one")
    assert all(after[name] == digest for name, digest in before.items() if name.startswith("parts/"))
    assert again.manifest["dropped"] == {"duplicate": 2, "near duplicate": 1}


@pytest.mark.slow
def test_an_object_store_gives_the_same_token_ids(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsspec's local file system in the place of a bucket: a directory, a pattern, spans of a large file, and no copies left over."""
    pytest.importorskip("fsspec")

    def prepared(text: str, out: Path) -> PreparedCorpus:
        return prepare_corpus(
            [text], out, settings=PartSettings("", validation_fraction=0.1, part_bytes=60_000),
            tokenizer=TokenizerChoice(str(folder / "tokenizer")), workers=2, log=lambda _: None,
        )  # fmt: skip

    pattern = f"{folder / 'text'}/[a-c]*"
    remote, local = (
        prepared(text, tmp_path / name) for text, name in ((f"file://{pattern}", "remote"), (pattern, "local"))
    )
    assert remote.content == local.content
    assert len(remote.manifest["parts"]) > 3
    assert not list((tmp_path / "remote").rglob("input-*"))
    assert prepared(f"file://{folder / 'text'}", tmp_path / "all").manifest["documents"] == 95


def test_a_file_of_an_object_store_is_read_once(folder: Path) -> None:
    pytest.importorskip("fsspec")
    place = f"file://{folder / 'text'}"
    every = list_pieces([place], 60_000, ReadStats())
    assert list_pieces([place, f"{place}/a.jsonl", f"{place}/b*.txt"], 60_000, ReadStats()) == every
    first = list_pieces([f"{place}/b1.txt", place], 60_000, ReadStats())
    assert len(first) == len(every) and first[0].path.endswith("b1.txt")


def test_a_store_that_ends_the_connection_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(remote, "open_file", lambda _: Broken())
    with pytest.raises(UserError, match=r"^s3://bucket/a\.txt: it cannot be read: Connection reset by peer$"):
        remote.fetch("s3://bucket/a.txt", tmp_path / "a.txt", (0, 10))


def test_errors_of_object_stores_are_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n{bad\n')
    settings = PartSettings("")
    choice = TokenizerChoice(vocab_size=300)

    def refused(text: str, match: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            prepare_corpus([text], tmp_path / "out", settings=settings, tokenizer=choice, log=lambda _: None)
        assert "\n" not in str(error.value)

    refused(f"file://{tmp_path}/a.jsonl", rf"^file://{tmp_path}/a\.jsonl:2: this line is not JSON")
    refused(f"file://{tmp_path}/none.jsonl", r"none\.jsonl: it cannot be read")
    refused("nothing://bucket/a.txt", "nothing")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    refused(
        "s3://bucket/a.txt",
        r"^s3://bucket/a\.txt: reading it needs packages that are not installed: pip install fsspec s3fs$",
    )
