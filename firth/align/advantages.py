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
from typing import Literal, Protocol

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


def answer_rewards(rewards: np.ndarray, real: np.ndarray, group: int) -> np.ndarray:
    """Return the reward of each whole answer: (prompts, group), or (1, N) if each prompt has one answer.

    Raises:
        UserError: There is a single answer, which nothing can be compared with.
    """
    total = np.where(real, rewards, 0.0).sum(1)
    by_group = total.reshape(-1, group if group > 1 else len(total))
    if by_group.shape[1] < 2:
        raise UserError(
            "a baseline needs at least two answers: raise examples.rollout_size or examples.num_generations"
        )
    return by_group


@dataclass(frozen=True)
class LeaveOneOut:
    """Reward of a whole answer minus the mean of the others (RLOO: Kool 2019, Ahmadian 2024), without a value estimate.

    The others are the answers to the same prompt, or all other answers of the rollout batch if each prompt has one. The mean
    does not depend on the answer itself, so the gradient stays unbiased.

    Args:
        whiten: Whether to divide by the standard deviation over the rollout batch, which only scales the step.
    """

    whiten: bool = False

    def __call__(
        self, rewards: np.ndarray, values: np.ndarray, real: np.ndarray, group: int
    ) -> tuple[np.ndarray, np.ndarray]:
        total = answer_rewards(rewards, real, group)
        n = total.shape[1]
        advantage = total - (total.sum(1, keepdims=True) - total) / (n - 1)
        if self.whiten:
            advantage = advantage / (advantage.std() + 1e-8)
        return per_token(advantage, real), per_token(total, real)


@dataclass(frozen=True)
class GroupNormalized:
    """Reward of a whole answer minus the mean of its group, in units of a standard deviation (GRPO, Shao 2024).

    The group is that of `LeaveOneOut`. The constant 1e-4 and the divisor n - 1 are TRL's.

    Args:
        scale: "group" divides by the standard deviation of the group, "batch" by that of the rollout batch, "none" by nothing
            (Dr. GRPO, Liu 2025): dividing by that of the group gives prompts that are nearly always right, or wrong, more weight.

    >>> real, rewards = np.ones((4, 1), bool), np.array([[0.0], [1.0], [5.0], [5.0]])
    >>> GroupNormalized("none")(rewards, rewards, real, group=2)[0][:, 0].tolist()
    [-0.5, 0.5, 0.0, 0.0]
    """

    scale: Literal["group", "batch", "none"] = "group"

    def __call__(
        self, rewards: np.ndarray, values: np.ndarray, real: np.ndarray, group: int
    ) -> tuple[np.ndarray, np.ndarray]:
        total = answer_rewards(rewards, real, group)
        advantage = total - total.mean(1, keepdims=True)
        if self.scale == "group":
            advantage = advantage / (total.std(1, ddof=1, keepdims=True) + 1e-4)
        elif self.scale == "batch":
            advantage = advantage / (total.std(ddof=1) + 1e-4)
        return per_token(advantage, real), per_token(total, real)


def per_token(per_answer: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Return one number per answer, in any shape, on each of its tokens: (N, T), 0 elsewhere."""
    return np.where(real, per_answer.reshape(-1, 1), 0.0)
