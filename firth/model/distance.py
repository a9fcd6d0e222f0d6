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

>>> index, table = between(torch.tensor([[0, 1, 1]]), torch.tensor([[-1, 0, 1]]), width=4)
>>> index.tolist(), table.shape       # distances 2 .. -1 stand in columns 3 .. 0
([[[2, 1, 0], [3, 2, 1], [3, 2, 1]]], torch.Size([4, 4]))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from firth.model.position import waves
from firth.model.shape import Shape


@dataclass(frozen=True)
class Apart:
    """How far apart the queries and keys of a batch stand, which all blocks share.

    index (B or 1, T, S): the row of `table` that holds their distance. table (distances, width). other (B, T, S) bool:
    whether they are of different segments; None where nothing says so, and all scores of a query move alike.
    """

    index: Tensor
    table: Tensor
    other: Tensor | None = None


def between(queries: Tensor, keys: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Positions (B or 1, T) and (B or 1, S) -> `Apart`'s index and table. Reads two numbers back from the device."""
    least, most = torch.stack((queries.amin() - keys.amax(), queries.amax() - keys.amin())).tolist()
    angles = waves(torch.arange(least, most + 1, device=queries.device), width)
    index = queries[:, :, None].long() - keys[:, None, :].long() - least
    return index, torch.cat((angles.sin(), angles.cos()), -1)


class Distance(nn.Module):
    """What one block knows of distances and segments. The offsets are (heads * head_width,) as biases are."""

    def __init__(self, shape: Shape, linear: type[nn.Linear]):
        super().__init__()
        inner = shape.heads * shape.head_width
        self.head_width = shape.head_width
        self.r = linear(shape.width, inner, bias=False)
        self.content, self.place = nn.Parameter(torch.zeros(inner)), nn.Parameter(torch.zeros(inner))
        told = shape.segments > 0
        self.segment = nn.Parameter(torch.zeros(inner)) if told else None
        self.kinds = (
            nn.Parameter(torch.randn(2, shape.heads, shape.head_width) * (shape.init or 0.02)) if told else None
        )

    def _offset(self, offset: Tensor) -> Tensor:
        return offset.view(-1, 1, self.head_width)

    def forward(self, q: Tensor, apart: Apart, scale: float) -> tuple[Tensor, Tensor]:
        """Queries (B, heads, T, head_width) -> those that meet the keys, and the bias (B, heads, T, S)."""
        rows, heads = q.shape[:2]
        far = (
            self.r(apart.table.to(q.dtype)).unflatten(-1, (heads, -1)).permute(1, 2, 0)
        )  # (heads, head_width, distances)
        met = (q + self._offset(self.place)) * scale @ far  # (B, heads, T, distances)
        bias = met.gather(-1, apart.index[:, None].expand(rows, heads, -1, -1))
        if apart.other is not None and self.kinds is not None and self.segment is not None:
            same, other = (
                (q + self._offset(self.segment)) * scale @ self.kinds[:, :, :, None].to(q.dtype)[:, None]
            ).unbind(0)
            bias = bias + torch.where(apart.other[:, None], other, same)
        return q + self._offset(self.content), bias
