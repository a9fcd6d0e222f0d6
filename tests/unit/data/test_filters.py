"""Filters of `firth prepare` against exact Jaccard similarity, the probability of the bands, counts by hand, and datatrove."""

from __future__ import annotations

import random
import re
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from firth.data import filters
from firth.data.filters import BANDS, ROWS, FilterConfig, Filters, Words, bands, repetition, signature
from firth.types import UserError

VOCABULARY = [f"w{i}" for i in range(3000)]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(len(words) - 4)}


def jaccard(one: str, other: str) -> float:
    first, second = shingles(one), shingles(other)
    return len(first & second) / len(first | second)


def pair(rng: random.Random, changes: int) -> tuple[str, str]:
    """Return a text of 200 words, and a copy with some words changed."""
    words = [rng.choice(VOCABULARY) for _ in range(200)]
    other = list(words)
    for at in rng.sample(range(200), changes):
        other[at] = rng.choice(VOCABULARY)
    return " ".join(words), " ".join(other)


def test_signatures_estimate_the_jaccard_similarity() -> None:
    """The share of equal minima is an unbiased estimate with the variance of 112 independent hashes."""
    rng, errors = random.Random(0), []
    for number in range(120):
        one, other = pair(rng, number % 24)
        exact = jaccard(one, other)
        estimate = float((signature(one) == signature(other)).mean())
        deviation = (exact * (1 - exact) / (BANDS * ROWS)) ** 0.5
        assert abs(estimate - exact) <= 4.5 * deviation
        errors.append((estimate - exact) / max(deviation, 1e-9) if deviation else 0.0)
    assert abs(np.mean(errors)) < 4 / len(errors) ** 0.5
    assert 0.8 < np.std([error for error in errors if error]) < 1.2


@pytest.mark.parametrize("changes", [3, 6, 10])
def test_bands_agree_with_their_probability(changes: int) -> None:
    rng = random.Random(changes)
    expected, found = [], []
    for _ in range(250):
        one, other = pair(rng, changes)
        expected.append(1 - (1 - jaccard(one, other) ** ROWS) ** BANDS)
        found.append(bool((bands(one) == bands(other)).any()))
    deviation = sum(p * (1 - p) for p in expected) ** 0.5
    assert abs(sum(found) - sum(expected)) < 4 * deviation


def test_sequences_of_words_have_one_hash_wherever_they_are() -> None:
    words = Words("the cat sat on the mat, and the cat sat still. " * 3)
    text = re.findall(r"\w+", "the cat sat on the mat and the cat sat still " * 3)
    for n in range(1, 8):
        grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        hashes = words.ngrams(n).tolist()
        assert len(hashes) == len(grams)
        assert len(set(zip(grams, hashes, strict=True))) == len(set(grams)) == len(set(hashes))
    assert not len(Words("").ngrams(1)) and not len(Words("a").ngrams(2))


@pytest.mark.parametrize("seed", range(12))
def test_repetition_ratios_are_those_of_datatrove(seed: int) -> None:
    """The share of the most frequent n-gram is equal. Characters in repeated n-grams are counted once here, while datatrove skips n
    words after each repetition and so counts fewer.
    """
    gopher = pytest.importorskip("datatrove.pipeline.filters.gopher_repetition_filter")
    rng = random.Random(seed)
    words = [rng.choice("abcdefgh") * rng.randint(1, 4) for _ in range(rng.randint(12, 150))]
    text = " ".join(words)
    for n in filters.GOPHER_TOP:
        grams = gopher.get_n_grams(words, n)
        most = Counter(grams).most_common(1)[0][1]
        longest = max(len(gram) * count for gram, count in Counter(grams).items() if count == most)
        assert longest >= gopher.find_top_duplicate(grams)
        assert Words(text).top_share(n) == pytest.approx(longest / len(text) if most > 1 else 0.0)
    for n in filters.GOPHER_DUPLICATE:
        seen, covered = set(), set()
        for i in range(len(words) - n + 1):
            gram = tuple(words[i : i + n])
            covered |= set(range(i, i + n)) if gram in seen else set()
            seen.add(gram)
        size = sum(map(len, words))
        assert Words(text).repeated_share(n) == pytest.approx(sum(len(words[i]) for i in covered) / size)
        assert Words(text).repeated_share(n) >= gopher.find_all_duplicate(words, n) / size - 1e-12


def test_repetitive_texts_are_dropped_and_prose_is_kept() -> None:
    prose = (
        "Of the many towns along the river only three had bridges before the war, and of these the oldest was closed to carts. "
        "Farmers who wished to sell their grain in the north paid the ferryman, whose price rose with the water each spring."
    )
    assert repetition(prose) < 1 < repetition(prose + " Click here to read more about this." * 20)
    lines = "\n".join(["Home", "About", "Contact", *(f"Entry {i} of a list of things" for i in range(5))])
    assert repetition(lines) < repetition("\n".join([lines] * 3))
    assert repetition("") == 0.0
    config = FilterConfig(max_repetition=1.0)
    assert Filters(config).rule("word " * 200) == filters.REPETITION
    assert Filters(config).rule(prose) == 0


TEXTS = {
    "en": "The farmers of the valley brought their grain to the market in the early morning, before the heat of the day.",
    "de": "Die Bauern des Tals brachten ihr Getreide früh am Morgen auf den Markt, noch vor der Hitze des Tages.",
    "ru": "Крестьяне долины привозили своё зерно на рынок рано утром, до наступления дневной жары.",
    "el": "Οι αγρότες της κοιλάδας έφεραν τα σιτηρά τους στην αγορά νωρίς το πρωί, πριν από τη ζέστη της ημέρας.",
    "ja": "谷の農民たちは、日中の暑さの前に、早朝に穀物を市場に運んだ。",
    "zh": "山谷里的农民在一天的炎热到来之前，一大早就把粮食运到市场。",
}


@pytest.mark.parametrize("language", TEXTS)
def test_languages_by_script(language: str) -> None:
    rule = Filters(FilterConfig(language=language, language_by="script")).rule
    for other, text in TEXTS.items():
        kept = other == language or {language, other} in ({"en", "de"}, {"ja", "zh"})
        assert (rule(text) == 0) == kept, other


@pytest.mark.parametrize("language", TEXTS)
def test_languages_by_py3langid(language: str) -> None:
    pytest.importorskip("py3langid")
    assert filters.language_method(language) == "py3langid"
    rule = Filters(FilterConfig(language=language, language_by="py3langid")).rule
    assert [other for other, text in TEXTS.items() if rule(text) == 0] == [language]


def test_a_language_is_a_code() -> None:
    with pytest.raises(UserError, match="use a code of two letters, for example en"):
        filters.language_method("English")


def test_scripts_without_blanks_are_compared_by_letters() -> None:
    one = TEXTS["ja"] * 3 + TEXTS["zh"] * 3
    assert (signature(one) == signature(one.replace("早朝", "早晩", 1))).mean() > 0.8
    assert (signature(one) == signature(TEXTS["zh"] * 2)).mean() < 0.8


def test_large_sets_are_compared_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rows are found whatever the number of groups: every one with a value of an earlier row or part."""
    rng = np.random.default_rng(0)
    columns = [rng.integers(0, 300, size).astype(np.uint64) for size in (100, 1, 250, 60)]
    alive = [rng.random(len(column)) < 0.8 for column in columns]
    seen: set[int] = set()
    expected = []
    for part, (column, mask) in enumerate(zip(columns, alive, strict=True)):
        for row in np.flatnonzero(mask):
            expected += [(part, row)] if int(column[row]) in seen else []
            seen.add(int(column[row]))
    for size in (1 << 22, 40):
        monkeypatch.setattr(filters, "COMPARED_AT_ONCE", size)
        found = [(part, row) for part, rows in filters._repeated(columns.__getitem__, alive) for row in rows.tolist()]
        assert sorted(found) == expected


def test_texts_without_words_differ_unless_they_are_copies() -> None:
    assert np.array_equal(bands("!!!  ???"), bands("!!! ???"))
    assert not (bands("!!! ???") == bands(":-) :-(")).any()


def test_parts_may_be_more_than_a_process_may_open(tmp_path: Path) -> None:
    """100 GB of text are 800 parts, and a process may open 1,024 files by default."""
    config = FilterConfig(deduplicate=True, near_duplicates=True)
    scans = [tmp_path / str(number) for number in range(80)]
    for number, place in enumerate(scans):
        place.mkdir()
        found = filters.Fingerprints(config)
        found.add(" ".join(random.Random(number % 40).choices(VOCABULARY, k=30)), 0)
        found.write(place)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(list(Path("/proc/self/fd").iterdir()))
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, before[1]))
    try:
        rules = [int(one[0]) for one in filters.dropped(scans, config)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert rules == [0] * 40 + [filters.DUPLICATE] * 40
