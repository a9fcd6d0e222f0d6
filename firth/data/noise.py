"""Which tokens are hidden: one by one, by whole words, in spans, or what bears the facts.

`NOISES[name](tokens, vocab, rate, rng)` returns (n,) bool, True where a token is hidden. In expectation `rate` of the
tokens are (of the salient ones at least one, whole); control tokens never.

    iid         each token by itself                                      BERT (Devlin 2019), RoBERTa
    count       an exact number of tokens, any such set as likely         XLNet (Yang 2019), MPNet (Song 2020)
    words       each word by itself, with all its tokens                  BERT, "whole word masking"
    spans       spans of MEAN tokens, random lengths, an exact total      T5 (Raffel 2020: `random_spans_noise_mask`)
    geometric   spans of whole words, of geometric(0.2) words up to 10    SpanBERT (Joshi 2020)
    ngrams      spans of 1, 2 or 3 whole words, in shares of 1 / length   ALBERT (Lan 2020, section 4.1)
    contexts    spans of 1 to 5 words, each in 1 / rate times its length  XLNet, "span-based prediction"
    salient     names, dates and numbers, each as a whole                 REALM (Guu 2020), Roberts 2020

>>> vocab = Vocab(9, {}, np.arange(9) < 1, spelling=(b"\\n", b" a", b"b", b" Co", b"d", b" 5", b"e", b" f", b"g"))
>>> tokens = np.array([0] + [1, 2] * 4 + [3, 4] * 2 + [1, 2] * 3 + [5, 6] + [1, 2] * 2 + [0])
>>> for name, noise in NOISES.items():
...     print(f"{name:10}", *(".#"[int(h)] for h in noise(tokens, vocab, 0.25, np.random.default_rng(6))), sep="")
iid       .........##.#...##...##...
count     ..##.#..............#.##..
words     .................####..##.
spans     ....####...............##.
geometric .......####....##.........
ngrams    .......######.............
contexts  ...........######.........
salient   .........####......##.....
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np

from firth.tokenizer.vocab import Vocab
from firth.types import UserError

Noise = Callable[[np.ndarray, Vocab, float, np.random.Generator], np.ndarray]
Kind = Literal["iid", "count", "words", "spans", "geometric", "ngrams", "contexts", "salient"]

FEW = 5
"""Words in a span of `contexts`, at most."""
MEAN = 3
"""Tokens in a span of `spans`, on average."""
MOST_WORDS = 10
WORDS = 0.8 ** np.arange(MOST_WORDS)
WORDS = WORDS.cumsum() / WORDS.sum()
"""Cumulative probabilities of a geometric span's words: 0.2 * 0.8**(k - 1) up to 10, normalised; 3.8 on average."""
NGRAMS = (1 / np.arange(1, 4)).cumsum() / (1 / np.arange(1, 4)).sum()
"""The same of an n-gram's words: 6/11, 3/11, 2/11; 1.6 on average."""


def iid(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Each token with probability `rate`."""
    # For booleans a > b is "a and not b", in one pass: this runs 40,000 times a second on short sentences.
    hidden: np.ndarray = (rng.random(len(tokens)) < rate) > vocab.special[tokens]
    return hidden


def count(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """rate * n tokens, rounded up or down so that the mean is exact: the last of them in an order drawn at random."""
    allowed = np.flatnonzero(~vocab.special[tokens])
    hidden = np.zeros(len(tokens), bool)
    hidden[rng.permutation(allowed)[: stochastic_round(len(allowed) * rate, rng)]] = True
    return hidden


def contexts(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """A length of 1 to FEW words is drawn again and again, and with it a stretch of the text 1 / rate as long: as many
    words are hidden in it, at a random place (Yang 2019, section 3.1, with words for tokens).

    The text begins somewhere within the first stretch, so that its edges are hidden as often as its middle.
    """
    allowed = ~vocab.special[tokens]
    edges = np.append(np.flatnonzero(_begins(tokens, allowed, vocab)), len(tokens))  # of words
    hidden = np.zeros(len(tokens), bool)
    length, context = _stretch(rate, rng)
    while rng.random() * (FEW / rate + 1) > context:  # what covers a given place is longer than others in proportion
        length, context = _stretch(rate, rng)
    at = -int(rng.random() * context)
    while at < len(edges) - 1:
        first = at + int(rng.random() * (context - length + 1))
        low, high = (edges[min(max(i, 0), len(edges) - 1)] for i in (first, first + length))
        hidden[low:high] = True
        at += context
        length, context = _stretch(rate, rng)
    return hidden & allowed


def _stretch(rate: float, rng: np.random.Generator) -> tuple[int, int]:
    """Words hidden, and words in the stretch that they are hidden in."""
    length = 1 + int(rng.random() * FEW)
    return length, stochastic_round(length / rate, rng)


def words(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Each word with probability `rate`: so each token too, but a word is hidden as a whole."""
    allowed = ~vocab.special[tokens]
    word = _begins(tokens, allowed, vocab).cumsum()
    hidden: np.ndarray = (rng.random(word[-1] + 1)[word] < rate) & allowed
    return hidden


def spans(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Drop round(rate * n) tokens in round(that / MEAN) spans; every such placement is equally likely.

    The text may begin with a span and may end with one. (In T5's own code it always begins with text and ends with a
    span, so that a short text never loses its first tokens and always loses its last.) Where there are control tokens
    between, a span goes on behind them.
    """
    allowed = np.flatnonzero(~vocab.special[tokens])
    n = len(allowed)
    hidden = np.zeros(len(tokens), bool)
    if n < 2:
        return hidden
    drop = min(max(round(n * rate), 1), n - 1)
    count = min(max(round(drop / MEAN), 1), n - drop + 1)
    kept = _segments(n - drop + 2, count + 1, rng)
    kept[[0, -1]] -= 1  # the outer stretches of text may be empty, the inner ones not
    lengths = np.zeros(2 * count + 1, np.int64)
    lengths[::2], lengths[1::2] = kept, _segments(drop, count, rng)
    hidden[allowed] = np.repeat(np.arange(2 * count + 1) % 2 == 1, lengths)
    return hidden


def geometric(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Spans of whole words from random places until rate * n tokens are hidden (the last one is cut to that)."""
    return _whole_words(tokens, vocab, rate, rng, WORDS)


def ngrams(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """The same with shorter spans."""
    return _whole_words(tokens, vocab, rate, rng, NGRAMS)


def _whole_words(
    tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator, lengths: np.ndarray
) -> np.ndarray:
    """lengths: cumulative probabilities of a span's words, from 1 on."""
    allowed = ~vocab.special[tokens]
    n = int(allowed.sum())
    hidden = np.zeros(len(tokens), bool)
    left = stochastic_round(n * rate, rng)
    begins = np.append(np.flatnonzero(_begins(tokens, allowed, vocab) | ~allowed), len(tokens))
    while left:
        at = int(rng.random() * len(tokens))
        if hidden[at] or not allowed[at]:
            continue
        first = int(begins.searchsorted(at, "right")) - 1
        last = min(first + 1 + int(lengths.searchsorted(rng.random(), "right")), len(begins) - 1)
        inside = np.arange(begins[first], begins[last])
        inside = inside[(allowed & ~hidden)[inside]][:left]
        hidden[inside] = True
        left -= len(inside)
    return hidden


def salient(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Names, dates and numbers (`facts`) in a random order until rate * n tokens are hidden, each whole, one at least.

    A text without any has `spans` hidden, so that it is not shown in vain.
    """
    runs = facts(tokens, vocab)
    lengths = np.bincount(runs)[1:]
    if not len(lengths):
        return spans(tokens, vocab, rate, rng)
    order = rng.permutation(len(lengths))
    n = int((~vocab.special[tokens]).sum())
    count = int(lengths[order].cumsum().searchsorted(n * rate)) + 1
    return np.isin(runs, order[:count] + 1)


def facts(tokens: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Which name, date or number each token belongs to: (n,) int, 1, 2, ... in the order of the text, 0 for none.

    A number is a word with a digit in it. A name is a word with a capital inside a sentence; one that begins a sentence
    counts if it stands in the text with its capital inside a sentence too. Neighbours are one: "12 February 1809". This
    asks no model, unlike REALM's tagger: it takes adjectives (English) for names and misses names in small letters.
    Raises UserError where the vocabulary does not know which tokens are capitals, digits and full stops.
    """
    if vocab.capital is None or vocab.digit is None:
        raise UserError("nothing is known of capitals and digits in this vocabulary: use a tokenizer of firth's")
    allowed = ~vocab.special[tokens]
    first = np.flatnonzero(_begins(tokens, allowed, vocab))
    if not len(first):
        return np.zeros(len(tokens), np.int64)
    heads = tokens[first]
    capital, opens = vocab.capital[heads], vocab.sentences(tokens)[first]
    capital &= ~opens | np.isin(heads, heads[capital & ~opens])
    number = np.logical_or.reduceat(vocab.digit[tokens], first)
    word = _begins(tokens, allowed, vocab).cumsum()
    inside = np.append(False, capital | number)[word] & allowed
    runs: np.ndarray = (inside & ~np.append(False, inside[:-1])).cumsum() * inside
    return runs


def stochastic_round(x: float, rng: np.random.Generator) -> int:
    """Up or down at random, so that the mean is exact."""
    return int(x + rng.random())


NOISES: dict[str, Noise] = {
    "iid": iid, "count": count, "words": words, "spans": spans, "geometric": geometric, "ngrams": ngrams,
    "contexts": contexts, "salient": salient,
}  # fmt: skip


def text_units(kind: Kind) -> frozenset[str]:
    """Return what a noise looks for in a text: whole "words", "names" (with dates and numbers), or nothing."""
    whole = kind in ("words", "geometric", "ngrams", "contexts")
    return frozenset({"words"} if whole else {"names"} if kind == "salient" else ())


def apply_mask_tokens(
    tokens: np.ndarray, vocab: Vocab, masked: float, random: float, kind: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """What is shown for hidden tokens (k,): [MASK] where kind (k,), drawn from [0, 1), is below `masked`, a token drawn
    at random (now and then the same) where it is in the share `random` above that, and else the token itself.

    >>> vocab = Vocab(size=9, roles={"mask": 0}, special=np.arange(9) < 1)
    >>> kind = np.array([0.1, 0.85, 0.95])
    >>> apply_mask_tokens(np.array([5, 6, 7]), vocab, 0.8, 0.1, kind, np.random.default_rng(2)).tolist()
    [0, 3, 7]
    """
    hidden = kind < masked
    shown = np.where(hidden, vocab.mask, tokens)
    others = ((kind < masked + random) > hidden).nonzero()[0]
    if len(others):
        shown[others] = vocab.draw(len(others), rng)
    return shown


def _begins(tokens: np.ndarray, allowed: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Where a word begins; the first token behind a control token begins one whatever it is."""
    begins: np.ndarray = (vocab.starts(tokens) | ~np.append(False, allowed[:-1])) & allowed
    return begins


def _segments(items: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """`items` cut into `count` non-empty segments, all such cuts being equally likely: their lengths."""
    cuts = np.sort(rng.permutation(items - 1)[: count - 1]) + 1
    return np.diff(cuts, prepend=0, append=items)
