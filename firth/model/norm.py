"""Norms: LayerNorm (Ba 2016) and RMSNorm (Zhang and Sennrich 2019), each with or without gain and offset.

>>> import torch
>>> RMSNorm(4, weight=False, bias=False, eps=0.0)(torch.tensor([1.0, -1.0, 1.0, -1.0]) * 3).tolist()
[1.0, -1.0, 1.0, -1.0]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from firth.model.config import ModelConfig
from firth.model.fused import normalized


class _Norm(nn.Module):
    """A norm over the last axis, (..., width) -> (..., width).

    Args:
        width: Size of the last axis.
        weight: Whether there is a gain.
        bias: Whether there is an offset.
        eps: Added to the variance.
        to_maps: Whether the output goes to linear maps only. Autocast rounds it there, so it is written rounded.
    """

    center: bool

    def __init__(self, width: int, weight: bool, bias: bool, eps: float, to_maps: bool = False):
        super().__init__()
        self.width, self.eps, self.to_maps = width, eps, to_maps
        self.weight = nn.Parameter(torch.ones(width)) if weight else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if self.to_maps and torch.is_autocast_enabled(device) else None
        return normalized(x, self.weight, self.bias, self.eps, self.center, dtype)


class LayerNorm(_Norm):
    """Layer norm: zero mean and unit variance, then gain and offset if there are any (see `_Norm`)."""

    center = True


class RMSNorm(_Norm):
    """RMS norm: unit root mean square, then gain if there is one (see `_Norm`)."""

    center = False


def make_norm(config: ModelConfig, width: int = 0, to_maps: bool = False) -> nn.Module:
    """Return the configured norm over `width` numbers (0: hidden_size); `to_maps` as in `_Norm`."""
    width = width or config.hidden_size
    if config.norm.type == "layer":
        return LayerNorm(width, config.norm.weight, config.norm.bias, config.norm.eps, to_maps)
    return RMSNorm(width, config.norm.weight, False, config.norm.eps, to_maps)
