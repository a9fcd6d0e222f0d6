"""Give a model rows for the tokens that were added to its tokenizer.

The embedding of a new token is the mean of those of the old tokens that its text had before, and so are its row and its bias in the
LM head: the model begins near what it knew. A character that was unknown is drawn from the distribution of the table (Hewitt 2021).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from firth.model.model import LM
from firth.types import UserError


@torch.no_grad()
def extend_vocab(model: LM, first: int, old_tokens: Sequence[Sequence[int]]) -> None:
    """Add the rows of new tokens to the token embeddings and the LM head of a model, in place.

    Args:
        model: The model.
        first: The id of the first new token: the size of the old tokenizer, which may be smaller than the table.
        old_tokens: For each new token, the old ids of its text; empty for an unknown character.

    Raises:
        UserError: The model has no token embeddings, or heads that are models with tables of their own.
    """
    if model.config.embedding.characters.max_length or model.submodels():
        raise UserError(
            "tokenizer.extend adds rows to one table of token embeddings, which this start model has not: leave it out"
        )
    size = max(model.config.vocab_size, first + len(old_tokens))
    model.config = replace(model.config, vocab_size=size)
    lm: Any = dict(model.heads.items()).get("lm")
    tied = lm is not None and lm.weight is model.tokens.weight
    model.tokens.weight = nn.Parameter(_grown(model.tokens.weight, size, first, old_tokens))
    model.tokens.num_embeddings = size
    if lm is None:
        return
    lm.config = replace(lm.config, vocab_size=size)
    if not tied:
        lm.weight = nn.Parameter(_grown(lm.weight, size, first, old_tokens))
    if lm.bias is not None:
        lm.bias = nn.Parameter(_grown(lm.bias, size, first, old_tokens))
    model.tie()


def _grown(rows: Tensor, size: int, first: int, old_tokens: Sequence[Sequence[int]]) -> Tensor:
    """Return a table (size, ...) with the old rows below `first` and the mean of old rows for each new one."""
    old = rows.detach()[:first]
    grown = rows.new_zeros(size, *rows.shape[1:])
    grown[: len(rows)] = rows
    generator = torch.Generator().manual_seed(0)
    mean, spread = old.mean(0), old.std(0)
    for i, parts in enumerate(old_tokens):
        drawn = mean + spread * torch.randn(mean.shape, generator=generator)
        grown[first + i] = old[list(parts)].mean(0) if len(parts) else drawn
    return grown
