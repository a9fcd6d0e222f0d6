"""Masking: fractions, spans and words are those that the papers state."""

from __future__ import annotations

from itertools import pairwise
from math import comb

import numpy as np
import pytest

from firth.data.noise import GEOMETRIC_CDF, NOISES
from firth.tokenizer.vocab import Vocab

# Ids below 5 are control tokens; an odd id begins a word.
SPELLING = tuple(b"\n" if i < 5 else b" a" if i % 2 else b"a" for i in range(105))
VOCAB = Vocab(size=105, roles={}, special=np.arange(105) < 5, spelling=SPELLING)


def text(n: int, rng: np.random.Generator) -> np.ndarray:
    """Return [CLS] n tokens [SEP]."""
    return np.concatenate(([0], rng.integers(5, 105, n), [1]))


def runs(is_masked: np.ndarray) -> np.ndarray:
    """Return the lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(is_masked.astype(int), prepend=0, append=0))
    return edges[1::2] - edges[::2]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(NOISES.keys() - {"salient"}))  # salient spans have no fixed fraction
@pytest.mark.parametrize("n", [1, 2, 5, 27, 128])
@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_the_fraction_is_the_rate_and_control_tokens_stay(name: str, n: int, rate: float) -> None:
    rng = np.random.default_rng(0)
    trials = 3000
    counts = np.zeros(trials)
    for k in range(trials):
        tokens = text(n, rng)
        is_masked = NOISES[name](tokens, VOCAB, rate, rng)
        assert is_masked.shape == tokens.shape
        assert is_masked.dtype == bool
        assert not is_masked[[0, -1]].any()
        counts[k] = is_masked.sum()
    if name == "spans":  # an exact total, rounded, with something left and something dropped
        assert (counts == (0 if n < 2 else min(max(round(n * rate), 1), n - 1))).all()
    else:
        standard_error = max(counts.std(), 1e-9) / trials**0.5
        assert abs(counts.mean() - n * rate) < 4.5 * standard_error


def test_iid_tokens_are_independent() -> None:
    rng = np.random.default_rng(1)
    tokens = text(200, rng)
    is_masked = np.stack([NOISES["iid"](tokens, VOCAB, 0.15, rng)[1:-1] for _ in range(2000)])
    each, both = is_masked.mean(0), (is_masked[:, 1:] & is_masked[:, :-1]).mean()
    assert np.abs(each - 0.15).max() < 5 * (0.15 * 0.85 / 2000) ** 0.5
    assert abs(both - 0.15**2) < 5 * (0.0225 / 400_000) ** 0.5


@pytest.mark.parametrize("rate", [0.15, 0.5])
def test_words_are_masked_as_a_whole(rate: float) -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        tokens = text(60, rng)
        tokens[20] = 2  # a control token inside, as between two segments
        is_masked = NOISES["words"](tokens, VOCAB, rate, rng)
        for k in range(2, 61):
            continues = tokens[k] % 2 == 0 and tokens[k] >= 5 and tokens[k - 1] >= 5
            if continues:
                assert is_masked[k] == is_masked[k - 1]
    unknown = Vocab(size=105, roles={}, special=np.arange(105) < 5)
    assert NOISES["words"](text(50, rng), unknown, 0.5, rng).any()


def test_t5_spans() -> None:
    """15% in spans of 3 on average, every placement equally likely, including both edges of the text."""
    rng = np.random.default_rng(3)
    lengths, edges = [], []
    for _ in range(2000):
        is_masked = NOISES["spans"](np.full(200, 50), VOCAB, 0.15, rng)
        edges.append(is_masked[[0, -1]])
        assert is_masked.sum() == 30
        assert len(runs(is_masked)) == 10
        lengths.append(runs(is_masked))
    found = np.bincount(np.concatenate(lengths), minlength=22)[1:] / 20_000
    # 30 items in 10 non-empty parts: P(length = k) = C(29 - k, 8) / C(29, 9).
    expected = np.array([comb(29 - k, 8) / comb(29, 9) for k in range(1, 22)])
    assert expected.sum() == pytest.approx(1)
    assert np.abs(found - expected).max() < 0.015
    assert np.concatenate(lengths).mean() == pytest.approx(3)
    # 10 spans among 170 kept tokens have 171 places, and an edge is one of them.
    assert np.mean(edges, 0) == pytest.approx(10 / 171, abs=0.02)


@pytest.mark.parametrize("n", [10, 20, 40, 64])
def test_spans_fall_anywhere_in_a_short_text(n: int) -> None:
    """Every token is masked with a probability within a factor of four of 15%."""
    share = np.mean(
        [NOISES["spans"](np.arange(5, 5 + n), VOCAB, 0.15, np.random.default_rng(seed)) for seed in range(2000)], 0
    )
    assert share.min() > 0.15 / 4 and share.max() < 0.15 * 4
    drop = round(n * 0.15)
    count = round(drop / 3)
    expected = count / (n - drop + 1)  # spans have n - drop + 1 places, all equally likely
    assert share[[0, -1]] == pytest.approx(expected, abs=5 * (expected / 2000) ** 0.5)


def spanbert_reference(tokens: np.ndarray, rate: float, rng: np.random.Generator) -> np.ndarray:
    """SpanBERT's masking step by step, as in its authors' code: an anchor, its word, and the words after it."""
    total, is_masked = int(len(tokens) * rate + rng.random()), np.zeros(len(tokens), bool)
    begins = tokens % 2 == 1
    lengths = 0.2 * 0.8 ** np.arange(10)
    while is_masked.sum() < total:
        words = rng.choice(np.arange(1, 11), p=lengths / lengths.sum())
        at = rng.integers(len(tokens))
        if is_masked[at]:
            continue
        while at and not begins[at]:
            at -= 1
        for _ in range(words):
            while at < len(tokens):
                if is_masked.sum() < total:
                    is_masked[at] = True
                at += 1
                if at == len(tokens) or begins[at]:
                    break
    return is_masked


def test_spanbert_spans() -> None:
    """Geometric(0.2) words, at most 10, 3.8 on average; the resulting runs are those of the step-by-step algorithm."""
    share = np.diff(GEOMETRIC_CDF, prepend=0)
    assert share[1:] / share[:-1] == pytest.approx(0.8)
    assert (share * np.arange(1, 11)).sum() == pytest.approx(3.797, abs=1e-3)
    rng = np.random.default_rng(4)
    texts = [rng.integers(5, 105, 120) for _ in range(1500)]
    found, expected = (
        np.bincount(np.concatenate([runs(make(t)) for t in texts]).clip(max=18), minlength=19)[1:]
        for make in (
            lambda t: NOISES["geometric"](t, VOCAB, 0.15, rng),
            lambda t: spanbert_reference(t, 0.15, rng),
        )
    )
    assert found.sum() > 3000
    assert found.sum() == pytest.approx(expected.sum(), rel=0.05)
    a, b = found / found.sum(), expected / expected.sum()
    n = 1 / (1 / found.sum() + 1 / expected.sum())
    assert (n * (a - b) ** 2 / ((a + b) / 2 + 1e-9)).sum() < 50  # 17 degrees of freedom, p = 4e-5
    for tokens in texts[:200]:
        is_masked = NOISES["geometric"](tokens, VOCAB, 0.15, rng)
        words = np.append(np.flatnonzero((tokens % 2 == 1) | (np.arange(120) == 0)), 120)
        partial = sum(is_masked[a:b].any() and not is_masked[a:b].all() for a, b in pairwise(words))
        assert partial <= 1  # only the last word, which fills the total
        assert is_masked.sum() == 18
