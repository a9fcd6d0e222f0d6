"""Next sentence prediction: does the second text segment follow the first? (BERT, Devlin 2019, section 3.1)

    [CLS] the man went to the store [SEP] he bought milk [SEP]            follows (0)
    [CLS] the man went to the store [SEP] penguins cannot fly [SEP]       from another document (1)

BERT is `NSP() + MLM()`: the pair is built first, then masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from firth.fields import Share
from firth.objectives.sentence_pairs import SentencePairObjective
from firth.tokenizer.vocab import Vocab
from firth.types import Example, Metric


@dataclass(frozen=True)
class NSP(SentencePairObjective):
    """Predict whether the second segment follows the first: {"first", "second", "other"}.

    Shown: first and second, or first and other. Predicted: 0 if it follows, 1 if it is from another document, at [CLS].
    Loss: -log softmax(A h + b)[label].

    Args:
        follows: Probability that the pair is first and second.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"first": np.array([5]), "second": np.array([6, 7]), "other": np.array([8])}
    >>> seen = NSP(follows=1.0).build_example(example, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["next"].tolist()
    ([1, 5, 2, 6, 7, 2], [0, -100, -100, -100, -100, -100])
    """

    labels = {"next": "next"}
    metrics = {"next_accuracy": Metric("next")}
    label_field: ClassVar[str] = "next"

    follows: Share = 0.5

    inputs = frozenset({"first", "second", "other"})

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        random_segment = bool(rng.random() >= self.follows)
        second = example["other" if random_segment else "second"]
        return self.build_pair(example["first"], second, random_segment, vocab)
