"""Next sentence prediction: does the second segment follow the first? (BERT, Devlin 2019, section 3.1)

    [CLS] the man went to the store [SEP] he bought milk [SEP]            follows (0)
    [CLS] the man went to the store [SEP] penguins cannot fly [SEP]       from another document (1)

The question is asked at [CLS], through BERT's pooler. BERT is `NSP() + MLM()`: the pair is laid out first, and the
masks are then drawn on what was laid out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from firth.data import layout
from firth.model.lm import LM
from firth.model.shape import Reads, Shape
from firth.objectives.objective import Objective, asked, choice_loss, correct
from firth.text.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs


def pooled(width: int, answers: int) -> nn.Sequential:
    """BERT's pooler and a classifier: width -> width -> tanh -> answers, initialised as there."""
    pooler, classifier = nn.Linear(width, width), nn.Linear(width, answers)
    for linear in (pooler, classifier):
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
    return nn.Sequential(pooler, nn.Tanh(), classifier)


@dataclass(frozen=True)
class NSP(Objective):
    """From {"first", "second", "other"}: half the time second follows first, half the time other stands there.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"first": np.array([5]), "second": np.array([6, 7]), "other": np.array([8])}
    >>> seen = NSP(follows=1.0).view(example, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["next"].tolist()
    ([1, 5, 2, 6, 7, 2], [0, -100, -100, -100, -100, -100])
    """

    targets: ClassVar[dict[str, str]] = {"next": "next"}
    measures: ClassVar[dict[str, str]] = {"next_accuracy": "next"}

    follows: float = 0.5

    def reads(self) -> Reads:
        return "both"

    def parts(self, shape: Shape) -> dict[str, nn.Module]:
        return {"next": pooled(shape.width, 2)}

    def view(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        stranger = rng.random() >= self.follows
        shown = layout.pair(example["first"], example["other" if stranger else "second"], vocab)
        answer = np.full(len(shown["tokens"]), IGNORE)
        answer[0] = stranger
        return shown | {"next": answer}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, answers = asked(outputs["hidden"], batch["next"])
        scores = model.parts["next"](states)  # (N, 2)
        return {"next": choice_loss(scores, answers), "next_accuracy": correct(scores, answers)}
