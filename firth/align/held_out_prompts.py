"""Answers to prompts that are never trained on, scored during training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan

import numpy as np

from firth.align.per_token import per_token_numbers
from firth.align.rewards import RewardFunction, Rollout, WeightedRewards, replace_unfinished
from firth.align.sample_shared import sample_shared, score_shared
from firth.data.dialogues import Prompt
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model.model import LM
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import RankGroup


@dataclass(frozen=True, eq=False)
class HeldOutPrompts:
    """Held-out prompts of a run that trains on its own answers.

    Args:
        prompts: The prompts.
        tokenizer: The tokenizer.
        rewards: The rewards that are trained on.
        reference: The frozen reference model.
        max_new_tokens: The most tokens of an answer.
        seed: Seed of the answers, the same at every measurement, so that two measurements differ less by chance.
        true_reward_function: A reward that is not trained on; None without one.
        stops: Tokens that end an answer; default: those of the tokenizer.
        unfinished_score: The score of an answer without a stop token; None uses the reward.
        ranks: The ranks that share the sampling and the rewards, all of which measure; None for one.
    """

    prompts: Sequence[Prompt]
    tokenizer: Tokenizer
    rewards: WeightedRewards
    reference: LM
    max_new_tokens: int
    seed: int
    true_reward_function: RewardFunction | None = None
    stops: Sequence[int] | None = None
    unfinished_score: float | None = None
    ranks: RankGroup | None = None

    def measure(self, model: LM, count: int) -> dict[str, float]:
        """Sample an answer to each of `count` evenly spaced prompts; return the means of reward, truth, KL, length and finished.

        Args:
            model: The policy.
            count: The most prompts; 0 for all.
        """
        size = min(count or len(self.prompts), len(self.prompts))
        some = [self.prompts[i] for i in np.linspace(0, len(self.prompts) - 1, size).round().astype(int)]
        tokens = [prompt.tokens for prompt in some]
        engine = Engine(model, self.tokenizer, self.stops)
        written = sample_shared(
            engine, tokens, Sampling(max_new_tokens=self.max_new_tokens, seed=self.seed), self.ranks
        )
        samples = [Rollout.of(p.tokens, w, p.fields) for p, w in zip(some, written, strict=True)]
        scores = score_shared(self.rewards, samples, self.tokenizer, self.ranks)
        total = replace_unfinished(self.rewards.total(scores), samples, self.unfinished_score)
        numbers = per_token_numbers(model, self.reference, samples, 32)
        truth = nan
        if self.true_reward_function is not None:
            true = WeightedRewards.of(self.true_reward_function)
            truth = float(true.total(score_shared(true, samples, self.tokenizer, self.ranks)).mean())
        found = {
            "reward": float(total.mean()),
            "truth": truth,
            "kl_per_answer": float(numbers["kl"].sum(1).mean()),
            "finished": float(np.mean([s.finished for s in samples])),
            "length": float(numbers["real"].sum(1).mean()),
        }
        found |= {f"reward/{name}": float(x.mean()) for name, x in scores.items() if len(scores) > 1}
        return {name: value for name, value in found.items() if value == value}
