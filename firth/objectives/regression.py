"""Regression: predict a number from one hidden state, with the squared error (BERT on STS-B, Devlin 2019, section 4.1).

    a man plays a guitar / a man is playing music         3.2 of 5

The labels are standardized, so that prices and ratings are learned with the same learning rate; the head of the exported
model is converted to the units of the data. (The original learns STS-B's 0 to 5 as they are: `mean=0 std=1`.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor, nn

from firth.fields import PositiveFloat
from firth.model.config import ModelConfig
from firth.model.heads import standardized_head
from firth.model.model import LM
from firth.objectives.classification import ReadoutObjective, label_at_position
from firth.objectives.objective import DataStats, supervised
from firth.tokenizer.vocab import Vocab
from firth.types import Batch, Example, Metric, Outputs


@dataclass(frozen=True)
class Regression(ReadoutObjective):
    """Predict the number of a text: {"tokens", "score"} (and "token_type_ids" of a pair).

    Shown: the whole text. Predicted: z = (score - mean) / std, at the readout position. Loss: (a h + b - z)^2. The metric
    "squared_error" is in the units of the data.

    Args:
        position: See `ReadoutObjective`.
        mean: Subtracted from the scores; None: the mean of the data.
        std: The scores are divided by it; None: the standard deviation of the data.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"tokens": np.array([1, 5, 2]), "score": 4.0}
    >>> Regression(mean=3.0, std=2.0).build_example(example, vocab, np.random.default_rng(0))["score"].tolist()
    [0.5, -100.0, -100.0]
    """

    labels = {"score": "score"}
    metrics = {"squared_error": Metric("score")}

    mean: float | None = None
    std: PositiveFloat | None = None

    inputs = frozenset({"tokens", "score"})

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Self:
        mean = stats().mean if self.mean is None else self.mean
        return dataclasses.replace(super().configure(stats, config), mean=mean, std=self.std or stats().std)

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"score": standardized_head(config.hidden_size, self.mean or 0.0, self.std or 1.0)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        score = (float(example["score"]) - (self.mean or 0.0)) / (self.std or 1.0)
        return label_at_position("score", score, example, self.readout, vocab)

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, targets = supervised(outputs["hidden"], batch["score"])
        error = (model.heads["score"](states)[:, 0].float() - targets).square().sum()
        return {"score": error, "squared_error": error.detach() * (self.std or 1.0) ** 2}
