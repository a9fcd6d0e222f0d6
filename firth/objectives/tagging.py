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

from firth.model.lm import LM
from firth.model.shape import Shape
from firth.objectives.classification import answers
from firth.objectives.objective import Objective, asked, choice_loss, correct
from firth.text.vocab import Vocab
from firth.types import Batch, Example, Outputs


@dataclass(frozen=True)
class Tagging(Objective):
    """Which tag each word has: {"tokens", "tags"}, the tag's number at the first token of a word and IGNORE elsewhere.

    classes: the names of the tags. How much of the text a word's tag is read from is the trunk's affair.

    >>> vocab = Vocab(size=9, roles={}, special=np.zeros(9, bool))
    >>> example = {"tokens": np.array([5, 6, 7]), "tags": np.array([1, -100, 0]), "record": 4}
    >>> sorted(Tagging(classes=("NN", "VB")).view(example, vocab, np.random.default_rng(0)))
    ['tags', 'tokens']
    """

    targets: ClassVar[dict[str, str]] = {"tags": "tags"}
    measures: ClassVar[dict[str, str]] = {"accuracy": "tags"}

    classes: tuple[str, ...] = ()

    def named(self, classes: Callable[[], tuple[str, ...]]) -> Objective:
        return self if self.classes else dataclasses.replace(self, classes=classes())

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        return {"tags": answers(shape.width, len(self.classes))}

    def view(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return {"tokens": example["tokens"], "tags": example["tags"]}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, wanted = asked(outputs["hidden"], batch["tags"])
        scores = model.parts["tags"](states)  # (N, classes)
        return {"tags": choice_loss(scores, wanted), "accuracy": correct(scores, wanted)}
