r"""Noise of pretraining: which tokens are masked, and the corruptions of BART.

Selection of the tokens to mask: single tokens, whole words, spans, or salient spans.

`NOISES[name](tokens, vocab, rate, rng)` returns (n,) bool, True where a token is masked. In expectation a fraction `rate` of the
tokens is masked (for `salient` at least one whole span); control tokens never are.

    iid         each token independently                                  BERT (Devlin 2019), RoBERTa
    count       an exact number of tokens, uniform over such sets         XLNet (Yang 2019), MPNet (Song 2020)
    words       each word independently, with all its tokens              BERT, "whole word masking"
    spans       spans of 3 tokens on average, an exact total              T5 (Raffel 2020: `random_spans_noise_mask`)
    geometric   spans of whole words, of geometric(0.2) words up to 10    SpanBERT (Joshi 2020)
    ngrams      spans of 1, 2 or 3 whole words, with weights 1 / length   ALBERT (Lan 2020, section 4.1)
    contexts    spans of 1 to 5 words, each in 1 / rate times its length  XLNet, "span-based prediction"
    salient     names, dates and numbers, each as a whole                 REALM (Guu 2020), Roberts 2020

>>> vocab = Vocab(9, {}, np.arange(9) < 1, spelling=(b"\n", b" a", b"b", b" Co", b"d", b" 5", b"e", b" f", b"g"))
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

The five text corruptions of BART (Lewis 2019, section 2.2); the model learns to reconstruct the original text.

`CORRUPTIONS[name](tokens, vocab, rate, rng)` returns the corrupted tokens of a text without special tokens. `rate` is the
fraction of tokens that masking, deletion and infilling affect. A text that cannot be corrupted is returned as it is.

    masking       random tokens become one mask each                      the length is kept
    deletion      random tokens are removed                               the model must find where
    infilling     spans of Poisson(3) tokens become one mask each         an empty span inserts a mask between two tokens
    permutation   the sentences are shuffled                              by UAX #29 (`firth.tokenizer.segmentation`)
    rotation      the text starts at a random token and wraps around      the model must find its beginning

Spans are of tokens, as in the paper; BART's code draws them over words. `corrupt` applies several, one after the other.

>>> letters = "?_abcdefghi.jkl."
>>> vocab = Vocab(16, {"mask": 1}, np.arange(16) < 2, spelling=tuple(f" {c}".replace(" .", ".").encode() for c in letters))
>>> text = np.arange(2, 16)
>>> for name, corrupt in CORRUPTIONS.items():
...     print("".join(letters[i] for i in corrupt(text, vocab, 0.3, np.random.default_rng(3))), name)
__cd_fg_i_jkl. masking
cdfgijkl. deletion
abcde_i_jkl. infilling
jkl.abcdefghi. permutation
bcdefghi.jkl.a rotation
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from firth.tokenizer.vocab import Vocab
from firth.types import UserError

Noise = Callable[[np.ndarray, Vocab, float, np.random.Generator], np.ndarray]
Kind = Literal["iid", "count", "words", "spans", "geometric", "ngrams", "contexts", "salient"]

MAX_CONTEXT_WORDS = 5
"""Maximum number of words in a span of `contexts`."""
MEAN_SPAN_TOKENS = 3
"""Mean number of tokens in a span of `spans`."""
MAX_SPAN_WORDS = 10
GEOMETRIC_CDF = 0.8 ** np.arange(MAX_SPAN_WORDS)
GEOMETRIC_CDF = GEOMETRIC_CDF.cumsum() / GEOMETRIC_CDF.sum()
"""Cumulative probabilities of the number of words of a geometric span: 0.2 * 0.8**(k - 1) up to 10, normalized; mean 3.8."""
NGRAM_CDF = (1 / np.arange(1, 4)).cumsum() / (1 / np.arange(1, 4)).sum()
"""The same for an n-gram: 6/11, 3/11, 2/11; mean 1.6."""


def iid(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Mask each token with probability `rate`."""
    # For booleans a > b is "a and not b" in one pass; this runs 40,000 times a second on short sentences.
    is_masked: np.ndarray = (rng.random(len(tokens)) < rate) > vocab.special[tokens]
    return is_masked


def count(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Mask rate * n tokens, rounded at random so that the mean is exact: the last ones of a random order."""
    allowed = np.flatnonzero(~vocab.special[tokens])
    is_masked = np.zeros(len(tokens), bool)
    is_masked[rng.permutation(allowed)[: stochastic_round(len(allowed) * rate, rng)]] = True
    return is_masked


def contexts(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Repeatedly draw a length of 1 to 5 words and a context 1 / rate times as long, and mask that many words at a random place in it.

    This is Yang 2019, section 3.1, with words instead of tokens. The text starts at a random place within the first context, so
    that its edges are masked as often as its middle.
    """
    allowed = ~vocab.special[tokens]
    edges = np.append(np.flatnonzero(_word_starts(tokens, allowed, vocab)), len(tokens))  # of words
    is_masked = np.zeros(len(tokens), bool)
    length, context = _draw_context(rate, rng)
    while (
        rng.random() * (MAX_CONTEXT_WORDS / rate + 1) > context
    ):  # a context covers a given place in proportion to its length
        length, context = _draw_context(rate, rng)
    at = -int(rng.random() * context)
    while at < len(edges) - 1:
        first = at + int(rng.random() * (context - length + 1))
        low, high = (edges[min(max(i, 0), len(edges) - 1)] for i in (first, first + length))
        is_masked[low:high] = True
        at += context
        length, context = _draw_context(rate, rng)
    return is_masked & allowed


def _draw_context(rate: float, rng: np.random.Generator) -> tuple[int, int]:
    """Return the number of words to mask, and the number of words of the context they are masked in."""
    length = 1 + int(rng.random() * MAX_CONTEXT_WORDS)
    return length, stochastic_round(length / rate, rng)


def words(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Mask each word, as a whole, with probability `rate`."""
    allowed = ~vocab.special[tokens]
    word = _word_starts(tokens, allowed, vocab).cumsum()
    is_masked: np.ndarray = (rng.random(word[-1] + 1)[word] < rate) & allowed
    return is_masked


def spans(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Mask round(rate * n) tokens in round(that / 3) spans; every such placement is equally likely.

    The text may begin and end with a span. (In T5's own code it always begins with text and ends with a span, so a short text
    never loses its first tokens and always loses its last.) A span continues after control tokens inside it.
    """
    allowed = np.flatnonzero(~vocab.special[tokens])
    n = len(allowed)
    is_masked = np.zeros(len(tokens), bool)
    if n < 2:
        return is_masked
    drop = min(max(round(n * rate), 1), n - 1)
    count = min(max(round(drop / MEAN_SPAN_TOKENS), 1), n - drop + 1)
    kept = _random_partition(n - drop + 2, count + 1, rng)
    kept[[0, -1]] -= 1  # text may be empty at the edges, not between spans
    lengths = np.zeros(2 * count + 1, np.int64)
    lengths[::2], lengths[1::2] = kept, _random_partition(drop, count, rng)
    is_masked[allowed] = np.repeat(np.arange(2 * count + 1) % 2 == 1, lengths)
    return is_masked


def geometric(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Mask spans of whole words at random places until rate * n tokens are masked. The last span is truncated."""
    return _whole_words(tokens, vocab, rate, rng, GEOMETRIC_CDF)


def ngrams(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """As `geometric`, with spans of 1 to 3 words."""
    return _whole_words(tokens, vocab, rate, rng, NGRAM_CDF)


def _whole_words(
    tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator, lengths: np.ndarray
) -> np.ndarray:
    """Mask spans of whole words. `lengths`: cumulative probabilities of the number of words, from 1 on."""
    allowed = ~vocab.special[tokens]
    n = int(allowed.sum())
    is_masked = np.zeros(len(tokens), bool)
    remaining = stochastic_round(n * rate, rng)
    word_begins = np.append(np.flatnonzero(_word_starts(tokens, allowed, vocab) | ~allowed), len(tokens))
    while remaining:
        at = int(rng.random() * len(tokens))
        if is_masked[at] or not allowed[at]:
            continue
        first = int(word_begins.searchsorted(at, "right")) - 1
        last = min(first + 1 + int(lengths.searchsorted(rng.random(), "right")), len(word_begins) - 1)
        inside = np.arange(word_begins[first], word_begins[last])
        inside = inside[(allowed & ~is_masked)[inside]][:remaining]
        is_masked[inside] = True
        remaining -= len(inside)
    return is_masked


def salient(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Mask names, dates and numbers (`facts`) in a random order until rate * n tokens are masked: each as a whole, at least one.

    A text without any is masked with `spans`, so that it is not wasted.
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
    """Return which name, date or number each token belongs to: (n,) int, 1, 2, ... in the order of the text, 0 for none.

    A number is a word with a digit. A name is a capitalized word inside a sentence; one at the beginning of a sentence counts if
    it also occurs capitalized inside a sentence of the text. Adjacent ones are merged: "12 February 1809". Unlike REALM's tagger
    this needs no model: it takes adjectives (English) for names and misses names in lower case.

    Raises:
        UserError: The vocabulary does not know which tokens are capitals, digits and full stops.
    """
    if vocab.capital is None or vocab.digit is None:
        raise UserError("this vocabulary has no information on capitals and digits: use a tokenizer trained by firth")
    allowed = ~vocab.special[tokens]
    first = np.flatnonzero(_word_starts(tokens, allowed, vocab))
    if not len(first):
        return np.zeros(len(tokens), np.int64)
    first_tokens = tokens[first]
    capital, starts_sentence = vocab.capital[first_tokens], vocab.sentences(tokens)[first]
    capital &= ~starts_sentence | np.isin(first_tokens, first_tokens[capital & ~starts_sentence])
    number = np.logical_or.reduceat(vocab.digit[tokens], first)
    word = _word_starts(tokens, allowed, vocab).cumsum()
    inside = np.append(False, capital | number)[word] & allowed
    runs: np.ndarray = (inside & ~np.append(False, inside[:-1])).cumsum() * inside
    return runs


def stochastic_round(x: float, rng: np.random.Generator) -> int:
    """Round up or down at random, so that the mean is exact."""
    return int(x + rng.random())


NOISES: dict[str, Noise] = {
    "iid": iid, "count": count, "words": words, "spans": spans, "geometric": geometric, "ngrams": ngrams,
    "contexts": contexts, "salient": salient,
}  # fmt: skip


def text_units(kind: Kind) -> frozenset[str]:
    """Return the text units that a noise needs: whole "words", "names" (with dates and numbers), or nothing."""
    whole = kind in ("words", "geometric", "ngrams", "contexts")
    return frozenset({"words"} if whole else {"names"} if kind == "salient" else ())


def apply_mask_tokens(
    tokens: np.ndarray, vocab: Vocab, masked: float, random: float, kind: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the inputs at masked positions, (k,): [MASK], a random token, or the token itself (BERT's 80/10/10).

    Args:
        tokens: The original tokens, (k,).
        vocab: The vocabulary.
        masked: Fraction that becomes [MASK].
        random: Fraction that becomes a random token, which may be the same one.
        kind: Uniform draws from [0, 1) that decide, (k,).
        rng: Draws the random tokens.

    >>> vocab = Vocab(size=9, roles={"mask": 0}, special=np.arange(9) < 1)
    >>> kind = np.array([0.1, 0.85, 0.95])
    >>> apply_mask_tokens(np.array([5, 6, 7]), vocab, 0.8, 0.1, kind, np.random.default_rng(2)).tolist()
    [0, 3, 7]
    """
    is_masked = kind < masked
    shown = np.where(is_masked, vocab.mask, tokens)
    others = ((kind < masked + random) > is_masked).nonzero()[0]
    if len(others):
        shown[others] = vocab.draw(len(others), rng)
    return shown


def _word_starts(tokens: np.ndarray, allowed: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Return where a word begins. The first token after a control token always begins one."""
    word_begins: np.ndarray = (vocab.starts(tokens) | ~np.append(False, allowed[:-1])) & allowed
    return word_begins


def _random_partition(items: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return the lengths of `count` non-empty parts of `items`, uniform over all such partitions."""
    cuts = np.sort(rng.permutation(items - 1)[: count - 1]) + 1
    return np.diff(cuts, prepend=0, append=items)


Corruption = Callable[[np.ndarray, Vocab, float, np.random.Generator], np.ndarray]
Damage = Literal["masking", "deletion", "infilling", "permutation", "rotation"]

MEAN_INFILL_TOKENS = 3
"""Mean number of tokens in a span of `infilling`."""


def masking(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Replace each token with a mask with probability `rate`: (n,) -> (n,).

    >>> vocab = Vocab(9, {"mask": 1}, np.arange(9) < 2)
    >>> masking(np.arange(2, 9), vocab, 0.3, np.random.default_rng(1)).tolist()
    [2, 3, 1, 5, 6, 7, 8]
    """
    return np.where(iid(tokens, vocab, rate, rng), vocab.mask, tokens)


def deletion(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Remove each token with probability `rate`.

    >>> vocab = Vocab(9, {"mask": 1}, np.arange(9) < 2)
    >>> deletion(np.arange(2, 9), vocab, 0.3, np.random.default_rng(1)).tolist()
    [2, 3, 5, 6, 7, 8]
    """
    return tokens[~iid(tokens, vocab, rate, rng)]


def infilling(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Replace rate * n tokens, in spans of Poisson(3) tokens at random places, with one mask a span. The last span is truncated.

    >>> vocab = Vocab(9, {"mask": 1}, np.arange(9) < 2)
    >>> infilling(np.arange(2, 9), vocab, 0.5, np.random.default_rng(2)).tolist()
    [2, 3, 1, 6, 1, 8]
    """
    num_masked = min(stochastic_round(len(tokens) * rate, rng), len(tokens))
    if not num_masked:
        return tokens
    # Draw lengths until they cover enough. 4 * masked / 3 lengths of mean 3 almost always suffice; else less is masked.
    lengths = rng.poisson(MEAN_INFILL_TOKENS, 8 + 4 * num_masked // MEAN_INFILL_TOKENS)
    ends = lengths.cumsum()
    count = int(ends.searchsorted(num_masked)) + 1
    lengths, ends = lengths[:count], ends[:count].clip(max=num_masked)
    lengths[-1:] = ends[-1:] - (ends[-2] if count > 1 else 0)
    kept_before = np.sort(rng.integers(0, len(tokens) - ends[-1] + 1, len(lengths)))
    removed = np.repeat(kept_before, lengths) + np.arange(ends[-1])
    return np.insert(np.delete(tokens, removed), kept_before, vocab.mask)


def permutation(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Shuffle the sentences; text after the last full stop counts as one. `rate` is ignored.

    >>> vocab = Vocab(9, {}, np.arange(9) < 2, spelling=tuple(b" a" if i != 5 else b"!" for i in range(9)))
    >>> permutation(np.array([2, 5, 3, 4, 5, 6]), vocab, 1.0, np.random.default_rng(0)).tolist()
    [6, 2, 5, 3, 4, 5]
    """
    sentences = np.split(tokens, np.flatnonzero(vocab.sentences(tokens))[1:])
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def rotation(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Rotate the text to start at a token drawn uniformly. `rate` is ignored.

    >>> vocab = Vocab(9, {}, np.arange(9) < 2)
    >>> rotation(np.arange(2, 9), vocab, 1.0, np.random.default_rng(0)).tolist()
    [6, 7, 8, 2, 3, 4, 5]
    """
    return np.roll(tokens, -int(rng.random() * len(tokens)))


CORRUPTIONS: dict[str, Corruption] = {
    "masking": masking,
    "deletion": deletion,
    "infilling": infilling,
    "permutation": permutation,
    "rotation": rotation,
}


def corrupt(
    names: Sequence[Damage], tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator
) -> np.ndarray:
    """Apply several corruptions in the given order.

    >>> vocab = Vocab(9, {"mask": 1}, np.arange(9) < 2)
    >>> corrupt(("rotation", "deletion"), np.arange(2, 9), vocab, 0.3, np.random.default_rng(0)).tolist()
    [2, 3, 4, 5]
    """
    for name in names:
        tokens = CORRUPTIONS[name](tokens, vocab, rate, rng)
    return tokens
