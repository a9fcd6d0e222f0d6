"""Position encodings: sinusoidal, rotary, T5's relative bias, XLNet's relative positions.

Position encodings: sinusoidal vectors, rotary angles and T5's relative bias.

All encodings use explicit
integer positions and not the slot in the row, so that packing, a permuted order and padding in a cache change nothing.

>>> import torch
>>> relative_bucket(torch.tensor([0, 1, 7, 8, 200, -1, -200]), buckets=32, distance=128, bidirectional=True).tolist()
[0, 17, 23, 24, 31, 1, 15]

XLNet's relative positions and relative token types (Dai 2019, section 3.3; Yang 2019, section 2.5), as a bias on the scores.

A query q at position i scores a key k at position j by three products (before the scale):

    (q + u) . k              content of the token              u: `content`, Transformer-XL's u, r_w_bias
    (q + v) . W R[i - j]     its distance                      v: `place`, r_r_bias; R: sines and cosines of the distance
    (q + w) . s[other]       whether its token type differs    w: `segment`, r_s_bias; s: `kinds`, one vector for each

The first is computed by attention anyway; the others make a bias (B, heads, T, S), so that attention needs no positions.
Each query is multiplied with each *distance* once, (B, heads, T, distances), and each key then takes the column of its
distance: nothing of size T x S x head_dim is made. Transformer-XL finds that column by shifting rows, which requires that
slots count positions. Here it is found by `positions`: XLNet's query stream is at the end of the row, and packed documents
start at 0 again. The cost is about one more product than the scores, and a gather that moves T x S numbers a head twice.

>>> index, table = distance_index(torch.tensor([[0, 1, 1]]), torch.tensor([[-1, 0, 1]]), width=4)
>>> index.tolist(), table.shape       # distances 2 .. -1 are in columns 3 .. 0
([[[2, 1, 0], [3, 2, 1], [3, 2, 1]]], torch.Size([4, 4]))
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from firth.model import native
from firth.model.config import ModelConfig
from firth.model.fused import per_dtype, runs_native


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


@dataclass(frozen=True)
class DistanceIndex:
    """Distances between the queries and keys of a batch, shared by all blocks.

    Args:
        index: (B or 1, T, S), the row of `table` with their distance.
        table: (distances, hidden_size), sines and cosines of each distance.
        other: (B, T, S) bool, whether their token types differ; None: no token types, which shifts all scores of a
            query equally.
    """

    index: Tensor
    table: Tensor
    other: Tensor | None = None


def distance_index(queries: Tensor, keys: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return `index` and `table` of `DistanceIndex`. Reads two numbers back from the device.

    Args:
        queries: Positions (B or 1, T).
        keys: Positions (B or 1, S).
        width: Columns of the table.
    """
    least, most = torch.stack((queries.amin() - keys.amax(), queries.amax() - keys.amin())).tolist()
    angles = sinusoid_frequencies(torch.arange(least, most + 1, device=queries.device), width)
    index = queries[:, :, None].long() - keys[:, None, :].long() - least
    return index, torch.cat((angles.sin(), angles.cos()), -1)


def gather_distances(scores: Tensor, index: Tensor) -> Tensor:
    """Return the column of each key's distance: scores (B, heads, T, distances), index (B or 1, T, S) -> (B, heads, T, S)."""
    if runs_native(COLUMNS, scores):
        return native.columns(scores, index)
    return scores.gather(-1, index[:, None].expand(*scores.shape[:2], -1, -1))


def _implementations() -> dict[str, Callable[[Tensor], Tensor]]:
    index = distance_index(torch.arange(128)[None], torch.arange(128)[None], 2)[0]
    return {
        "torch": lambda x: x.gather(-1, index[:, None].expand(*x.shape[:2], -1, -1)),
        "native": lambda x: native.columns(x, index),
    }


COLUMNS = per_dtype("distance", _implementations(), 8, 3, 128, 255)
"""dtype -> measured choice of the implementation of `gather_distances` on a CPU."""


class RelativeDistance(nn.Module):
    """The weights of one block for distances and token types; the offsets are (heads * head_dim,) like biases."""

    def __init__(self, config: ModelConfig, linear: type[nn.Linear]):
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.head_width = config.head_dim
        self.r = linear(config.hidden_size, inner, bias=False)
        self.content, self.place = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))
        typed = config.embedding.type_vocab_size > 0
        self.segment = nn.Parameter(torch.zeros(inner)) if typed else None
        self.kinds = (
            nn.Parameter(torch.randn(2, config.num_heads, config.head_dim) * (config.init.std or 0.02))
            if typed
            else None
        )

    def _offset(self, offset: Tensor, q: Tensor) -> Tensor:
        """Return an offset per head in the dtype of the queries, as a linear map adds its bias."""
        return offset.view(-1, 1, self.head_width).to(q.dtype)

    def forward(self, q: Tensor, distances: DistanceIndex, scale: float) -> tuple[Tensor, Tensor]:
        """Return the queries to multiply with the keys, and the bias of the scores.

        Args:
            q: Queries (B, heads, T, head_dim).
            distances: Of queries and keys.
            scale: Factor on the scores.

        Returns:
            Queries (B, heads, T, head_dim), and the bias (B, heads, T, S).
        """
        heads = q.shape[1]
        table = self.r(distances.table.to(q.dtype)).unflatten(-1, (heads, -1)).permute(1, 2, 0) * scale
        scores = (q + self._offset(self.place, q)) @ table  # table (heads, head_dim, distances)
        bias = gather_distances(scores, distances.index)
        if distances.other is not None and self.kinds is not None and self.segment is not None:
            kinds = self.kinds[:, :, :, None].to(q.dtype)[:, None] * scale
            same, other = ((q + self._offset(self.segment, q)) @ kinds).unbind(0)
            bias = bias + torch.where(distances.other[:, None], other, same)
        return q + self._offset(self.content, q), bias
