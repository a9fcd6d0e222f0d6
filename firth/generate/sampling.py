"""Sampling from logits: pure functions on (..., V), and their configuration `Sampling`.

Filters set the logits that they exclude to -inf and leave the others unchanged. Their order matters: `filtered` applies
temperature, top-k, top-p and min-p, after `next_tokens` has applied the repetition penalty. A token is then drawn
by inverting the cumulative distribution at a uniform random number. Row r of a call has a generator of its own, seeded with
seed + r, so its tokens do not depend on the other rows of the batch.

>>> logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
>>> top_k(logits, 2).tolist(), top_p(logits, 0.8).tolist()
([2.0, 1.0, -inf, -inf], [2.0, 1.0, -inf, -inf])
>>> draw(logits, torch.tensor(0.0)).item(), draw(logits, torch.tensor(0.9)).item()
(0, 2)

Top-k: Fan 2018 (arXiv:1805.04833). Top-p: Holtzman 2020 (arXiv:1904.09751). Min-p: Nguyen 2024 (arXiv:2407.01082).
Repetition penalty: Keskar 2019 (arXiv:1909.05858).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from firth.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat, Share, ShareAboveZero, TokenCount, Validated
from firth.types import UserError

NEGATIVE_INFINITY = float("-inf")


@dataclass(frozen=True)
class Sampling(Validated, section="sampling"):
    """Configuration of sampling.

    Args:
        max_new_tokens: Most tokens to generate.
        temperature: The logits are divided by it; 0 is greedy decoding.
        top_k: Keep only the k most likely tokens; 0 keeps all.
        top_p: Keep only the most likely tokens whose probabilities add up to this; 1 keeps all.
        min_p: Keep only tokens at least this many times as likely as the most likely one; 0 keeps all.
        repetition_penalty: Above 1, tokens already in the row become less likely.
        stop_strings: Strings that end an answer and are not part of it.
        seed: Row r of a call draws with seed + r.
    """

    max_new_tokens: TokenCount = 128
    temperature: NonNegativeFloat = 1.0
    top_k: NonNegativeInt = 0
    top_p: ShareAboveZero = 1.0
    min_p: Share = 0.0
    repetition_penalty: PositiveFloat = 1.0
    stop_strings: tuple[str, ...] = ()
    seed: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(self.stop_strings):
            raise UserError(f"sampling.stop_strings={list(self.stop_strings)} must be strings that are not empty")

    @property
    def greedy(self) -> bool:
        """Whether decoding always takes the most likely token."""
        return self.temperature == 0


def top_k(logits: Tensor, k: int) -> Tensor:
    """Keep the k largest logits of each row and those equal to the k-th: (..., V) -> (..., V)."""
    least = logits.topk(min(k, logits.shape[-1]), -1).values[..., -1:]
    return logits.masked_fill(logits < least, NEGATIVE_INFINITY)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Keep the most likely tokens until their probabilities reach p, including the one that reaches it."""
    ordered, index = logits.sort(-1, descending=True)
    mass = ordered.softmax(-1)
    before = mass.cumsum(-1) - mass
    beyond = before >= p
    beyond[..., 0] = False
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), NEGATIVE_INFINITY)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Keep tokens whose probability is at least p times that of the most likely token."""
    most = logits.amax(-1, keepdim=True)
    return logits.masked_fill((logits - most).exp() < p, NEGATIVE_INFINITY)


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens already seen less likely: divide positive logits by the penalty, multiply negative ones.

    Args:
        logits: (B, V).
        seen: (B, T) token ids, repeats allowed.
        penalty: The factor.
    """
    chosen = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """Apply temperature and filters: (..., V) -> (..., V) float32. Not for greedy decoding."""
    logits = logits.float()
    if sampling.temperature != 1:
        logits = logits / sampling.temperature
    if sampling.top_k:
        logits = top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        logits = min_p(logits, sampling.min_p)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """Draw a token per row by inverting its distribution at a number in [0, 1): (..., V), (...) -> (...) int64."""
    mass = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(mass, (uniform[..., None] * mass[..., -1:]), right=True)[..., 0]


def next_tokens(logits: Tensor, sampling: Sampling, uniform: Tensor | None, seen: Tensor | None) -> Tensor:
    """Return the next token of each row: (rows, V) float32 -> (rows,) int64.

    Args:
        logits: Logits of the model.
        sampling: Parameters of all rows.
        uniform: (rows,) numbers in [0, 1) to draw with; None for greedy decoding.
        seen: (rows, T) token ids of the text so far, repeats allowed; None without a repetition penalty.
    """
    if seen is not None:
        logits = repetition_penalty(logits, seen, sampling.repetition_penalty)
    if uniform is None:
        return logits.max(-1).indices  # argmax takes half as long again
    return draw(filtered(logits, sampling), uniform)


def uniforms(seeds: Sequence[int], count: int) -> np.ndarray:
    """Return uniform numbers for each row: (len(seeds), count) float32 in [0, 1 - 2^-20], one stream per seed.

    The gap below 1 keeps `uniform * total` under the total in float32, so that no token of probability 0 is drawn.
    """
    rows = [np.random.Generator(np.random.Philox(seed)).random(count, dtype=np.float32) for seed in seeds]
    return np.minimum(np.stack(rows), np.float32(1 - 2**-20))
