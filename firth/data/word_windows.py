"""Running text with how often each word occurs in it: what word2vec draws its words by (Mikolov 2013, section 2).

    kept    a word that makes up the share f of the text stays with probability sqrt(t / f) + t / f, 1 at most: the
            frequent ones are seen less often, and their neighbours come nearer    (word2vec.c's; the paper's is 1 - sqrt(t / f))
    noise   words to tell the true ones from are drawn in proportion to their count ** 0.75

Both are facts about a text, one number for each id, and go with every example of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from firth.data.source import Source
from firth.tokenizer.vocab import Vocab
from firth.types import Example, UserError


def keep_probabilities(counts: np.ndarray, sample: float) -> np.ndarray:
    """The probability of each id to stay: counts (V,) -> (V,). sample: t above; 0 keeps everything.

    >>> keep_probabilities(np.array([0, 1, 100]), sample=0.01).round(2).tolist()
    [0.0, 1.0, 0.11]
    """
    if not sample:
        return (counts > 0).astype(float)
    ratio = sample * counts.sum() / np.maximum(counts, 1)
    chance: np.ndarray = np.where(counts > 0, np.minimum(np.sqrt(ratio) + ratio, 1.0), 0.0)
    return chance


def noise_distribution(counts: np.ndarray, power: float) -> np.ndarray:
    """Cumulative probabilities of the ids as noise: counts (V,) -> (V,).

    >>> noise_distribution(np.array([0, 1, 16]), power=0.75).round(2).tolist()
    [0.0, 0.11, 1.0]
    """
    mass = np.where(counts > 0, counts.astype(float) ** power, 0.0).cumsum()
    table: np.ndarray = mass / mass[-1]
    return table


MIN_KEPT_WORDS = 8
"""Words: a text of which subsampling keeps fewer on average often has no two neighbors left in a step."""


@dataclass(frozen=True, eq=False)
class WordWindows(Source):
    """The examples of `text`, each with {"kept" (V,), "noise" (V,)}. counts_of: how often each id occurs; control tokens
    and the unknown word do not count, and so are neither kept nor drawn."""

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
            cure = "" if rare else ", or set examples.subsampling_threshold=0, which keeps every word"
            raise UserError(
                f"the text has too few words for word2vec: {known:,} that the tokenizer knows{cause}; word2vec needs "
                f"{MIN_KEPT_WORDS} or more to find neighbors in, so train on a longer text{cure}"
            )
        object.__setattr__(self, "_facts", {"kept": chances, "noise": noise_distribution(self.counts_of, self.power)})

    @staticmethod
    def count(tokens: np.ndarray, vocab: Vocab) -> np.ndarray:
        """How often each id occurs in the running text; control tokens count as nothing."""
        return np.where(vocab.special, 0, np.bincount(tokens, minlength=vocab.size))

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> Example:
        facts: Example = self.__dict__["_facts"]
        return self.text[index] | facts
