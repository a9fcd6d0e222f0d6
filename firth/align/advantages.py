"""Which token deserves what: from rewards to advantages and returns.

Numbers are laid out as `(N, T)`, one row per sampled answer, with `real` (N, T) True on its tokens (a prefix of the
row). An answer ends the episode, also where it was cut off at its greatest length, as in InstructGPT.

>>> real = np.array([[True, True, True]])
>>> rewards, values = np.array([[0.0, 0.0, 1.0]]), np.array([[0.5, 0.5, 0.5]])
>>> GAE(gamma=1.0, lam=1.0, whiten=False)(rewards, values, real, group=1)[0].tolist()
[[0.5, 0.5, 0.5]]
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from firth.types import UserError


class AdvantageEstimator(Protocol):
    """Assigns credit."""

    def __call__(
        self, rewards: np.ndarray, values: np.ndarray, real: np.ndarray, group: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """rewards, values, real (N, T), answers to one prompt in runs of `group` rows -> advantages, returns (N, T)."""


def whiten(x: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Mean 0 and standard deviation 1 over the real entries, 0 elsewhere."""
    there = x[real]
    return np.where(real, (x - there.mean()) / (there.std() + 1e-8), 0.0)


@dataclass(frozen=True)
class GAE:
    """Generalised advantage estimation (Schulman 2016, equation 16): for PPO, with a value estimate per token.

    d_t = r_t + gamma v_{t+1} - v_t,  A_t = d_t + gamma lam A_{t+1},  return_t = A_t + v_t; nothing follows the end.
    gamma: how much a reward one token later is worth. lam: 0 trusts the value estimate, 1 the sampled rewards.
    value_lam: the same for the returns that the value estimate learns; None means `lam`. (Yuan 2025, "What's behind PPO's
    collapse in long-CoT?": 1 gives targets that do not depend on the estimate itself.)
    whiten: advantages of mean 0 and standard deviation 1 over all tokens of the phase.
    """

    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True
    value_lam: float | None = None

    def __call__(
        self, rewards: np.ndarray, values: np.ndarray, real: np.ndarray, group: int
    ) -> tuple[np.ndarray, np.ndarray]:
        values = np.where(real, values, 0.0)
        after = np.concatenate((values[:, 1:], np.zeros_like(values[:, :1])), 1)
        surprise = np.where(real, rewards + self.gamma * after - values, 0.0)
        advantage = discounted_returns(surprise, self.gamma * self.lam)
        far = advantage if self.value_lam is None else discounted_returns(surprise, self.gamma * self.value_lam)
        return (whiten(advantage, real) if self.whiten else advantage), far + values


def discounted_returns(x: np.ndarray, discount: float = 1.0) -> np.ndarray:
    """The discounted sum of each entry and those behind it in its row: (N, T).

    >>> discounted_returns(np.array([[1.0, 2.0, 4.0]]), 0.5).tolist()
    [[3.0, 4.0, 4.0]]
    """
    sums = np.array(x, np.float64)
    for t in reversed(range(x.shape[1] - 1)):
        sums[:, t] += discount * sums[:, t + 1]
    return sums


@dataclass(frozen=True)
class Baseline:
    """The whole reward of an answer less what the others got: for REINFORCE, without a value estimate.

    The baseline is the mean of the *other* answers to the same prompt, or of the other answers of the phase if each
    prompt has one (leave one out; Kool 2019, RLOO): it does not depend on the answer itself, so the gradient stays
    unbiased. whiten: divide by the standard deviation over the phase, a mere change of the step's length.
    """

    whiten: bool = False

    def __call__(
        self, rewards: np.ndarray, values: np.ndarray, real: np.ndarray, group: int
    ) -> tuple[np.ndarray, np.ndarray]:
        whole = np.where(real, rewards, 0.0).sum(1)
        together = whole.reshape(-1, group if group > 1 else len(whole))
        n = together.shape[1]
        if n < 2:
            raise UserError("a baseline needs at least two answers in a phase: raise `answers` or `group`")
        gain = (together - (together.sum(1, keepdims=True) - together) / (n - 1)).ravel()
        if self.whiten:
            gain = gain / (gain.std() + 1e-8)
        return np.where(real, gain[:, None], 0.0), np.where(real, whole[:, None], 0.0)
