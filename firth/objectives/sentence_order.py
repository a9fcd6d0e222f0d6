"""Sentence order prediction: are two neighboring text segments swapped? (ALBERT, Lan 2020, section 3.1)

    [CLS] the man went to the store [SEP] he bought milk [SEP]            as written (0)
    [CLS] he bought milk [SEP] the man went to the store [SEP]            swapped (1)

Both segments are always from one text, so the topic, which is enough for most of NSP, does not help here.
ALBERT is `SOP() + MLM(noise="ngrams")`.
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
class SOP(SentencePairObjective):
    """Predict whether two segments are swapped: {"first", "second"}.

    Shown: the two segments, in either order. Predicted: 0 as written, 1 swapped, at [CLS]. Loss: -log softmax(A h + b)[label].

    Args:
        swapped: Probability that they are swapped.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"first": np.array([5]), "second": np.array([6, 7])}
    >>> seen = SOP(swapped=1.0).build_example(example, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["order"].tolist()
    ([1, 6, 7, 2, 5, 2], [1, -100, -100, -100, -100, -100])
    """

    labels = {"order": "order"}
    metrics = {"order_accuracy": Metric("order")}
    label_field: ClassVar[str] = "order"

    swapped: Share = 0.5

    inputs = frozenset({"first", "second"})

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        first, second = example["first"], example["second"]
        swap = bool(rng.random() < self.swapped)
        return self.build_pair(second, first, swap, vocab) if swap else self.build_pair(first, second, swap, vocab)
