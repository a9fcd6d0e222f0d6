"""BART's five ways to damage a text (Lewis 2019, section 2.2); the model is to write the text as it was.

`CORRUPTIONS[name](tokens, vocab, rate, rng)` returns the damaged tokens of a bare text; `rate` is the share of tokens
that masking, deletion and infilling hit. Where nothing can be damaged the text is what it was.

    masking       tokens at random become a mask each                     length is kept
    deletion      tokens at random are gone                               which ones is to be found out
    infilling     spans of Poisson(3) tokens become one mask each         a span of none puts a mask between two tokens
    permutation   the sentences are shuffled                              by UAX #29 (`firth.tokenizer.segmentation`)
    rotation      the text begins at a random token, and goes round       its beginning is to be found out

Spans are of tokens, as in the paper; BART's code draws them over words. `damage` does several, one after the other.

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

from firth.data.noise import iid, stochastic_round
from firth.tokenizer.vocab import Vocab

Corruption = Callable[[np.ndarray, Vocab, float, np.random.Generator], np.ndarray]
Damage = Literal["masking", "deletion", "infilling", "permutation", "rotation"]

MEAN = 3
"""Tokens in a span of `infilling`, on average."""


def masking(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Each token becomes a mask with probability `rate`: (n,) -> (n,).

    >>> vocab = Vocab(9, {"mask": 1}, np.arange(9) < 2)
    >>> masking(np.arange(2, 9), vocab, 0.3, np.random.default_rng(1)).tolist()
    [2, 3, 1, 5, 6, 7, 8]
    """
    return np.where(iid(tokens, vocab, rate, rng), vocab.mask, tokens)


def deletion(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """Each token is left out with probability `rate`.

    >>> vocab = Vocab(9, {"mask": 1}, np.arange(9) < 2)
    >>> deletion(np.arange(2, 9), vocab, 0.3, np.random.default_rng(1)).tolist()
    [2, 3, 5, 6, 7, 8]
    """
    return tokens[~iid(tokens, vocab, rate, rng)]


def infilling(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """rate * n tokens, in spans of Poisson(3) tokens anywhere (the last is cut to that), become one mask a span.

    >>> vocab = Vocab(9, {"mask": 1}, np.arange(9) < 2)
    >>> infilling(np.arange(2, 9), vocab, 0.5, np.random.default_rng(2)).tolist()
    [2, 3, 1, 6, 1, 8]
    """
    hidden = min(stochastic_round(len(tokens) * rate, rng), len(tokens))
    if not hidden:
        return tokens
    # Lengths until they hide enough. 4 * hidden / 3 of mean 3 are too few about never, and then less is hidden.
    lengths = rng.poisson(MEAN, 8 + 4 * hidden // MEAN)
    ends = lengths.cumsum()
    count = int(ends.searchsorted(hidden)) + 1
    lengths, ends = lengths[:count], ends[:count].clip(max=hidden)
    lengths[-1:] = ends[-1:] - (ends[-2] if count > 1 else 0)
    kept_before = np.sort(rng.integers(0, len(tokens) - ends[-1] + 1, len(lengths)))
    gone = np.repeat(kept_before, lengths) + np.arange(ends[-1])
    return np.insert(np.delete(tokens, gone), kept_before, vocab.mask)


def permutation(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """The sentences in a random order; what stands behind the last full stop counts as one. rate says nothing here.

    >>> vocab = Vocab(9, {}, np.arange(9) < 2, spelling=tuple(b" a" if i != 5 else b"!" for i in range(9)))
    >>> permutation(np.array([2, 5, 3, 4, 5, 6]), vocab, 1.0, np.random.default_rng(0)).tolist()
    [6, 2, 5, 3, 4, 5]
    """
    sentences = np.split(tokens, np.flatnonzero(vocab.sentences(tokens))[1:])
    return np.concatenate([sentences[i] for i in rng.permutation(len(sentences))])


def rotation(tokens: np.ndarray, vocab: Vocab, rate: float, rng: np.random.Generator) -> np.ndarray:
    """The text from a token drawn uniformly to its end, and then from its beginning. rate says nothing here.

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
    """Several corruptions, one after the other in the order that they are named in.

    >>> vocab = Vocab(9, {"mask": 1}, np.arange(9) < 2)
    >>> corrupt(("rotation", "deletion"), np.arange(2, 9), vocab, 0.3, np.random.default_rng(0)).tolist()
    [2, 3, 4, 5]
    """
    for name in names:
        tokens = CORRUPTIONS[name](tokens, vocab, rate, rng)
    return tokens
