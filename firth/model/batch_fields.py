"""Batch fields of the model as rows (B, T).

>>> prefixed_fields({"tokens": torch.tensor([[[3, 4, 5], [6, 7, 8]]])}, "")["positions"].tolist()
[[0, 1, 2]]
"""

from __future__ import annotations

import torch
from torch import Tensor

from firth.types import NEVER, Batch

FIELDS = ("tokens", "positions", "token_type_ids", "query_time", "key_time", "key_expiry", "document_ids")


def prefixed_fields(batch: Batch, prefix: str, start: int = 0, ahead: int = 0) -> Batch:
    """Return the fields that the model reads, with free axes flattened to rows: (..., T) -> (B, T).

    Args:
        batch: Fields (..., T).
        prefix: Of the field names: "", "source_" or "memory_".
        start: First position, where the batch has no positions.
        ahead: Number of trained positions before the text, which are added to the positions.
    """
    tokens = batch[prefix + "tokens"]
    fields = {name: batch[prefix + name].flatten(0, -2) if tokens.dim() > 2 else batch[prefix + name]
              for name in FIELDS if prefix + name in batch}  # fmt: skip
    if "positions" in fields:
        fields["positions"] = fields["positions"] + ahead if ahead else fields["positions"]
    else:
        start = max(start, ahead)
        slots = torch.arange(start, start + tokens.shape[-1], device=tokens.device)
        fields["positions"] = slots[None]  # (1, T): the same for all rows, so angles and biases are computed once
    return fields


def with_memory(memory: Batch, name: str, own: Tensor) -> Tensor:
    """Return a field of the positions before a row and of its own, (B, M + T); a missing one is 0, key_expiry NEVER."""
    before = memory.get(name)
    if before is None:
        before = torch.full_like(memory["key_time"], NEVER if name == "key_expiry" else 0)
    rows = max(len(before), len(own))
    return torch.cat((before.to(own.dtype).expand(rows, -1), own.expand(rows, -1)), -1)
