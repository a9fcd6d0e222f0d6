"""Layer mixture: a task head on a weighted sum of all layers, frozen or not, as ELMo is used (Peters 2018, section 3.2).

`LayerMixture() + TokenClassification()` tags from the frozen states of a pretrained model: the task learns its head, one
weight for each layer and a scale, and the model stays unchanged. Lower layers represent more syntax, upper ones more meaning.

>>> from firth.objectives.token_classification import TokenClassification
>>> (LayerMixture() + TokenClassification()).labels
{'tags': 'tags'}
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from firth.model.config import ModelConfig
from firth.model.layer_mixture import ScalarMix
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.types import Batch, Outputs


@dataclass(frozen=True)
class LayerMixture(Objective):
    """Give the objective that it is added to a mixture of all layers as hidden state: h = gamma * sum of s_l h_l, s a softmax.

    It predicts nothing itself and has no loss.

    Args:
        frozen: Run the model without gradient and without dropout, so that it stays unchanged.
    """

    keeps_fields: ClassVar[bool] = True
    standalone: ClassVar[bool] = False

    frozen: bool = True

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset()

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"mixture": ScalarMix(config.num_layers + 1)}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        training = model.training
        model.train(training and not self.frozen)
        with torch.no_grad() if self.frozen else nullcontext():
            states = model.all_hidden_states(batch)  # (num_layers + 1, ..., T, hidden_size)
        model.train(training)
        return {"hidden": model.heads["mixture"](states)}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {}

    def forward_flops(self, model: LM, batch: Batch) -> float:
        total = super().forward_flops(model, batch)
        # For a model whose weights are frozen, the trainer subtracts the backward (`firth.model.flops.trained_share`).
        trainable = any(p.requires_grad for p in model.stack.parameters())
        return total / 3 if self.frozen and trainable else total
