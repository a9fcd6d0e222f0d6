"""A run reports where whole words, names or sentences are not found and what it does instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from firth.corpora.readers import Document
from firth.data.examples import DataConfig
from firth.data.token_store import TokenStore
from firth.data.windows import ChunksConfig, Documents, SegmentPairsConfig
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective
from firth.objectives.replaced_tokens import RTD
from firth.objectives.sentence_pairs import SOP
from firth.objectives.seq2seq import Denoising, SpanCorruption
from firth.runs.prepare import RunData
from firth.runs.recipe import load
from firth.runs.run import run
from firth.runs.tokenizer import fallbacks, resolve_segmentation
from firth.tokenizer import segmentation
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.types import UserError

TEXTS = {
    "Chinese": "河水很高，船不開。他們帶了傘嗎？下雨了！",
    "English": "In May the boat of Anna came back. Was it late? It had left on 3 March.",
    "Hindi without stops": "बारिश हो रही है और नदी ऊँची है ",
}
WORDS = "whole words fall back on subwords"
NAMES = "100% of the texts have no name, date or number"
SENTENCES = "100% of the texts are a single sentence"
PAIRS = "100% of the texts have no end of a sentence, so their pairs fall back on cuts anywhere"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train([text * 9 for text in TEXTS.values()], "byte-bpe", 500, num_sentinels=20)


@pytest.fixture(scope="module")
def stores(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TokenStore]:
    folder = tmp_path_factory.mktemp("stores")
    return {
        name: TokenStore.build([Document(str(i), text * 2) for i in range(4)], tokenizer, folder / str(n))
        for n, (name, text) in enumerate(TEXTS.items())
    }


@pytest.mark.parametrize(
    ("objective", "language", "expected"),
    [
        (MLM(noise="words"), "Chinese", WORDS),
        (MLM(noise="words"), "English", ""),
        (MLM(noise="words"), "Hindi without stops", ""),
        (MLM(noise="iid"), "Chinese", ""),
        (RTD(noise="ngrams"), "Chinese", WORDS),
        (SpanCorruption(noise="salient"), "Chinese", NAMES),
        (SpanCorruption(noise="salient"), "English", ""),
        (Denoising(), "Hindi without stops", SENTENCES),
        (Denoising(), "Chinese", ""),
        (Denoising(noises=("infilling",)), "Hindi without stops", ""),
    ],
)
def test_missing_units_are_reported(
    objective: Objective, language: str, expected: str, stores: dict[str, TokenStore], tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(segmentation, "has_dictionary", lambda: False)
    source = Documents(ChunksConfig(max_length=64, add_special_tokens=False), stores[language], tokenizer.vocab)
    found = fallbacks(objective, ChunksConfig(64), source, tokenizer.vocab)
    assert [expected in line for line in found] == [True] * bool(expected), found


def test_dictionary_finds_words_to_mask(stores: dict[str, TokenStore], tokenizer: Tokenizer) -> None:
    pytest.importorskip("icu4py")
    source = Documents(ChunksConfig(max_length=64, add_special_tokens=False), stores["Chinese"], tokenizer.vocab)
    assert fallbacks(MLM(noise="words"), ChunksConfig(64), source, tokenizer.vocab) == []


@pytest.mark.parametrize(("language", "expected"), [("Hindi without stops", [PAIRS]), ("Chinese", [])])
def test_pairs_without_sentences_are_reported(
    language: str, expected: list[str], stores: dict[str, TokenStore], tokenizer: Tokenizer
) -> None:
    source = Documents(SegmentPairsConfig(max_length=64), stores[language], tokenizer.vocab)
    assert fallbacks(SOP() + MLM(), SegmentPairsConfig(64), source, tokenizer.vocab) == expected
    assert fallbacks(SOP() + MLM(), SegmentPairsConfig(64, whole_sentences=False), source, tokenizer.vocab) == []


def test_unknown_tokens_of_a_store_are_reported(tmp_path: Path) -> None:
    """With a tokenizer of another text nearly all tokens of this one are unknown."""
    english = train([TEXTS["English"] * 9], "wordpiece", 200)
    (tmp_path / "a.txt").write_text("\n\n".join([TEXTS["Chinese"]] * 40), "utf-8")
    lines: list[str] = []
    RunData(DataConfig(path=(str(tmp_path / "a.txt"),)), english, tmp_path / "run", log=lines.append).stores()
    shares = [
        line.split("%")[0] for line in lines if "% of these tokens are unknown to the tokenizer: train one" in line
    ]
    assert len(shares) == 2 and min(map(float, shares)) > 80  # the training and the held-out store


def test_run_prints_and_stores_the_reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "has_dictionary", lambda: False)
    (tmp_path / "a.txt").write_text("\n\n".join(f"船{n}走了。" * 30 for n in range(30)), "utf-8")
    changes = [
        f"data.path={tmp_path}/a.txt", "data.split_by=blank", "objective.noise=words", "tokenizer.vocab_size=300",
        "model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "examples.max_length=32", "max_steps=1", "batch.size=2",
    ]  # fmt: skip
    lines: list[str] = []
    run(load("roberta", changes), tmp_path / "run", log=lines.append)
    assert sum(WORDS in line for line in lines) == 1
    assert any(WORDS in line for line in json.loads((tmp_path / "run" / "done.json").read_text())["remarks"])
    assert load(str(tmp_path / "run")).word_segmentation == "uax29"
    monkeypatch.setattr(segmentation, "has_dictionary", lambda: True)
    for recipe in (load("roberta", changes), load(str(tmp_path / "run"))):
        with pytest.raises(
            UserError, match=r"^word_segmentation=uax29, and this machine finds words by icu, .*: uninstall icu4py"
        ):
            run(recipe, tmp_path / "run", log=lines.append)


def test_only_word_objectives_depend_on_segmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    for dictionary, here in ((True, "icu"), (False, "uax29")):
        monkeypatch.setattr(segmentation, "has_dictionary", lambda dictionary=dictionary: dictionary)
        assert resolve_segmentation(MLM(noise="words"), "auto") == here
        assert resolve_segmentation(SOP() + MLM(noise="words"), here) == here
        assert resolve_segmentation(MLM(), "icu") == "icu" and resolve_segmentation(MLM(), "auto") == here
    with pytest.raises(
        UserError, match=r"^word_segmentation=icu, and this machine finds words by uax29, .*: install firth\[icu\]"
    ):
        resolve_segmentation(RTD(noise="ngrams"), "icu")
