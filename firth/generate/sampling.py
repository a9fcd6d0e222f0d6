"""From logits to a token: pure functions on `(..., V)`, and `Sampling`, the values that choose among them.

Filters set what they exclude to -inf and leave the rest alone. Each may be left out, but their order matters: `filtered`
applies temperature, top-k, top-p, min-p, after `firth.generate.decoding` has applied the repetition penalty. A token is then
drawn by inverting the distribution at one uniform number. Row r of a call draws its numbers from a generator of its own, seeded by
(seed + r): what a row becomes does not depend on which rows stand beside it.

>>> logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
>>> top_k(logits, 2).tolist(), top_p(logits, 0.8).tolist()
([2.0, 1.0, -inf, -inf], [2.0, 1.0, -inf, -inf])
>>> draw(logits, torch.tensor(0.0)).item(), draw(logits, torch.tensor(0.9)).item()
(0, 2)

Top-k: Fan 2018 (arXiv:1805.04833). Top-p: Holtzman 2020 (arXiv:1904.09751). Min-p: Nguyen 2024 (arXiv:2407.01082).
Repetition: Keskar 2019 (arXiv:1909.05858).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from firth.types import UserError
from firth.validated import NonNegativeFloat, NonNegativeInt, PositiveFloat, Ranged, Share, ShareAboveZero, TokenCount

MINUS = float("-inf")


@dataclass(frozen=True)
class Sampling(Ranged, section="sampling"):
    """How to write.

    max_new: most tokens to write. temperature: logits are divided by it; 0 is greedy. top_k: only the k likeliest
    tokens (0: all). top_p: only the likeliest tokens that together reach this probability (1: all). min_p: only tokens
    at least this many times as likely as the likeliest (0: all). repetition: above 1, tokens already in the row are
    made less likely. stop: texts that end an answer; they are not part of it. seed: row r of a call draws from
    seed + r.
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
            raise UserError(f"sampling.stop_strings={list(self.stop_strings)} must be texts that are not empty")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, with no chance in it."""
        return self.temperature == 0


def top_k(logits: Tensor, k: int) -> Tensor:
    """Only the k largest logits of each row, and those equal to the k-th: (..., V) -> (..., V)."""
    least = logits.topk(min(k, logits.shape[-1]), -1).values[..., -1:]
    return logits.masked_fill(logits < least, MINUS)


def top_p(logits: Tensor, p: float) -> Tensor:
    """Only the likeliest tokens, until their probabilities reach p; the one that reaches it is the last kept."""
    ordered, index = logits.sort(-1, descending=True)
    mass = ordered.softmax(-1)
    before = mass.cumsum(-1) - mass
    beyond = before >= p
    beyond[..., 0] = False
    return logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), MINUS)


def min_p(logits: Tensor, p: float) -> Tensor:
    """Only tokens whose probability is at least p times that of the likeliest."""
    most = logits.amax(-1, keepdim=True)
    return logits.masked_fill((logits - most).exp() < p, MINUS)


def repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens already seen less likely: positive logits are divided by the penalty, negative ones multiplied.

    logits (B, V); seen (B, T) token ids, repeats allowed.
    """
    chosen = logits.gather(-1, seen)
    return logits.scatter(-1, seen, torch.where(chosen < 0, chosen * penalty, chosen / penalty))


def filtered(logits: Tensor, sampling: Sampling) -> Tensor:
    """The logits to draw from: temperature and filters applied, (..., V) float32. Not for greedy sampling."""
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
    """One token per row by inverting its distribution at a number in [0, 1): (..., V), (...) -> (...) int64."""
    mass = logits.softmax(-1).cumsum(-1)
    return torch.searchsorted(mass, (uniform[..., None] * mass[..., -1:]), right=True)[..., 0]


def uniforms(seeds: Sequence[int], count: int) -> np.ndarray:
    """The numbers that rows draw with: (len(seeds), count) float32 in [0, 1 - 2^-20], a stream per seed.

    The gap below 1 keeps `uniform * total` under the total in float32, so that no token of probability 0 is drawn.
    """
    rows = [np.random.Generator(np.random.Philox(seed)).random(count, dtype=np.float32) for seed in seeds]
    return np.minimum(np.stack(rows), np.float32(1 - 2**-20))
