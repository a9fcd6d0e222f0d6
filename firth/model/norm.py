"""The two norms: LayerNorm (Ba 2016) and RMSNorm (Zhang and Sennrich 2019), each with or without gain and offset.

>>> import torch
>>> RMSNorm(4, weight=False, eps=0.0)(torch.tensor([1.0, -1.0, 1.0, -1.0]) * 3).tolist()
[1.0, -1.0, 1.0, -1.0]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.model.fused import unit
from firth.model.shape import Shape


class LayerNorm(nn.Module):
    """(..., width) -> (..., width): zero mean, unit variance, then gain and offset where there are any."""

    def __init__(self, width: int, weight: bool, bias: bool, eps: float):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width)) if weight else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self.width,), self.weight, self.bias, self.eps)


class RMSNorm(nn.Module):
    """(..., width) -> (..., width): unit root mean square, then gain where there is one.

    to_maps: its output goes to linear maps alone, so that autocast would round it in any case: it is written rounded.
    """

    def __init__(self, width: int, weight: bool, eps: float, to_maps: bool = False):
        super().__init__()
        self.width, self.eps, self.rounds = width, eps, to_maps and not weight
        self.weight = nn.Parameter(torch.ones(width)) if weight else None

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if self.rounds and torch.is_autocast_enabled(device) else None
        y = unit(x, self.eps, dtype)
        return y if self.weight is None else y * self.weight


def make_norm(shape: Shape, width: int = 0, to_maps: bool = False) -> nn.Module:
    """The norm that a shape asks for, over `width` numbers (0: its own width). to_maps: as in `RMSNorm`."""
    width = width or shape.width
    if shape.norm == "layer":
        return LayerNorm(width, shape.norm_weight, shape.norm_bias, shape.norm_eps)
    return RMSNorm(width, shape.norm_weight, shape.norm_eps, to_maps)
