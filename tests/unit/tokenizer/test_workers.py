"""Worker processes: the same results for any number of them, and a one-line error if one is killed."""

from __future__ import annotations

import json
import os
import resource
from collections import Counter
from collections.abc import Iterator
from multiprocessing import Pipe
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import models, trainers

from firth.corpora.readers import Document
from firth.data import token_store
from firth.data.token_store import TokenStore
from firth.tokenizer import merges, workers
from firth.tokenizer.train import ALGORITHMS, WORD_LEVEL, blank, train
from firth.tokenizer.workers import Encode, Workers, count_all
from firth.types import UserError
from tests.support.tiny_corpus import TEXTS, documents, tokenizer

NASTY = [
    "it's we'll I'D 's  two  blanks\n\n and\tlines \r\n  end  ",
    "a\x0bb c\x0cd e\x85f g\x1ch \x7f i\u00a0j  k\u2003 l\u3000m \u2028n",
    "naïve café – “quoted” 東京 タワー ﬁne ½ ² ¨ é",
    "ΟΔΟΣ İstanbul ǅ \U0001f600 a\ufffdb ▁x ▁ \u200b",
    "__init__ 3.14 x86_64 <s> </s> [MASK] <|im_start|> <0x41>",
    "",
    " ",
]


def by_engine(engine: Engine, texts: list[str]) -> Counter[str]:
    """Return the words as the engine itself splits."""
    found: Counter[str] = Counter()
    for text in texts:
        found.update(word for word, _ in engine.pre_tokenizer.pre_tokenize_str(workers.normal(engine, text)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", [*ALGORITHMS, WORD_LEVEL])
def test_words_are_counted_as_the_engine_splits(algorithm: str) -> None:
    engine = blank(algorithm, "<unk>")
    for text in [*NASTY, *TEXTS]:
        assert workers.count(engine, [text]) == by_engine(engine, [text]), text
    assert workers.count(engine, [*NASTY, *TEXTS]) == by_engine(engine, [*NASTY, *TEXTS])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("aZ9'sé_!.\n\t \r\x0b\x0c\x1c\x85\xa0\u2003\u3000▁東ﬁ¨\u0301")), max_size=4))
def test_words_of_any_text_are_those_of_the_engine(texts: list[str]) -> None:
    for algorithm in (*ALGORITHMS, WORD_LEVEL):
        engine = blank(algorithm, "<unk>")
        assert workers.count(engine, texts) == by_engine(engine, texts), algorithm


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=9), st.integers(1, 50), min_size=1, max_size=30))
def test_merges_are_those_of_the_library(counts: dict[str, int]) -> None:
    first = ["a", "b", "c", "##a", "##b", "##c"]
    ids, learned = merges.learn(counts, first, 60, prefix="##")
    engine = Engine(models.BPE())
    engine.pre_tokenizer = blank("bpe", "<unk>").pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=60, special_tokens=first, continuing_subword_prefix="##", show_progress=False
    )
    engine.train_from_iterator([" ".join([word] * often) for word, often in counts.items()], trainer)
    model = json.loads(engine.to_str())["model"]
    assert ids == model["vocab"]
    assert [[m.left, m.right] for m in learned] == [list(pair) for pair in model["merges"]]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use workers for a text of a few kilobytes."""
    monkeypatch.setattr(token_store, "WORTH_CHARACTERS", 900)
    monkeypatch.setattr(token_store, "CHUNK_CHARACTERS", 500)
    monkeypatch.setattr(token_store, "WORKER_CHUNK_CHARACTERS", 300)
    monkeypatch.setattr(workers, "WORTH_CHARACTERS", 900)
    monkeypatch.setattr(workers, "LIST_CHARACTERS", 700)


@pytest.mark.slow
def test_a_store_is_the_same_for_any_number_of_workers(tmp_path: Path, small: None) -> None:
    files = {}
    for count in (1, 2, 3):
        TokenStore.build(documents(), tokenizer(), tmp_path / str(count), workers=count)
        files[count] = {path.name: path.read_bytes() for path in (tmp_path / str(count)).iterdir()}
    assert sorted(files[1]) == sorted([*token_store.FILES, "manifest.json"])
    assert files[1] == files[2] == files[3]


def test_counts_and_tokenizers_are_the_same_with_workers(small: None) -> None:
    engine = blank("wordpiece", "[UNK]")
    assert count_all(engine, TEXTS, workers=2) == workers.count(engine, TEXTS)


@pytest.mark.slow
def test_a_build_resumes_after_a_killed_worker(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Workers] = []
    enter = Workers.__enter__
    monkeypatch.setattr(Workers, "__enter__", lambda self: started.append(self) or enter(self))

    def killing(error: type[BaseException] | None) -> Iterator[Document]:
        for i, document in enumerate(documents()):
            if i == 25:
                if error:
                    raise error
                for process in started[-1]._processes:
                    process.kill()
            yield document

    with pytest.raises(UserError, match="killed by signal 9, most often because memory ran out: free some and run"):
        TokenStore.build(killing(None), tokenizer(), tmp_path / "store", workers=2)
    assert not (tmp_path / "store").exists()
    with pytest.raises(KeyboardInterrupt):
        TokenStore.build(killing(KeyboardInterrupt), tokenizer(), tmp_path / "stopped", workers=2)
    assert not (tmp_path / "store").exists() and not (tmp_path / "stopped").exists()
    assert len(started) == 2
    assert all(process.returncode is not None for one in started for process in one._processes)
    kept = (tmp_path / "store.partial" / "bytes.bin").stat().st_size // 8
    made = TokenStore.build(documents(), tokenizer(), tmp_path / "store")
    whole = TokenStore.build(documents(), tokenizer(), tmp_path / "whole")
    assert kept > 0
    assert made.manifest == whole.manifest


def test_a_full_disk_is_a_one_line_error(tmp_path: Path, small: None) -> None:
    was = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, was[1]))
    try:
        with pytest.raises(UserError, match=r"could not be written .*free disk space and start again"):
            TokenStore.build(documents(), tokenizer(), tmp_path / "store", workers=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert not (tmp_path / "store").exists()


def test_a_failed_worker_names_its_exit_code() -> None:
    task = Encode(tokenizer())
    task.setup = lambda: {"count": "no engine"}  # type: ignore[method-assign]
    with pytest.raises(UserError, match="ended with exit code 1"), Workers(task, 1) as running:
        list(running.map([["text"]]))


@pytest.mark.parametrize("last", [b"", b"\x00\x00\x00\x64within"])
def test_a_worker_ends_silently_when_its_pipe_is_closed(last: bytes) -> None:
    """Also within a message, as when Ctrl-C ends the main process."""
    ours, theirs = Pipe()
    ours.send_bytes(json.dumps(Encode(tokenizer()).setup()).encode())
    os.write(ours.fileno(), last)
    ours.close()
    workers.serve(os.dup(theirs.fileno()))
    theirs.close()


def test_a_small_text_starts_no_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Workers, "__enter__", lambda self: pytest.fail("a worker was started"))
    TokenStore.build(documents(), tokenizer(), tmp_path / "store", workers=4)
    train(TEXTS, "byte-bpe", 400)
