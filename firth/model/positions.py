"""Position encodings: sinusoidal vectors, rotary angles and T5's relative bias.

XLNet's relative positions, which depend on the query, are in `firth.model.relative_distance`. All encodings use explicit
integer positions and not the slot in the row, so that packing, a permuted order and padding in a cache change nothing.

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
    """Return sinusoidal position vectors (Vaswani 2017, section 3.5).

    Args:
        positions: (..., T).
        width: Even.
        interleaved: Sines and cosines alternate; else all sines come first, as in tensor2tensor, fairseq and Marian.

    Returns:
        (..., T, width) float32.
    """
    angles = sinusoid_frequencies(positions, width)
    return torch.stack((angles.sin(), angles.cos()), -1 if interleaved else -2).flatten(-2)


def sinusoid_frequencies(positions: Tensor, width: int) -> Tensor:
    """Return the angles of `sinusoidal`: positions (..., T) -> (..., T, width / 2) float32."""
    rates = torch.exp(torch.arange(0, width, 2, device=positions.device) * (-math.log(10000.0) / width))
    return positions[..., None].float() * rates


def rope_angles(positions: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Return cosines (B, T, 1, head_dim), the two halves equal, and sines (B, T, 1, head_dim / 2) (Su 2021)."""
    pairs = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32) / config.head_dim
    angles = positions[:, :, None, None].float() * scaled_frequencies(config.position.rope.theta**-pairs, config)
    cos = angles.cos()
    return torch.cat((cos, cos), -1), angles.sin() * config.position.rope.sign


def scaled_frequencies(rates: Tensor, config: ModelConfig) -> Tensor:
    """Return rotary frequencies with context extension (`ModelConfig.position.rope.scaling`).

    All are divided by `rope.factor` (Chen 2023, position interpolation), or only the low ones (Llama 3.1), by how many
    periods of each fit into the original context.
    """
    if config.position.rope.scaling == "none":
        return rates
    scaled = rates / config.position.rope.factor
    if config.position.rope.scaling == "linear":
        return scaled
    periods = config.position.rope.original_max_positions * rates / (2 * math.pi)
    unscaled_share = (
        (periods - config.position.rope.low_freq_factor)
        / (config.position.rope.high_freq_factor - config.position.rope.low_freq_factor)
    ).clamp(0, 1)
    return unscaled_share * rates + (1 - unscaled_share) * scaled


def rotation(cos: Tensor, sin: Tensor) -> Tensor:
    """Return the rotation of `rope_angles` as matrices (B, T, head_dim, head_dim), to multiply a head with from the right."""
    same, partner = _pair_masks(cos.shape[-1], cos.device)
    both = torch.cat((sin, -sin), -1)
    return torch.addcmul(cos.mT * same, both.mT, partner)


@cache
def _pair_masks(width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return matrices that keep each number, and that move it to its partner half a head on: two of (width, width)."""
    same = torch.eye(width, device=device)
    return same, same.roll(width // 2, 1)


def relative_bucket(distance_to: Tensor, buckets: int, distance: int, bidirectional: bool) -> Tensor:
    """Return T5's bucket of a relative position: exact when near, logarithmic when far (Raffel 2020, section 2.1).

    Args:
        distance_to: Key position minus query position, an integer tensor of any shape.
        buckets: Number of buckets.
        distance: Distance from which on all share the last bucket.
        bidirectional: Whether half of the buckets are for keys after the query.
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
    """T5's bias on the scores: one learned number per (bucket, head), shared by all blocks of a stack."""

    def __init__(self, config: ModelConfig, bidirectional: bool):
        super().__init__()
        self.distance, self.bidirectional = config.position.relative_max_distance, bidirectional
        self.weight = nn.Parameter(torch.zeros(config.position.relative_buckets, config.num_heads))

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Return the bias (B, heads, T, S) of query positions (B, T) and key positions (B, S)."""
        distances = keys[:, None, :] - queries[:, :, None]
        index = relative_bucket(distances, len(self.weight), self.distance, self.bidirectional)
        return self.weight[index].permute(0, 3, 1, 2)
