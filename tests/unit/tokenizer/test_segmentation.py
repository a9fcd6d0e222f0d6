"""Words and sentences of many scripts: compared with uniseg and ICU, and through every tokenizer."""

from __future__ import annotations

import random
import unicodedata

import numpy as np
import pytest

from firth.data.noise import NOISES, permutation
from firth.tokenizer import segmentation
from firth.tokenizer.segmentation import sentence_starts, split, word_starts
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train

TEXTS = {
    "Chinese": ["下雨了。", "他們帶了傘嗎？", "沒有！", "河水很高，船不開。"],
    "Japanese": ["雨が降っています。", "傘を持ちましたか？", "いいえ！", "川の水は高いです。"],
    "Thai": ["ฝนตกแล้ว!", " เขามีร่มไหม?", " ไม่มี!", " แม่น้ำสูงมาก"],
    "Hindi": ["बारिश हो रही है।", " क्या उनके पास छाता है?", " नहीं!", " नदी ऊँची है।"],
    "Arabic": ["المطر ينزل الآن.", " هل معهم مظلة؟", " لا!", " ماء النهر عال."],
    "Swahili": ["Mvua inanyesha.", " Je, wana mwavuli?", " Hapana!", " Mto umejaa maji."],
    "Polish": ["Pada deszcz.", " Czy mają parasol, np. czarny?", " Nie!", " Źródło rzeki jest o 3.5 km stąd."],
}
"""Sentences of each language, which are put together as they are."""

WORDS = {
    "Chinese": ["下雨", "了", "。", "他們"],
    "Japanese": ["川", "の", "水", "は", "高い", "です"],
    "Thai": ["ฝน", "ตก", "แล้ว"],
}
"""Words that ICU's dictionaries find, one after the other."""


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Tokenizer]:
    text = "\n".join("".join(sentences) for sentences in TEXTS.values())
    return {name: train([text] * 3, name, 600) for name in ("byte-bpe", "unigram", "bpe", "wordpiece")}


@pytest.fixture
def no_dictionary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segmentation, "has_dictionary", lambda: False)


@pytest.mark.parametrize("language", TEXTS)
def test_sentences_end_where_they_should(language: str) -> None:
    found = split("".join(TEXTS[language]), sentence_starts)
    assert [sentence.strip() for sentence in found] == [sentence.strip() for sentence in TEXTS[language]]


@pytest.mark.parametrize("language", TEXTS)
@pytest.mark.parametrize("algorithm", ["byte-bpe", "unigram", "bpe", "wordpiece"])
def test_tokens_start_the_same_sentences(language: str, algorithm: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[algorithm]
    ids = tokenizer.encode("".join(TEXTS[language]))
    parts = np.split(ids, np.flatnonzero(tokenizer.vocab.sentences(ids))[1:])
    assert [plain(tokenizer.decode(part)) for part in parts] == list(map(plain, TEXTS[language]))
    moved = permutation(ids, tokenizer.vocab, 1.0, np.random.default_rng(0))
    assert sorted(moved.tolist()) == sorted(ids.tolist()) and moved.tolist() != ids.tolist()


@pytest.mark.parametrize("algorithm", ["byte-bpe", "unigram"])
def test_an_empty_line_is_no_sentence(algorithm: str, tokenizers: dict[str, Tokenizer]) -> None:
    """A sentence of nothing but a line break would tell the order of two segments."""
    tokenizer = tokenizers[algorithm]
    ids = tokenizer.encode("He came.\n\nShe went. \r\n \tThey stayed.\n")
    parts = np.split(ids, np.flatnonzero(tokenizer.vocab.sentences(ids))[1:])
    assert [tokenizer.decode(part).strip() for part in parts] == ["He came.", "She went.", "They stayed."]


def plain(text: str) -> str:
    """Return a text without blanks and compatibility forms, which not every tokenizer restores."""
    return unicodedata.normalize("NFKC", "".join(text.split()))


def test_58_chinese_stops_end_58_sentences(tokenizers: dict[str, Tokenizer]) -> None:
    """Line breaks and Latin full stops are not the only ends of a sentence."""
    text = "".join(f"船{n}走了{stop}" for n, stop in zip(range(58), "。！？" * 20, strict=False))
    tokenizer = tokenizers["byte-bpe"]
    assert tokenizer.vocab.sentences(tokenizer.encode(text)).sum() == 58


@pytest.mark.parametrize("language", ["Hindi", "Arabic", "Swahili", "Polish"])
@pytest.mark.parametrize("algorithm", ["byte-bpe", "unigram"])
def test_whole_words_are_masked(language: str, algorithm: str, tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers[algorithm]
    text = "".join(TEXTS[language])
    ids, spans = tokenizer.spans(text)
    word = np.array([len(text[:end].split()) for _, end in spans])
    letters = np.array([tokenizer.decode([i]).strip(".?!,। ؟\ufffd") != "" for i in ids])
    hidden = np.stack([NOISES["words"](ids, tokenizer.vocab, 0.3, np.random.default_rng(seed)) for seed in range(60)])
    for number in set(word.tolist()):
        part = hidden[:, (word == number) & letters]
        assert part.shape[1] == 0 or (part.any(1) == part.all(1)).all() or "3.5" in text.split()[number - 1]
    assert 0.2 < hidden.mean() < 0.4


@pytest.mark.parametrize("language", WORDS)
def test_a_dictionary_finds_words_without_blanks(language: str, tokenizers: dict[str, Tokenizer]) -> None:
    pytest.importorskip("icu4py")
    text = "".join(TEXTS[language])
    found = split(text, word_starts)
    wanted = WORDS[language]
    assert any(found[i : i + len(wanted)] == wanted for i in range(len(found)))
    tokenizer = tokenizers["byte-bpe"]
    ids, spans = tokenizer.spans(text)
    begins = set(spans[tokenizer.vocab.starts(ids), 0].tolist())
    assert begins == set(np.flatnonzero(word_starts(text)).tolist()) & begins


@pytest.mark.parametrize("language", WORDS)
def test_without_a_dictionary_every_character_is_a_unit(language: str, no_dictionary: None) -> None:
    text = "".join(TEXTS[language]).replace(" ", "")
    assert max(map(len, split(text, word_starts))) <= 4  # a character with its marks, or a run of katakana


SIGNS = [*"aBz9 .,'\":;_-!?()\n\r\t", "\u2029", "\x85", "é", "e\u0301", "\u0301", "\u200d", "\u00ad", "。", "あ", "ア", "ー",
         "中", "ก", "ำ", "א", "״", "ع", "؟", "।", "क", "्", "٣", "👩", "🏴", "🇩", "🇪", "\u3000", "\u00a0", "’", "“", "x.y",
         "3.5"]  # fmt: skip


@pytest.mark.parametrize("signs", [SIGNS, [chr(i) for i in range(128)], [*"aB1. ',:;_"]], ids=["all", "ascii", "few"])
def test_random_texts_are_split_as_by_uniseg(signs: list[str], no_dictionary: None) -> None:
    """uniseg's SB8 skips fewer signs than the rule names, so its sentences are compared without these."""
    from uniseg import sentencebreak, wordbreak

    rng = random.Random(0)
    plain = [sign for sign in signs if all(sentencebreak.sentence_break(c).name != "OTHER" for c in sign)]
    for _ in range(400):
        text = "".join(rng.choices(signs, k=rng.randint(1, 12)))
        assert split(text, word_starts) == list(wordbreak.words(text))
        text = "B" + "".join(rng.choices(plain, k=rng.randint(1, 12)))
        assert split(text, sentence_starts) == list(sentencebreak.sentences(text))


@pytest.mark.oracle
def test_random_texts_have_icu_s_sentences() -> None:
    breakers = pytest.importorskip("icu4py.breakers")
    rng = random.Random(1)
    for _ in range(800):
        text = "B" + "".join(rng.choices(SIGNS, k=rng.randint(1, 14)))
        assert split(text, sentence_starts) == list(breakers.SentenceBreaker(text, "en"))


def test_lowercase_text_still_has_sentences() -> None:
    """By SB8 a full stop before a lowercase letter ends nothing; a text without capitals would be one sentence."""
    assert split("the boat came. we left.", sentence_starts) == ["the boat came. ", "we left."]
    assert split("The boat, e.g. the red one, came.", sentence_starts) == ["The boat, e.g. the red one, came."]


@pytest.mark.parametrize("text", ["", " ", "\n", "a", "\ud83d", "日"])
def test_short_texts_begin_once(text: str) -> None:
    assert word_starts(text).tolist() == sentence_starts(text).tolist() == [True] * len(text)
