"""XLNet's relative positions and relative token types (Dai 2019, section 3.3; Yang 2019, section 2.5), as a bias on the scores.

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

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from firth.model import native_ops
from firth.model.config import ModelConfig
from firth.model.fused import per_dtype, runs_native
from firth.model.positions import sinusoid_frequencies


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
        return native_ops.columns(scores, index)
    return scores.gather(-1, index[:, None].expand(*scores.shape[:2], -1, -1))


def _implementations() -> dict[str, Callable[[Tensor], Tensor]]:
    index = distance_index(torch.arange(128)[None], torch.arange(128)[None], 2)[0]
    return {
        "torch": lambda x: x.gather(-1, index[:, None].expand(*x.shape[:2], -1, -1)),
        "native": lambda x: native_ops.columns(x, index),
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
