"""A price on the weights, lambda Omega(theta) with Omega the sum of their squares: an addend for any objective.

    MLM() + Penalty(weight=1e-4)            mean loss + 1e-4 * sum of theta^2

Every term of firth is a sum over targets divided by their number. A penalty has no targets, so it is charged once per
token and counted by tokens: whatever the batch and however it is cut, it comes to lambda Omega(theta). AdamW's decoupled
decay (`optimizer.weight_decay`) is usually the better tool; this is the one that formulas of semi-supervised losses speak of.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs
from firth.validated import PositiveFloat


@dataclass(frozen=True)
class WeightPenalty(Objective):
    """weight: lambda. Biases and the gains of norms are not charged.

    >>> vocab = Vocab(size=9, roles={}, special=np.arange(9) < 3)
    >>> WeightPenalty().build_example({"tokens": np.array([5, 6])}, vocab, np.random.default_rng(0))["penalty"].tolist()
    [0, 0]
    """

    labels: ClassVar[dict[str, str]] = {"penalty": "penalty"}
    output_fields: ClassVar[frozenset[str]] = frozenset()
    keeps_fields: ClassVar[bool] = True
    standalone: ClassVar[bool] = False

    weight: PositiveFloat = 1e-4

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset()

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return example | {"penalty": np.zeros_like(example["tokens"])}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        squares = torch.stack([p.float().square().sum() for p in model.parameters() if p.ndim > 1])
        return {"penalty": self.weight * squares.sum() * (batch["penalty"] != IGNORE).sum()}
