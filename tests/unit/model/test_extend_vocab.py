"""Rows for the tokens that were added to a tokenizer."""

from __future__ import annotations

import pytest
import torch

from firth.model.config import decoder_config, encoder_config
from firth.model.flops import num_parameters
from firth.model.heads import LMHead
from firth.model.init import extend_vocab
from firth.model.model import LM

PARTS = [[3, 4], [5], []]


def model(tied: bool, vocab_size: int = 12) -> LM:
    make = encoder_config if tied else decoder_config
    torch.manual_seed(0)
    config = make(vocab_size, 16, 1, num_heads=2, max_positions=8).with_fields({"tie_embeddings": tied})
    return LM(config, {"lm": LMHead(config)}).eval()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("first", [12, 11])  # 11: one row of the table is padding, and a new token takes it
def test_new_rows_are_means_of_old_ones(tied: bool, first: int) -> None:
    one, before = model(tied), model(tied)
    extend_vocab(one, first, PARTS)
    assert one.config.vocab_size == first + 3 == one.tokens.num_embeddings
    for rows, old in ((one.tokens.weight, before.tokens.weight), (one.heads["lm"].weight, before.heads["lm"].weight)):
        assert torch.equal(rows[:first], old[:first]) and len(rows) == first + 3
        assert torch.allclose(rows[first], old[[3, 4]].mean(0)) and torch.equal(rows[first + 1], old[5])
        assert (rows[first + 2] - old.mean(0)).abs().max() < 5 * old.std(0).max()
    assert (one.heads["lm"].weight is one.tokens.weight) == tied
    assert sum(p.numel() for p in one.parameters()) == num_parameters(one.config) + (
        sum(p.numel() for p in before.parameters()) - num_parameters(before.config)
    )


def test_old_texts_have_the_old_logits() -> None:
    one, before, tokens = model(True), model(True), torch.tensor([[1, 5, 7, 2]])
    extend_vocab(one, 12, PARTS)
    with torch.no_grad():
        new, old = (m.heads["lm"](m({"tokens": tokens})) for m in (one, before))
    assert torch.equal(new[..., :12], old)
    assert torch.allclose(new[..., 12], old[..., [3, 4]].mean(-1), atol=1e-6)
