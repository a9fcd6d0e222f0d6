"""Word frequencies of a text for word2vec's subsampling and negative sampling (Mikolov 2013, section 2).

    kept    a word with relative frequency f is kept with probability min(1, sqrt(t / f) + t / f): frequent words are seen less
            often, and their neighbors come closer    (as in word2vec.c; the paper has 1 - sqrt(t / f))
    noise   negative samples are drawn in proportion to count ** 0.75

Both are properties of the text, one number for each id, and are added to every example.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from firth.data.source import Source
from firth.tokenizer.vocab import Vocab
from firth.types import Example, UserError


def keep_probabilities(counts: np.ndarray, sample: float) -> np.ndarray:
    """Return the probability to keep each id: (V,) -> (V,).

    Args:
        counts: Count of each id, (V,).
        sample: The threshold t; 0 keeps everything.

    >>> keep_probabilities(np.array([0, 1, 100]), sample=0.01).round(2).tolist()
    [0.0, 1.0, 0.11]
    """
    if not sample:
        return (counts > 0).astype(float)
    ratio = sample * counts.sum() / np.maximum(counts, 1)
    chance: np.ndarray = np.where(counts > 0, np.minimum(np.sqrt(ratio) + ratio, 1.0), 0.0)
    return chance


def noise_distribution(counts: np.ndarray, power: float) -> np.ndarray:
    """Return the cumulative probabilities of the ids as negative samples: counts (V,) -> (V,).

    >>> noise_distribution(np.array([0, 1, 16]), power=0.75).round(2).tolist()
    [0.0, 0.11, 1.0]
    """
    mass = np.where(counts > 0, counts.astype(float) ** power, 0.0).cumsum()
    table: np.ndarray = mass / mass[-1]
    return table


MIN_KEPT_WORDS = 8
"""Number of words: with fewer words kept on average, a step often has no two neighbors."""


@dataclass(frozen=True, eq=False)
class WordWindows(Source):
    """The examples of a text, each with {"kept" (V,), "noise" (V,)}.

    Args:
        text: The examples.
        counts_of: Count of each id, (V,). Control tokens and the unknown word have count 0, so they are neither kept nor drawn.
        sample: The subsampling threshold.
        power: Exponent of the counts for negative sampling.

    Raises:
        UserError: The text has too few known words.
    """

    text: Source
    counts_of: np.ndarray
    sample: float
    power: float

    def __post_init__(self) -> None:
        if not self.counts_of.any():
            raise UserError("the text holds no word that the tokenizer knows: train the tokenizer on it")
        chances = keep_probabilities(self.counts_of, self.sample)
        if (expected := float(chances @ self.counts_of)) < MIN_KEPT_WORDS:
            known = int(self.counts_of.sum())
            rare = known < MIN_KEPT_WORDS
            cause = (
                "" if rare else f", of which examples.subsampling_threshold={self.sample:g} keeps about {expected:.2g}"
            )
            advice = "" if rare else ", or set examples.subsampling_threshold=0, which keeps every word"
            raise UserError(
                f"the text has too few words for word2vec: {known:,} that the tokenizer knows{cause}; word2vec needs "
                f"{MIN_KEPT_WORDS} or more to find neighbors in, so train on a longer text{advice}"
            )
        object.__setattr__(
            self, "_word_stats", {"kept": chances, "noise": noise_distribution(self.counts_of, self.power)}
        )

    @staticmethod
    def count(tokens: np.ndarray, vocab: Vocab) -> np.ndarray:
        """Return the count of each id in a text; control tokens count 0."""
        return np.where(vocab.special, 0, np.bincount(tokens, minlength=vocab.size))

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> Example:
        word_stats: Example = self.__dict__["_word_stats"]
        return self.text[index] | word_stats
