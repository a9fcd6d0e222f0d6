"""Tagging: a class for each word, read at its first token (BERT, Devlin 2019, section 5.3; Collobert 2011 before it).

tokens   [CLS]  the  fir  ##th  of  [SEP]
tags       -    DT   NN     -   IN    -
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from firth.data import layout
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.model import LM
from firth.objectives.classification import classification_head
from firth.objectives.objective import DataStats, Objective, choice_loss, num_correct, supervised
from firth.tokenizer.vocab import Vocab
from firth.types import Batch, Example, Outputs


@dataclass(frozen=True)
class TokenClassification(Objective):
    """Which tag each word has: {"tokens", "tags"}, the tag's number at the first token of a word and IGNORE elsewhere.

    classes: the names of the tags. left: whether the text is read from left to right, as a decoder must (None: as the shape
    does); a word's tag is then read from what stands before it and its own first token.

    >>> vocab = Vocab(size=9, roles={}, special=np.zeros(9, bool))
    >>> example = {"tokens": np.array([5, 6, 7]), "tags": np.array([1, -100, 0]), "record": 4}
    >>> sorted(TokenClassification(classes=("NN", "VB")).view(example, vocab, np.random.default_rng(0)))
    ['tags', 'tokens']
    """

    targets: ClassVar[dict[str, str]] = {"tags": "tags"}
    measures: ClassVar[dict[str, str]] = {"accuracy": "tags"}

    classes: tuple[str, ...] = ()
    left: bool | None = None

    def needs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset({"tokens", "tags"})

    def reads(self) -> AttentionPattern:
        return "left" if self.left else "any"

    def fitted(self, shape: ModelConfig) -> Objective:
        return self if self.left is not None else dataclasses.replace(self, left="both" not in shape.honours)

    def told(self, known: Callable[[], DataStats]) -> Objective:
        return self if self.classes else dataclasses.replace(self, classes=known().classes)

    def parts(self, shape: ModelConfig) -> dict[str, nn.Module]:
        return {"tags": classification_head(shape.width, len(self.classes))}

    def view(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        order = layout.causal(len(example["tokens"])) if self.left else {}
        return {"tokens": example["tokens"], "tags": example["tags"]} | order

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, wanted = supervised(outputs["hidden"], batch["tags"])
        scores = model.parts["tags"](states)  # (N, classes)
        return {"tags": choice_loss(scores, wanted), "accuracy": num_correct(scores, wanted)}
