"""Learned mixture of the layers of a model (ELMo: Peters 2018, equation 1).

    scale * sum over layers of softmax(weights)[layer] * states[layer]

>>> mixture = ScalarMix(layers=2)
>>> mixture(torch.tensor([[[1.0, 3.0]], [[3.0, 5.0]]])).tolist()
[[2.0, 4.0]]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ScalarMix(nn.Module):
    """Weighted mean of the states of all layers: (layers, ..., width) -> (..., width); initially their plain mean.

    Args:
        layers: Number of layers.
        frozen: Whether the model below is run without gradient and without dropout.
    """

    def __init__(self, layers: int, frozen: bool = False):
        super().__init__()
        self.layers, self.frozen = layers, frozen
        self.weights = nn.Parameter(torch.zeros(layers))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, states: Tensor) -> Tensor:
        weights = self.weights.softmax(0)
        # Under autocast the states are bf16 and the weights fp32; tensordot needs one dtype.
        return self.scale * torch.tensordot(weights, states.to(weights.dtype), 1)
