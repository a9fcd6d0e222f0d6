"""The five text corruptions of BART (Lewis 2019, section 2.2); the model learns to reconstruct the original text.

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

from firth.data.noise import iid, stochastic_round
from firth.tokenizer.vocab import Vocab

Corruption = Callable[[np.ndarray, Vocab, float, np.random.Generator], np.ndarray]
Damage = Literal["masking", "deletion", "infilling", "permutation", "rotation"]

MEAN_SPAN_TOKENS = 3
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
    lengths = rng.poisson(MEAN_SPAN_TOKENS, 8 + 4 * num_masked // MEAN_SPAN_TOKENS)
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
