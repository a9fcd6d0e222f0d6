"""What a model knows of its tokens besides what they are, by name; the fields of a batch, as rows.

>>> prefixed_fields({"tokens": torch.tensor([[[3, 4, 5], [6, 7, 8]]])}, "")["positions"].tolist()
[[0, 1, 2]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from firth.types import NEVER, Batch

FIELDS = ("tokens", "positions", "token_type_ids", "query_time", "key_time", "key_expiry", "document_ids")


def prefixed_fields(batch: Batch, prefix: str, start: int = 0, ahead: int = 0) -> Batch:
    """The model's own fields, their free axes flattened to rows: (..., T) -> (B, T); positions filled in, from `start` on
    or, behind trained positions, from those on."""
    tokens = batch[prefix + "tokens"]
    fields = {name: batch[prefix + name].flatten(0, -2) if tokens.dim() > 2 else batch[prefix + name]
              for name in FIELDS if prefix + name in batch}  # fmt: skip
    if "positions" in fields:
        fields["positions"] = fields["positions"] + ahead if ahead else fields["positions"]
    else:
        start = max(start, ahead)
        reach = torch.arange(start, start + tokens.shape[-1], device=tokens.device)
        fields["positions"] = reach[None]  # (1, T): the same for all rows, so angles and biases are computed once
    return fields


@dataclass(frozen=True)
class RowMemory:
    """What stands before a row: the fields of its tokens, (B or 1, M), and the states (B, M, width) that entered each
    block, or for each block the keys and values (KV, M, D) that nothing enters for."""

    fields: Batch
    states: Sequence[Tensor] = ()
    pairs: Sequence[tuple[Tensor, Tensor]] = ()


def with_memory(past: Batch, name: str, own: Tensor) -> Tensor:
    """A field of the tokens before a row and of its own: (B, M + T). Whatever the past does not tell is 0; it never leaves."""
    told = past.get(name)
    if told is None:
        told = torch.full_like(past["key_time"], NEVER if name == "key_expiry" else 0)
    rows = max(len(told), len(own))
    return torch.cat((told.to(own.dtype).expand(rows, -1), own.expand(rows, -1)), -1)
