"""A corpus in an object store gives the examples of its copy on the disk, reads what it needs, and stays within its space."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from firth.corpora import remote
from firth.corpora.input_files import ReadStats
from firth.corpora.remote import Address
from firth.data import prepare_corpus, stored_arrays
from firth.data.collate import Batches
from firth.data.corpus import PreparedCorpus, is_corpus, open_stores
from firth.data.pieces import list_pieces
from firth.data.prepare_part import PartSettings
from firth.data.windows import ChunksConfig, Documents, WindowsConfig
from firth.runs.recipe import load, published
from firth.runs.run import run
from firth.types import UserError
from tests.support.tiny_corpus import TEXTS, corpus, tokenizer

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("remote")
    corpus(place / "corpus")
    return place


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIRTH_CACHE", str(tmp_path / "cache"))


def in_memory(folder: Path, name: str) -> str:
    """Copy the corpus into fsspec's file system in memory; return its address."""
    fsspec.filesystem("memory").put(str(folder / "corpus"), f"/{name}", recursive=True)
    return f"memory://{name}"


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None, int | None]]:
    """The spans that are read of files in a store."""
    found: list[tuple[str, int | None, int | None]] = []
    read = Address.read_bytes

    def noted(self: Address, start: int | None = None, stop: int | None = None) -> bytes:
        found.append((self.url.rsplit("/", 1)[1], start, stop))
        return read(self, start, stop)

    monkeypatch.setattr(Address, "read_bytes", noted)
    return found


class Ranges(SimpleHTTPRequestHandler):
    """A server of files that sends spans of bytes, as object stores do."""

    def do_GET(self) -> None:
        file, requested = Path(self.translate_path(self.path)), self.headers.get("Range")
        if not file.is_file() or requested is None:
            super().do_GET()
            return
        start, stop = (int(n) for n in requested.removeprefix("bytes=").split("-"))
        raw = file.read_bytes()[start : stop + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(raw)))
        self.send_header("Content-Range", f"bytes {start}-{stop}/{file.stat().st_size}")
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""


@pytest.fixture
def served(folder: Path, request: pytest.FixtureRequest) -> Iterator[str]:
    handler = partial(getattr(request, "param", Ranges), directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def same(address: str, folder: Path) -> None:
    """Assert that windows and chunks of a corpus at an address are those of the directory."""
    assert is_corpus(address)
    assert PreparedCorpus.open(address).content == PreparedCorpus.open(folder / "corpus").content
    vocab = tokenizer().vocab
    for one, other in zip(
        open_stores([address], tokenizer()), open_stores([folder / "corpus"], tokenizer()), strict=True
    ):
        assert one is not None and other is not None
        for array, expected in ((one.tokens, other.tokens), (one.offsets, other.offsets), (one.bytes, other.bytes)):
            assert np.array_equal(np.asarray(array), np.asarray(expected))
            places = np.random.default_rng(0).integers(0, len(expected), 50)
            assert np.array_equal(array.take(places), expected.take(places))
    train = [open_stores([path], tokenizer())[0] for path in (address, str(folder / "corpus"))]
    objective = published("gpt").objective
    for kind in (WindowsConfig(max_length=32), ChunksConfig(max_length=32)):
        one, other = (Batches(Documents(kind, store, vocab), objective, vocab, batch_size=8, seed=3) for store in train)
        for step in (0, 5):
            for first, second in zip(one.batches(step), other.batches(step), strict=True):
                assert all(torch.equal(first[field], second[field]) for field in first)


def test_a_corpus_in_memory_is_read_by_its_process(folder: Path) -> None:
    same(in_memory(folder, "same"), folder)


@pytest.mark.slow
def test_a_corpus_is_read_over_http(folder: Path, served: str) -> None:
    pytest.importorskip("aiohttp")
    same(f"{served}/corpus", folder)


@pytest.mark.slow
@pytest.mark.parametrize("served", [SimpleHTTPRequestHandler], indirect=True)
def test_a_server_without_spans_is_refused(folder: Path, served: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("aiohttp")
    monkeypatch.setattr(stored_arrays, "BLOCK_BYTES", 64)
    store = open_stores([f"{served}/corpus"], tokenizer())[0]
    with pytest.raises(UserError, match=r"tokens\.bin: this server does not send parts of a file"):
        store.tokens[0:4]


def test_blocks_are_asked_for_once_and_given_up(
    folder: Path, tmp_path: Path, requests: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of 64 bytes: a read requests those it needs, neighbors at once; within the limit nothing is requested again."""
    for module in (stored_arrays, stored_arrays):
        monkeypatch.setattr(module, "BLOCK_BYTES", 64)
    small = tmp_path / "small"
    corpus(small / "corpus", sizes=(9, 9), held_out=0)
    expected = np.asarray(open_stores([small / "corpus"], tokenizer())[0].tokens)
    store = open_stores([in_memory(small, "blocks")], tokenizer())[0]

    def requested(start: int, stop: int) -> list[tuple[int, int]]:
        requests.clear()
        assert np.array_equal(store.tokens[start:stop], expected[start:stop])
        return [(first, last) for name, first, last in requests if name == "tokens.bin"]

    assert requested(40, 50) == [(64, 128)]  # 32 ids are a block
    assert requested(40, 50) == []
    assert requested(0, 100) == [(0, 64), (128, 256)]
    part = store.manifest["tokens"] - len(expected) + int(store.offsets[9])
    assert requested(part + 1, part + 2) == [(0, 64)]
    monkeypatch.setattr(stored_arrays, "CACHE_BYTES", 300)
    view = store.tokens[0:32]
    assert requested(part + 40, part + 41) == [(64, 128)]  # the first part is given up
    assert requested(part + 40, part + 41) == []
    assert np.array_equal(view, expected[:32])
    assert requested(0, 10) == [(0, 64)]
    rng = np.random.default_rng(0)
    for start in rng.integers(0, len(expected) - 50, 200).tolist():
        requested(start, start + 50)
        held = sum(file.disk_bytes for file in stored_arrays._open_files)
        assert held <= 300 or len(stored_arrays._open_files) == 1


def test_threads_read_the_same_blocks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CACHE_BYTES", 2000), ("REQUEST_BLOCKS", 2)):
        monkeypatch.setattr(stored_arrays, name, value)
    expected = np.asarray(open_stores([folder / "corpus"], tokenizer())[0].tokens)
    store, wrong = open_stores([in_memory(folder, "threads")], tokenizer())[0], []

    def read(seed: int) -> None:
        for start in np.random.default_rng(seed).integers(0, len(expected) - 300, 300).tolist():
            if not np.array_equal(store.tokens[start : start + 300], expected[start : start + 300]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_damage_and_absence_are_one_sentence(folder: Path) -> None:
    store, files = fsspec.filesystem("memory"), in_memory(folder, "damaged")
    raw = bytearray(store.cat_file("/damaged/parts/00000/train/tokens.bin"))
    raw[10] ^= 1
    store.pipe_file("/damaged/parts/00000/train/tokens.bin", bytes(raw))
    with pytest.raises(UserError, match=r"^memory://damaged/parts/00000/train/tokens\.bin: block 0 of 1 is damaged"):
        open_stores([files], tokenizer())[0].tokens[0:4]
    store.rm_file("/damaged/parts/00002/train/offsets.bin")
    with pytest.raises(UserError, match=r"^memory://damaged/parts/00002/train/offsets\.bin: it cannot be read"):
        np.asarray(open_stores([files], tokenizer())[0].offsets)
    store.pipe_file(
        "/damaged/corpus.json", store.cat_file("/damaged/corpus.json").replace(b'"format": 1', b'"format": 7')
    )
    with pytest.raises(UserError, match=r"^memory://damaged/corpus\.json is not as it was written"):
        PreparedCorpus.open(files)
    assert not is_corpus("memory://nothing")
    with pytest.raises(UserError, match="memory://nothing is not a prepared corpus"):
        PreparedCorpus.open("memory://nothing")


@pytest.mark.slow
def test_a_run_on_an_address_is_that_on_the_directory(folder: Path, tmp_path: Path) -> None:
    losses = []
    for name, path in (("address", in_memory(folder, "run")), ("directory", str(folder / "corpus"))):
        settings = [
            f"data.path={path}", "model.hidden_size=32", "model.num_layers=1", "model.num_heads=2", "model.num_kv_heads=2",
            "examples.max_length=32", "batch.size=4", "budget.max_steps=5", "evaluation.every=5", "sample_prompts=[]",
        ]  # fmt: skip
        run(load("gpt", settings), tmp_path / name, log=lambda _: None)
        rows = [json.loads(row) for row in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses.append([row["loss"] for row in rows if "loss" in row])
        assert path in (tmp_path / name / "recipe.yaml").read_text()
    assert losses[0] == losses[1] and len(losses[0]) >= 5


def test_text_and_corpora_at_other_places_are_refused(folder: Path, tmp_path: Path) -> None:
    choice = prepare_corpus.TokenizerChoice(vocab_size=300)

    def refused(text: str, out: Path, match: str) -> None:
        with pytest.raises(UserError, match=match):
            prepare_corpus.prepare_corpus([text], out, settings=PartSettings(""), tokenizer=choice, log=lambda _: None)

    refused("memory://a.jsonl", tmp_path / "out", "memory of a process")
    refused(str(folder), Path("s3://bucket/corpus"), "a corpus is written to a file system")


def test_a_tokenizer_needs_the_beginnings_of_remote_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is that of the file on the disk, and little of the file is copied."""
    place = tmp_path / "a.jsonl"
    place.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20))
    sizes: list[int] = []
    fetch = remote.fetch

    def noted(url: str, target: Path, span: tuple[int, int] | None) -> None:
        fetch(url, target, span)
        sizes.append(target.stat().st_size)

    monkeypatch.setattr(remote, "fetch", noted)
    settings = PartSettings("", validation_fraction=0.1)
    samples = []
    for path in (f"file://{place}", str(place)):
        (piece,) = list_pieces([path], 1 << 27, ReadStats())
        samples.append(list(prepare_corpus._beginning(piece, settings, 1_300_000, tmp_path)))
    assert samples[0] == samples[1] and len(samples[0]) > 20
    assert sizes == [2_600_000] and place.stat().st_size > 4_000_000
