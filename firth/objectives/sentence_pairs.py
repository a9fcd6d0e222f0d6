"""Pairs of sentences: next sentence (BERT) and sentence order (ALBERT).

Base of the sentence pair objectives, NSP and SOP: two text segments in one row and a binary label.

    [CLS] first [SEP] second [SEP]      token types 0 0 .. 1 1

The label is predicted at [CLS], through BERT's pooler (Devlin 2019, section 3.1).

Next sentence prediction: does the second text segment follow the first? (BERT, Devlin 2019, section 3.1)

    [CLS] the man went to the store [SEP] he bought milk [SEP]            follows (0)
    [CLS] the man went to the store [SEP] penguins cannot fly [SEP]       from another document (1)

BERT is `NSP() + MLM()`: the pair is built first, then masked.

Sentence order prediction: are two neighboring text segments swapped? (ALBERT, Lan 2020, section 3.1)

    [CLS] the man went to the store [SEP] he bought milk [SEP]            as written (0)
    [CLS] he bought milk [SEP] the man went to the store [SEP]            swapped (1)

Both segments are always from one text, so the topic, which is enough for most of NSP, does not help here.
ALBERT is `SOP() + MLM(noise="ngrams")`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from firth.data import attention_fields
from firth.fields import Share
from firth.model.config import ModelConfig
from firth.model.heads import pooled
from firth.model.model import LM
from firth.objectives.objective import Objective, choice_loss, num_correct, supervised
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Metric, Outputs


class SentencePairObjective(Objective):
    """Base of objectives that predict a binary label of two text segments.

    Attributes:
        label_field: The name of the loss term, the batch field and the head.
    """

    label_field: ClassVar[str]

    attention = "bidirectional"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {self.label_field: pooled(config.hidden_size, 2)}

    def build_pair(self, first: np.ndarray, second: np.ndarray, label: bool, vocab: Vocab) -> Example:
        """Return both segments in one row, with the label at [CLS]."""
        shown = attention_fields.pair(first, second, vocab)
        labels = np.full(len(shown["tokens"]), IGNORE)
        labels[0] = label
        return shown | {self.label_field: labels}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, labels = supervised(outputs["hidden"], batch[self.label_field])
        scores = model.heads[self.label_field](states)  # (N, 2)
        return {
            self.label_field: choice_loss(scores, labels),
            f"{self.label_field}_accuracy": num_correct(scores, labels),
        }


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
