"""Segment pairs of whole sentences: only the words distinguish the adjacent segment from the random one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from firth.corpora.readers import Document
from firth.data.token_store import TokenStore
from firth.data.windows import Documents, SegmentPairsConfig
from firth.runs.recipe import load
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError


def texts(count: int, sentences: int) -> list[str]:
    """Return documents of sentences of 3 to 14 words, each beginning with a word that occurs nowhere else."""
    rng = np.random.default_rng(5)
    words = ["sea", "land", "bird", "stone", "river", "wind", "salt", "reed", "moon", "fire", "boat", "hill"]
    return [
        " ".join(
            " ".join(["Then", *rng.choice(words, int(rng.integers(2, 14)))]) + "." for _ in range(int(rng.integers(2, sentences)))
        )
        for _ in range(count)
    ]  # fmt: skip


@pytest.fixture(scope="module", params=["byte-bpe", "wordpiece"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return train(iter(texts(40, 30)), algorithm=request.param, vocab_size=400)


def stored(tokenizer: Tokenizer, folder: Path, count: int, sentences: int) -> TokenStore:
    found = [Document(f"{i}.txt", text) for i, text in enumerate(texts(count, sentences))]
    return TokenStore.build(found, tokenizer, folder / "store")


@pytest.mark.slow
@pytest.mark.parametrize("sentences", [40, 5])
def test_all_three_are_whole_sentences(tokenizer: Tokenizer, tmp_path: Path, sentences: int) -> None:
    store = stored(tokenizer, tmp_path, 60, sentences)
    pairs = Documents(SegmentPairsConfig(max_length=96), store, tokenizer.vocab)
    bodies = [
        tokenizer.decode(store.tokens[a : b - 1].astype(np.int32)).strip()
        for a, b in pairwise(store.offsets[:].tolist())
    ]
    whole, lengths = 0, []
    for i in range(len(pairs)):
        example = pairs[i]
        first, second, other = (tokenizer.decode(example[name]).strip() for name in ("first", "second", "other"))
        assert len(example["first"]) + max(len(example["second"]), len(example["other"])) + 3 <= 96
        assert any(f"{first} {second}" in body or f"{first}{second}" in body for body in bodies)
        assert not any(f"{first} {other}" in body for body in bodies)
        whole += all(text.startswith("Then") and text.endswith(".") for text in (first, second, other))
        lengths.append((len(example["second"]), len(example["other"])))
        assert all(np.array_equal(example[name], pairs[i][name]) for name in example)
    assert whole > 0.9 * sum(body.count(".") > 1 for body in bodies)  # at least one per document with a pair
    assert whole > (0.9 if sentences > 5 else 0.6) * len(pairs)
    # If lengths gave the label away, one of the two would mostly be the longer one.
    second, other = np.array(lengths).T
    assert abs(second.mean() - other.mean()) < 0.1 * second.mean()
    assert 0.3 < np.mean(second[second != other] > other[second != other]) < 0.7


@pytest.mark.slow
def test_random_segment_is_whole_where_few_sentences_fit(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """If it were cut within a sentence more often than the true one, its last token would tell NSP's label."""
    store = stored(tokenizer, tmp_path, 60, 40)
    kind = SegmentPairsConfig(max_length=40)
    pairs = Documents(kind, store, tokenizer.vocab)
    whole = [i for i in range(len(pairs)) if kind.splits_sentences(pairs, i)]
    ends = {
        name: np.mean([tokenizer.decode(pairs[i][name]).strip().endswith(".") for i in whole])
        for name in ("second", "other")
    }
    assert len(whole) > 0.5 * len(pairs)
    assert ends["second"] > 0.95 and ends["other"] > 0.95


def test_texts_without_sentences_are_split_anywhere(tokenizer: Tokenizer, tmp_path: Path) -> None:
    store = TokenStore.build([Document(str(i), "sea land bird " * 40) for i in range(4)], tokenizer, tmp_path / "store")
    plain, whole = (
        Documents(SegmentPairsConfig(max_length=48, whole_sentences=False), store, tokenizer.vocab),
        Documents(SegmentPairsConfig(max_length=48), store, tokenizer.vocab),
    )
    for i in range(len(plain)):
        assert all(np.array_equal(plain[i][name], whole[i][name]) for name in plain[i])
        assert len(whole[i]["first"]) >= 1 and len(whole[i]["second"]) >= 1


def test_pairs_are_drawn_anew_in_each_epoch(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Epoch 0 has the pairs of `source[i]`. Later ones split the same text elsewhere, alike in every run and for every seed."""
    pairs = Documents(SegmentPairsConfig(max_length=96), stored(tokenizer, tmp_path, 60, 40), tokenizer.vocab)
    everything = np.arange(len(pairs))
    first, again, later = (
        pairs.in_epochs(seed, np.full(len(pairs), epoch), everything) for seed, epoch in ((0, 0), (3, 2), (0, 2))
    )
    differ, same = 0, 0
    for i, (a, b, c) in enumerate(zip(first, again, later, strict=True)):
        assert all(np.array_equal(a[name], pairs[i][name]) and np.array_equal(b[name], c[name]) for name in a)
        assert np.array_equal(np.concatenate((a["first"], a["second"])), np.concatenate((c["first"], c["second"])))
        differ += len(a["first"]) != len(c["first"])
        same += np.array_equal(a["other"], c["other"])
    assert differ > 0.6 * len(pairs) and same < 0.1 * len(pairs)


@pytest.mark.slow
def test_a_second_segment_alone_tells_nothing(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A random place of a text is in a long sentence more often than in a short one, so segments from there would be told apart."""
    kind = SegmentPairsConfig(max_length=64)
    pairs = Documents(kind, stored(tokenizer, tmp_path, 200, 40), tokenizer.vocab)
    split = [i for i in range(len(pairs)) if kind.splits_sentences(pairs, i)]
    firsts = []
    for name in ("second", "other"):
        decoded = [tokenizer.decode(pairs[i][name]) for i in split]
        firsts.append([len(text.split(".")[0].split()) for text in decoded])
    second, other = (np.array(lengths, float) for lengths in firsts)
    assert len(split) > 500
    assert abs(second.mean() - other.mean()) < 3 * np.sqrt((second.var() + other.var()) / len(split))


def test_recipes_use_whole_sentences() -> None:
    assert load("bert").examples.whole_sentences and load("albert").examples.whole_sentences
    assert not load("albert", ["examples.whole_sentences=false"]).examples.whole_sentences


def test_one_document_may_be_nearly_all_of_the_text(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Its pairs take their random segment from the rest, and few draws: one from all tokens would rarely be in the rest."""
    found = [Document("long", "The sea is wide. The land is dry. " * 4000), Document("short", "Then stone and reed.")]
    store = TokenStore.build(found, tokenizer, tmp_path / "store")
    pairs = Documents(SegmentPairsConfig(max_length=40), store, tokenizer.vocab)
    draws = 0

    class Counted(type(pairs.index)):  # type: ignore[misc]
        def document(self, at: int) -> tuple[int, int]:
            nonlocal draws
            draws += 1
            return super().document(at)

    pairs.index.__class__ = Counted
    for i in range(20):
        assert tokenizer.decode(pairs[i]["other"]).strip() in "Then stone and reed."
    assert draws < 20 * 40


def test_other_documents_without_text_are_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    found = [Document("text", "The sea is wide. " * 40), Document("none", "")]
    store = TokenStore.build(found, tokenizer, tmp_path / "store")
    assert len(store) == 2
    with pytest.raises(UserError, match="segment pairs need two documents or more with text, one for a random segment"):
        Documents(SegmentPairsConfig(max_length=40), store, tokenizer.vocab)
