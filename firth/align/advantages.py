"""Advantage estimation: from per-token rewards to advantages and returns.

Arrays have shape (N, T), one row per sampled answer, with `real` (N, T) True on its tokens (a prefix of the row). An answer ends
the episode, also where it was truncated at the maximum length, as in InstructGPT.

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
    """Computes advantages and returns from rewards."""

    def __call__(
        self, rewards: np.ndarray, values: np.ndarray, real: np.ndarray, group: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Compute advantages and returns.

        Args:
            rewards: Reward of each token, (N, T).
            values: Value estimate of each token, (N, T).
            real: True on the tokens of the answers, (N, T).
            group: Number of consecutive rows that answer one prompt.

        Returns:
            Advantages and returns, (N, T) each.
        """


def whiten(x: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Normalize to mean 0 and standard deviation 1 over the real entries; 0 elsewhere."""
    entries = x[real]
    return np.where(real, (x - entries.mean()) / (entries.std() + 1e-8), 0.0)


@dataclass(frozen=True)
class GAE:
    """Generalized advantage estimation (Schulman 2016, equation 16), for PPO with a value estimate per token.

    d_t = r_t + gamma v_{t+1} - v_t,  A_t = d_t + gamma lam A_{t+1},  return_t = A_t + v_t; nothing follows the end.

    Args:
        gamma: Discount of a reward one token later.
        lam: 0 relies on the value estimate, 1 on the sampled rewards.
        whiten: Whether to normalize the advantages over all tokens of the rollout batch.
        value_lam: `lam` for the returns that the value estimate is trained on; None: `lam`. With 1 these targets do not depend on
            the estimate itself (Yuan 2025, "What's behind PPO's collapse in long-CoT?").
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
        td_error = np.where(real, rewards + self.gamma * after - values, 0.0)
        advantage = discounted_returns(td_error, self.gamma * self.lam)
        return_advantage = (
            advantage if self.value_lam is None else discounted_returns(td_error, self.gamma * self.value_lam)
        )
        return (whiten(advantage, real) if self.whiten else advantage), return_advantage + values


def discounted_returns(x: np.ndarray, discount: float = 1.0) -> np.ndarray:
    """Return the discounted sum of each entry and the later ones in its row: (N, T).

    >>> discounted_returns(np.array([[1.0, 2.0, 4.0]]), 0.5).tolist()
    [[3.0, 4.0, 4.0]]
    """
    sums = np.array(x, np.float64)
    for t in reversed(range(x.shape[1] - 1)):
        sums[:, t] += discount * sums[:, t + 1]
    return sums


@dataclass(frozen=True)
class Baseline:
    """Reward of a whole answer minus a leave-one-out baseline (Kool 2019, RLOO), for REINFORCE without a value estimate.

    The baseline is the mean reward of the *other* answers to the same prompt, or of all other answers of the rollout batch if
    each prompt has one. It does not depend on the answer itself, so the gradient stays unbiased.

    Args:
        whiten: Whether to divide by the standard deviation over the rollout batch, which only scales the step.
    """

    whiten: bool = False

    def __call__(
        self, rewards: np.ndarray, values: np.ndarray, real: np.ndarray, group: int
    ) -> tuple[np.ndarray, np.ndarray]:
        total = np.where(real, rewards, 0.0).sum(1)
        by_group = total.reshape(-1, group if group > 1 else len(total))
        n = by_group.shape[1]
        if n < 2:
            raise UserError(
                "a baseline needs at least two answers: raise examples.rollout_size or examples.num_generations"
            )
        advantage = (by_group - (by_group.sum(1, keepdims=True) - by_group) / (n - 1)).ravel()
        if self.whiten:
            advantage = advantage / (advantage.std() + 1e-8)
        return np.where(real, advantage[:, None], 0.0), np.where(real, total[:, None], 0.0)
