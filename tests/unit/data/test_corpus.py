"""A corpus in parts: the same examples as one store of its documents, opened without reading it, and verified when it is read."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.speed.corpus import write_linked_corpus
from firth.corpora import readers
from firth.corpora.readers import Document
from firth.data import stored_arrays
from firth.data.collate import Batches
from firth.data.corpus import PreparedCorpus, open_stores
from firth.data.token_store import TokenStore
from firth.data.windows import ChunksConfig, Documents, DocumentsConfig, WindowsConfig
from firth.runs.recipe import load, published
from firth.runs.recipe_names import RECIPES
from firth.runs.run import run
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError
from tests.support.tiny_corpus import corpus, documents, store, tokenizer

PRETRAINING = [name for name in RECIPES if published(name).examples.reads_documents]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One store of thirty documents, and a corpus of four parts with the same ones."""
    place = tmp_path_factory.mktemp("corpus")
    store(place)
    corpus(place / "parts")
    return place


@pytest.fixture
def both(folder: Path) -> tuple[TokenStore, TokenStore]:
    return TokenStore.open(folder / "store"), open_stores([folder / "parts"], tokenizer())[0]


@pytest.mark.parametrize("name", PRETRAINING)
def test_batches_of_parts_are_those_of_one_store(name: str, both: tuple[TokenStore, TokenStore]) -> None:
    """For every recipe that pretrains: the examples of its kind, drawn and masked by its objective, over two epochs."""
    recipe, vocab = published(name), tokenizer().vocab
    assert isinstance(recipe.examples, DocumentsConfig)
    kind = dataclasses.replace(recipe.examples, max_length=32)
    one, parts = (
        Batches(Documents(kind, opened, vocab, memory=8), recipe.objective, vocab, batch_size=8, seed=3)
        for opened in both
    )
    steps = 2 * len(one.source) // 8 + 2
    assert len(one.source) == len(parts.source) > 30
    for step in {0, 1, steps // 3, steps // 2, steps}:
        for first, second in zip(one.batches(step), parts.batches(step), strict=True):
            assert first.keys() == second.keys()
            assert all(torch.equal(first[field], second[field]) for field in first)


def test_a_corpus_is_read_as_one_array(both: tuple[TokenStore, TokenStore], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_arrays, "MAX_OPEN_FILES", 2)  # files are closed and opened again
    one, parts = both
    assert len(one) == len(parts) == 30
    rng = np.random.default_rng(0)
    for first, second in ((one.tokens, parts.tokens), (one.offsets, parts.offsets), (one.bytes, parts.bytes)):
        whole = np.asarray(first)
        assert np.array_equal(whole, np.asarray(second))
        places = rng.integers(0, len(whole), 200)
        assert np.array_equal(second.take(places), whole[places])
        for start, stop in rng.integers(0, len(whole) + 1, (100, 2)).tolist():
            assert np.array_equal(second[start:stop], whole[start:stop])
        assert [second[i] for i in range(0, len(whole), 7)] == whole[::7].tolist()
    offsets = np.asarray(one.offsets)
    for token in range(0, len(one.tokens), 5):
        assert parts.offsets.document_at(token) == np.searchsorted(offsets, token, "right") - 1
    assert one.num_bytes == parts.num_bytes == int(np.asarray(one.bytes).sum())
    assert np.array_equal(parts.count_tokens(600), np.bincount(np.asarray(one.tokens), minlength=600))
    assert np.array_equal(np.concatenate(list(parts.document_lengths())), np.diff(offsets) - 2)


def test_opening_reads_no_part(folder: Path, tmp_path: Path) -> None:
    """A corpus with unreadable content is opened, and the first example of the damaged part names it."""
    shutil.copytree(folder / "parts", tmp_path / "parts")
    damaged = tmp_path / "parts" / "parts" / "00002" / "train"
    (damaged / "tokens.bin").write_bytes(bytes((damaged / "tokens.bin").stat().st_size))
    windows = Documents(
        WindowsConfig(max_length=16), open_stores([tmp_path / "parts"], tokenizer())[0], tokenizer().vocab
    )
    assert len(windows[0]["tokens"]) == 17
    with pytest.raises(
        UserError, match=r"00002/train/tokens\.bin: block 0 of 1 is damaged .*run `firth prepare` again"
    ):
        list(map(windows.__getitem__, range(len(windows))))


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.bin", "bytes.bin"])
def test_a_torn_part_is_found_at_the_start(name: str, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "parts", tmp_path / "parts")
    file = tmp_path / "parts" / "parts" / "00001" / "train" / name
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        UserError, match=rf"{name} does not have the \d+ bytes .*delete .*00001, and run `firth prepare`"
    ):
        open_stores([tmp_path / "parts"], tokenizer())
    file.unlink()
    with pytest.raises(UserError, match="does not have the"):
        open_stores([tmp_path / "parts"], tokenizer())


def test_exchanged_parts_are_found(folder: Path, tmp_path: Path) -> None:
    """A part of another content and the same size has a manifest that is valid by itself; an edited corpus.json is found too."""
    shutil.copytree(folder / "parts", tmp_path / "parts")
    place = tmp_path / "parts" / "parts" / "00001" / "train"
    shutil.rmtree(place)
    text = documents()[7].text
    for cut in range(1, len(text)):  # the same letters in another order, until the number of tokens is the same
        TokenStore.build([Document("doc 7", text[cut:] + text[:cut])], tokenizer(), place)
        if len(TokenStore.open(place).tokens) == len(TokenStore.open(folder / "parts/parts/00001/train").tokens):
            break
        shutil.rmtree(place)
    train, _ = open_stores([tmp_path / "parts"], tokenizer())
    with pytest.raises(UserError, match="00001/train does not have the content that was written"):
        np.asarray(train.tokens)
    file = tmp_path / "parts" / "corpus.json"
    file.write_text(file.read_text().replace('"documents": 33', '"documents": 34'))
    with pytest.raises(UserError, match="its digest differs"):
        PreparedCorpus.open(tmp_path / "parts")


def test_memory_per_document_is_small(both: tuple[TokenStore, TokenStore]) -> None:
    """Chunks keep one number for 256 documents."""
    chunks = Documents(ChunksConfig(max_length=16), both[1], tokenizer().vocab)
    assert len(chunks.index._marks) == 2


@pytest.mark.slow
def test_memory_is_bounded_for_fifty_million_documents(tmp_path: Path) -> None:
    """At the peak: 17 bytes per MB of file that was read, 8 bytes for 4,096 documents, and the manifest; the work space is constant."""
    peaks = {}
    for documents_ in (500_000, 50_000_000):
        made = write_linked_corpus(tmp_path, documents_)
        parts, content = len(made.manifest["parts"]), made.directory / "corpus.json"
        loaded = Tokenizer.load(made.tokenizer)
        del made
        gc.collect()
        tracemalloc.start()
        opened = open_stores([tmp_path / f"linked-{documents_}"], loaded)[0]
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        chunks = Documents(ChunksConfig(), opened, loaded.vocab)
        rng = np.random.default_rng(0)
        for _ in range(50):
            assert len(chunks.many(rng.integers(0, len(chunks), 16).tolist())) == 16
        assert before < 5 * content.stat().st_size + 100_000 * parts
        peaks[documents_] = tracemalloc.get_traced_memory()[1] - before
        tracemalloc.stop()
        assert len(opened) == documents_
    hashes = 17 * parts * (120 + 1)  # 120 MB of tokens and 1 MB of offsets in each part
    objects = parts * 3000
    assert peaks[50_000_000] - peaks[500_000] < hashes + 4 * 8 * 50_000_000 / 4096 + objects


def test_a_run_takes_tokenizer_and_held_out_text_from_its_corpus(folder: Path, tmp_path: Path) -> None:
    """The run reads no text, finds the held-out part, and resumes."""
    settings = [
        f"data.path={folder / 'parts'}", "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2",
        "examples.max_length=32", "max_steps=3", "precision=fp32", "sample_prompts=[]",
    ]  # fmt: skip
    lines: list[str] = []
    result = run(load("gpt", settings), tmp_path / "run", log=lines.append)
    assert result.steps == 3
    assert "valid/loss" in result.metrics
    assert json.loads((tmp_path / "run" / "tokenizer" / "made_from.json").read_text())["digest"] == tokenizer().digest
    assert not (tmp_path / "run" / "data").exists()
    assert run(load("gpt", settings), tmp_path / "run", log=lines.append).steps == 3
    assert "is finished" in lines[-1]


def test_corpora_and_text_are_not_mixed_without_weights(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words")
    with pytest.raises(UserError, match=r"data\.path names a prepared corpus .* and text .*set data\.weights"):
        run(
            load("gpt", [f"data.path=[{folder / 'parts'}, {tmp_path / 'a.txt'}]"]), tmp_path / "run", log=lambda _: None
        )


def test_a_corpus_is_no_text(folder: Path) -> None:
    with pytest.raises(UserError, match="this corpus holds token ids"):
        readers.files([str(folder / "parts")])


def test_several_corpora_are_read_in_sequence(folder: Path) -> None:
    whole, _ = open_stores([folder / "parts"], tokenizer())
    twice, held_out = open_stores([folder / "parts", folder / "parts"], tokenizer())
    assert held_out is not None and len(held_out) == 6
    assert np.array_equal(np.asarray(twice.tokens), np.tile(np.asarray(whole.tokens), 2))
