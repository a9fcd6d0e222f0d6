"""How order enters: learned and sinusoidal vectors added to the embeddings, rotary turns, T5's relative bias.
XLNet's relative positions, which depend on the query, have a file of their own (`firth.model.relative_distance`).

All of them read explicit integer positions, never the slot in the row, so that packing several documents into a
row, a permuted order and a cache with gaps change nothing.

>>> import torch
>>> relative_bucket(torch.tensor([0, 1, 7, 8, 200, -1, -200]), buckets=32, distance=128, bidirectional=True).tolist()
[0, 17, 23, 24, 31, 1, 15]
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

from firth.model.config import ModelConfig


def sinusoidal(positions: Tensor, width: int, interleaved: bool = True) -> Tensor:
    """Vaswani 2017, section 3.5: positions (..., T) -> (..., T, width) float32, sines and cosines in turns.

    Else all sines before all cosines, as tensor2tensor, fairseq and Marian have it.
    """
    angles = sinusoid_frequencies(positions, width)
    return torch.stack((angles.sin(), angles.cos()), -1 if interleaved else -2).flatten(-2)


def sinusoid_frequencies(positions: Tensor, width: int) -> Tensor:
    """The angles of `sinusoidal`: positions (..., T) -> (..., T, width / 2) float32."""
    rates = torch.exp(torch.arange(0, width, 2, device=positions.device) * (-math.log(10000.0) / width))
    return positions[..., None].float() * rates


def rope_angles(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """cos (B, T, 1, head_width), both halves alike, and sin (B, T, 1, head_width / 2) of the rotary angles (Su 2021)."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[:, :, None, None].float() * scaled_frequencies(config.rope_theta**-pairs, config)
    cos = angles.cos()
    return torch.cat((cos, cos), -1), angles.sin() * config.rope_sign


def scaled_frequencies(rates: Tensor, config: ModelConfig) -> Tensor:
    """The rates of turning of a model that is read beyond the rows it was trained on (`Shape.rotary_scaling`).

    All `rotary_factor` times as slow (Chen 2023, position interpolation), or only the slow ones (Llama 3.1): by how often
    each comes round within the rows of the training.
    """
    if config.rope_scaling == "none":
        return rates
    slow = rates / config.rope_factor
    if config.rope_scaling == "linear":
        return slow
    rounds = config.rope_original_max_positions * rates / (2 * math.pi)
    kept = (
        (rounds - config.rope_low_freq_factor) / (config.rope_high_freq_factor - config.rope_low_freq_factor)
    ).clamp(0, 1)
    return kept * rates + (1 - kept) * slow


def rotation(cos: Tensor, sin: Tensor) -> Tensor:
    """What `turns` gives, as matrices to multiply a head with from the right: (B, T, head_width, head_width)."""
    itself, partner = _places(cos.shape[-1], cos.device)
    both = torch.cat((sin, -sin), -1)
    return torch.addcmul(cos.mT * itself, both.mT, partner)


@cache
def _places(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ones where a number stays, and where it goes to its partner, half a head on: two of (width, width)."""
    itself = torch.eye(width, device=device)
    return itself, itself.roll(width // 2, 1)


def relative_bucket(distance_to: Tensor, buckets: int, distance: int, bidirectional: bool) -> Tensor:
    """T5's bucket of a relative position (Raffel 2019, section 2.1): exact when near, logarithmic when far.

    distance_to: key position minus query position, any integer tensor. Both ways: half of the buckets for keys after.
    """
    base = torch.zeros_like(distance_to)
    if bidirectional:
        buckets //= 2
        base = (distance_to > 0) * buckets
        near = distance_to.abs()
    else:
        near = (-distance_to).clamp(min=0)
    exact = buckets // 2
    ratio = torch.log(near.clamp(min=1).float() / exact) / math.log(distance / exact)
    far = exact + (ratio * (buckets - exact)).to(near.dtype)
    return base + torch.where(near < exact, near, far.clamp(max=buckets - 1))


class RelativeBias(nn.Module):
    """T5's bias on the scores: one learned number per (bucket, head), shared by all blocks of a trunk."""

    def __init__(self, config: ModelConfig, bidirectional: bool):
        super().__init__()
        self.distance, self.bidirectional = config.relative_max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(config.relative_buckets, config.num_heads))

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Positions of the queries (B, T) and of the keys (B, S) -> bias (B, heads, T, S)."""
        between = keys[:, None, :] - queries[:, :, None]
        index = relative_bucket(between, len(self.weight), self.distance, self.bidirectional)
        return self.weight[index].permute(0, 3, 1, 2)
