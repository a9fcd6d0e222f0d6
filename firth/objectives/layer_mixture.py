"""A task that reads a mixture of all layers of a model, frozen or not: how ELMo is used (Peters 2018, section 3.2).

`Mixed() + Tagging()` tags from the frozen states of a pretrained model: the task learns its head, one weight for each
layer and a scale, and the model learns nothing. Lower layers know more of grammar and upper ones more of meaning; the
task finds what it needs.

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
    """Gives the objective that it is added to a learnt mixture of all layers for its hidden states; asks nothing itself.

    frozen: the model is read without gradient and without dropout, so that it stays what it was.
    """

    keeps_fields: ClassVar[bool] = True
    standalone: ClassVar[bool] = False

    frozen: bool = True

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset()

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"mixture": ScalarMix(config.num_layers + 1)}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        learning = model.training
        model.train(learning and not self.frozen)
        with torch.no_grad() if self.frozen else nullcontext():
            states = model.all_hidden_states(batch)  # (depth + 1, ..., T, width)
        model.train(learning)
        return {"hidden": model.heads["mixture"](states)}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {}

    def forward_flops(self, model: LM, batch: Batch) -> float:
        whole = super().forward_flops(model, batch)
        # A model whose weights are frozen themselves is counted so by the loop (`firth.model.flops.trained_share`).
        learns = any(p.requires_grad for p in model.stack.parameters())
        return whole / 3 if self.frozen and learns else whole
