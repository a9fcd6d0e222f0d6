"""L2 weight penalty, lambda * (sum of squared weights), to be added to any objective.

    MLM() + WeightPenalty(weight=1e-4)            mean loss + 1e-4 * sum of theta^2

Every loss term is a sum over labels divided by their number. A penalty has no labels, so it is added once per token and
counted by tokens: for any batch and any micro-batches it equals lambda * sum of theta^2. AdamW's decoupled decay
(`optimizer.weight_decay`) is usually the better choice; this is the term of the formulas of semi-supervised losses.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from firth.fields import PositiveFloat
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs


@dataclass(frozen=True)
class WeightPenalty(Objective):
    """Penalize the sum of the squared weights, without biases and norm gains.

    It shows and predicts nothing itself. Loss: weight * sum of theta^2.

    Args:
        weight: lambda.

    >>> vocab = Vocab(size=9, roles={}, special=np.arange(9) < 3)
    >>> WeightPenalty().build_example({"tokens": np.array([5, 6])}, vocab, np.random.default_rng(0))["penalty"].tolist()
    [0, 0]
    """

    labels = {"penalty": "penalty"}

    weight: PositiveFloat = 1e-4

    inputs = frozenset()

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return example | {"penalty": np.zeros_like(example["tokens"])}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        squares = torch.stack([p.float().square().sum() for p in model.parameters() if p.ndim > 1])
        return {"penalty": self.weight * squares.sum() * (batch["penalty"] != IGNORE).sum()}
