"""Linformer: keys and values are projected along the sequence, from T tokens to k slots (Wang 2020, section 4).

    head = softmax(Q (E' K)' / sqrt(d)) (F' V)            E, F: (T, k), learnt

Scores are T x k and not T x T, so time and memory grow with T. A slot is a mixture of tokens, and no mask can say any
more who sees whom: a row is one whole document, read from both sides, or it is refused. Padding is zeroed before it is
mixed, so it changes nothing (the paper's own code mixes it in).

Two things the paper leaves open. Slots begin as windows of neighbouring tokens: as many slots as tokens are full attention,
where random mixtures cancel each other. A row of n tokens uses the first n rows of E, and its slots are multiplied by
sqrt(context / n), or the empty ones would drown them. Together: 61% -> 70% of held-out questions told, from 300 sentences.

>>> shape = ModelConfig(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, causal=False, max_positions=16, linformer_k=4)
>>> slots = Linformer(shape).at(6, AttentionMask())
>>> slots.of(layer=0).mix(torch.ones(3, 2, 6, 4), side=0).shape
torch.Size([3, 2, 4, 4])
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from firth.model.attention import AttentionMask
from firth.model.config import ModelConfig
from firth.types import UserError


class Linformer(nn.Module):
    """The projections of a trunk: weight (layers or 1, 2 or 1, context, k). All heads share them (section 4)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*config.linformer_projections, config.max_positions, config.linformer_k))
        tokens = torch.arange(config.max_positions)
        with torch.no_grad():  # the slots of a full row vary as its tokens do
            self.weight.zero_()
            self.weight[..., tokens, tokens * config.linformer_k // config.max_positions] = (
                config.linformer_k / config.max_positions
            ) ** 0.5

    def at(self, length: int, mask: AttentionMask) -> LinformerSlots:
        """The projections of rows of `length` tokens. UserError for what a Linformer cannot read."""
        if mask.is_causal or mask.block_mask is not None or (mask.mask is not None and mask.mask.shape[2] > 1):
            raise UserError(
                "a Linformer mixes all tokens of a row before anyone looks, so every position must see the whole row: "
                "it cannot read from left to right, in another order, or several documents in a row (set batch.pack_to_length=0)"
            )
        context = self.weight.shape[2]
        if length > context:
            raise UserError(
                f"a row of {length} tokens is longer than model.max_positions={context}, the number of positions that this "
                "Linformer projects: cut the rows or train with a longer context"
            )
        real = None if mask.mask is None else mask.mask.mT
        count = self.weight.new_tensor(length) if real is None else real.sum(2, keepdim=True).clamp(min=1)
        return LinformerSlots(
            self.weight[:, :, :length], real, (context / count).sqrt(), AttentionMask(empty_rows=mask.empty_rows)
        )


@dataclass(frozen=True)
class LinformerSlots:
    """What blocks share in a pass: weight (layers or 1, 2 or 1, T, k), which tokens are real (B, 1, T, 1), what the slots
    of each row are multiplied by (B, 1, 1, 1) or (), who sees slots."""

    weight: Tensor
    real: Tensor | None
    scale: Tensor
    mask: AttentionMask

    def of(self, layer: int) -> LinformerSlots:
        """Those of one layer."""
        return replace(self, weight=self.weight[layer % len(self.weight)][None])

    def mix(self, x: Tensor, side: int) -> Tensor:
        """Keys (side 0) or values (1) of tokens -> of slots, in the first layer: (B, KV, T, D) -> (B, KV, k, D)."""
        whole = x if self.real is None else x.masked_fill(~self.real, 0)
        return self.weight[0, side % self.weight.shape[1]].mT @ whole * self.scale.to(x.dtype)
