"""Sampling functions, compared with those of transformers and with the distributions that they should have."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from firth.generate.sampling import Sampling, draw, filtered, min_p, repetition_penalty, top_k, top_p, uniforms
from firth.types import UserError


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(64, 501, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("k", [1, 7, 500, 501, 9000])
def test_top_k_matches_transformers(logits: torch.Tensor, k: int) -> None:
    assert torch.equal(top_k(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_matches_transformers(logits: torch.Tensor, p: float) -> None:
    assert torch.equal(top_p(logits, p), TopPLogitsWarper(p)(None, logits))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.7, 1.0])
def test_min_p_matches_transformers(logits: torch.Tensor, p: float) -> None:
    assert torch.equal(min_p(logits, p), MinPLogitsWarper(p)(None, logits))


def test_repetition_penalty_matches_transformers(logits: torch.Tensor) -> None:
    seen = torch.randint(501, (64, 30), generator=torch.Generator().manual_seed(1))
    assert torch.equal(repetition_penalty(logits, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(seen, logits))


def test_all_filters_together_match_transformers(logits: torch.Tensor) -> None:
    expected = logits
    for warper in (TemperatureLogitsWarper(0.7), TopKLogitsWarper(50), TopPLogitsWarper(0.95), MinPLogitsWarper(0.02)):
        expected = warper(None, expected)
    assert torch.equal(filtered(logits, Sampling(temperature=0.7, top_k=50, top_p=0.95, min_p=0.02)), expected)


def test_draws_have_the_distribution_of_the_logits() -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(2)) * 2
    n = 200_000
    drawn = draw(logits.expand(n, 12), torch.from_numpy(uniforms([3], n)[0]))
    frequency = torch.bincount(drawn, minlength=12) / n
    p = logits.softmax(-1)
    assert ((frequency - p).abs() < 5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_a_token_of_probability_zero_is_never_drawn(logits: torch.Tensor) -> None:
    kept = top_k(logits, 3)
    for number in (0.0, 0.25, 0.5, 0.999, float(1 - 2**-20)):
        drawn = draw(kept, torch.full((64,), number))
        assert torch.isfinite(kept.gather(-1, drawn[:, None])).all()


def test_each_seed_has_its_own_stream() -> None:
    streams = uniforms([5, 6, 7], 10)
    assert np.array_equal(streams[1], uniforms([6], 10)[0])
    assert np.array_equal(streams[1, :4], uniforms([6], 4)[0])
    assert not np.array_equal(streams[0], streams[1])


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 2.0},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"stop_strings": ("",)},
    ],
)
def test_invalid_values_are_rejected_by_name(wrong: dict) -> None:
    with pytest.raises(UserError, match=f"sampling.{next(iter(wrong))}="):
        Sampling(**wrong)
