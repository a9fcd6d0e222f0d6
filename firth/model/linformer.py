"""Linformer: projection of keys and values along the sequence, from T tokens to k slots (Wang 2020, section 4).

    head = softmax(Q (E' K)' / sqrt(d)) (F' V)            E, F: (T, k), learned

Scores are T x k and not T x T, so time and memory grow linearly with T. A slot is a mixture of tokens, which no mask can
separate: a row must be one whole document with bidirectional attention. Padding is zeroed before the projection, so it
changes nothing (the paper's own code mixes it in).

The paper leaves two things open. Slots are initialized as windows of neighboring tokens: as many slots as tokens are full
attention, where random mixtures cancel each other. A row of n tokens uses the first n rows of E, and its slots are
multiplied by sqrt(max_positions / n), since the empty ones would dominate otherwise. Together: 61% -> 70% accuracy on
held-out questions, from 300 sentences.

>>> config = ModelConfig(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, causal=False, max_positions=16)
>>> config = config.with_fields({"attention.linformer.k": 4})
>>> slots = Linformer(config).at(6, AttentionMask())
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
    """The projections of a stack: weight (layers or 1, 2 or 1, max_positions, k). All heads share them (section 4)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(*config.linformer_projections, config.max_positions, config.attention.linformer.k)
        )
        tokens = torch.arange(config.max_positions)
        with torch.no_grad():  # the slots of a full row have the variance of its tokens
            self.weight.zero_()
            self.weight[..., tokens, tokens * config.attention.linformer.k // config.max_positions] = (
                config.attention.linformer.k / config.max_positions
            ) ** 0.5

    def at(self, length: int, mask: AttentionMask) -> LinformerSlots:
        """Return the projections of rows of `length` tokens.

        Raises:
            UserError: The mask is not bidirectional over whole rows, or a row is too long.
        """
        if mask.is_causal or mask.block_mask is not None or (mask.mask is not None and mask.mask.shape[2] > 1):
            raise UserError(
                "a Linformer mixes all tokens of a row, so every position must attend to the whole row: causal or permuted "
                "attention and several documents in a row are not possible (set batch.pack_to_length=0)"
            )
        context = self.weight.shape[2]
        if length > context:
            raise UserError(
                f"a row of {length} tokens is longer than model.max_positions={context}, the number of positions that this "
                "Linformer projects: shorten the rows or train with more positions"
            )
        real = None if mask.mask is None else mask.mask.mT
        count = self.weight.new_tensor(length) if real is None else real.sum(2, keepdim=True).clamp(min=1)
        return LinformerSlots(
            self.weight[:, :, :length], real, (context / count).sqrt(), AttentionMask(empty_rows=mask.empty_rows)
        )


@dataclass(frozen=True)
class LinformerSlots:
    """The projections that blocks share in one pass.

    Args:
        weight: (layers or 1, 2 or 1, T, k).
        real: (B, 1, T, 1) bool, False for padding; None: no padding.
        scale: Factor on the slots of each row, (B, 1, 1, 1) or ().
        mask: Attention mask over slots.
    """

    weight: Tensor
    real: Tensor | None
    scale: Tensor
    mask: AttentionMask

    def of(self, layer: int) -> LinformerSlots:
        """Return the projections of one layer."""
        return replace(self, weight=self.weight[layer % len(self.weight)][None])

    def mix(self, x: Tensor, side: int) -> Tensor:
        """Project keys (side 0) or values (1) to slots, with the first layer: (B, KV, T, D) -> (B, KV, k, D)."""
        tokens = x if self.real is None else x.masked_fill(~self.real, 0)
        return self.weight[0, side % self.weight.shape[1]].mT @ tokens * self.scale.to(x.dtype)
