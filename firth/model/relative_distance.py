"""XLNet's relative positions and relative segments (Dai 2019, section 3.3; Yang 2019, section 2.5), as a bias on the scores.

A query q at position i scores a key k at position j by three products (before the scale):

    (q + u) . k                  what the token is              u: `content`, Transformer-XL's u, r_w_bias
    (q + v) . W R[i - j]         how far away it stands         v: `place`, r_r_bias; R: sines and cosines of the distance
    (q + w) . s[other]           whether its segment is another  w: `segment`, r_s_bias; s: `kinds`, one vector for each

The first is what attention computes anyway; the others make a bias (B, heads, T, S), so attention goes on knowing nothing
of positions. A query meets each *distance* once, (B, heads, T, distances), and each key then takes the column of its own:
nothing of size T x S x head_width is made. Transformer-XL finds that column by shifting rows, which holds where slots
count positions. Ours reads `positions`: queries of a permuted order stand at the end of the row, and packed documents
count anew. Costs about one more product than the scores, and the gathering, which moves T x S numbers a head twice.

>>> index, table = distance_index(torch.tensor([[0, 1, 1]]), torch.tensor([[-1, 0, 1]]), width=4)
>>> index.tolist(), table.shape       # distances 2 .. -1 stand in columns 3 .. 0
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
    """How far apart the queries and keys of a batch stand, which all blocks share.

    index (B or 1, T, S): the row of `table` that holds their distance. table (distances, width). other (B, T, S) bool:
    whether they are of different segments; None where nothing says so, and all scores of a query move alike.
    """

    index: Tensor
    table: Tensor
    other: Tensor | None = None


def distance_index(queries: Tensor, keys: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Positions (B or 1, T) and (B or 1, S) -> `Apart`'s index and table. Reads two numbers back from the device."""
    least, most = torch.stack((queries.amin() - keys.amax(), queries.amax() - keys.amin())).tolist()
    angles = sinusoid_frequencies(torch.arange(least, most + 1, device=queries.device), width)
    index = queries[:, :, None].long() - keys[:, None, :].long() - least
    return index, torch.cat((angles.sin(), angles.cos()), -1)


def gathered(met: Tensor, index: Tensor) -> Tensor:
    """Give each key the column of its distance: met (B, heads, T, distances), index (B or 1, T, S) -> (B, heads, T, S)."""
    if runs_native(COLUMNS, met):
        return native_ops.columns(met, index)
    return met.gather(-1, index[:, None].expand(*met.shape[:2], -1, -1))


def _ways() -> dict[str, Callable[[Tensor], Tensor]]:
    index = distance_index(torch.arange(128)[None], torch.arange(128)[None], 2)[0]
    return {
        "torch": lambda met: met.gather(-1, index[:, None].expand(*met.shape[:2], -1, -1)),
        "native": lambda met: native_ops.columns(met, index),
    }


COLUMNS = per_dtype("distance", _ways(), 8, 3, 128, 255)
"""dtype -> how keys are given the column of their distance on a CPU."""


class RelativeDistance(nn.Module):
    """What one block knows of distances and segments. The offsets are (heads * head_width,) as biases are."""

    def __init__(self, config: ModelConfig, linear: type[nn.Linear]):
        super().__init__()
        inner = config.num_heads * config.head_dim
        self.head_width = config.head_dim
        self.r = linear(config.hidden_size, inner, bias=False)
        self.content, self.place = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))
        told = config.type_vocab_size > 0
        self.segment = nn.Parameter(torch.zeros(inner)) if told else None
        self.kinds = (
            nn.Parameter(torch.randn(2, config.num_heads, config.head_dim) * (config.init_std or 0.02))
            if told
            else None
        )

    def _offset(self, offset: Tensor, q: Tensor) -> Tensor:
        """An offset for each head, in the dtype of the queries, as a linear map adds its bias."""
        return offset.view(-1, 1, self.head_width).to(q.dtype)

    def forward(self, q: Tensor, apart: DistanceIndex, scale: float) -> tuple[Tensor, Tensor]:
        """Queries (B, heads, T, head_width) -> those that meet the keys, and the bias (B, heads, T, S)."""
        heads = q.shape[1]
        far = self.r(apart.table.to(q.dtype)).unflatten(-1, (heads, -1)).permute(1, 2, 0) * scale
        met = (q + self._offset(self.place, q)) @ far  # (B, heads, T, distances), far (heads, head_width, distances)
        bias = gathered(met, apart.index)
        if apart.other is not None and self.kinds is not None and self.segment is not None:
            kinds = self.kinds[:, :, :, None].to(q.dtype)[:, None] * scale
            same, other = ((q + self._offset(self.segment, q)) @ kinds).unbind(0)
            bias = bias + torch.where(apart.other[:, None], other, same)
        return q + self._offset(self.content, q), bias
