"""An on-policy source: its examples are answers sampled from the model in training.

Training calls `prepare` before it builds the batches of a step. Every `steps` steps the source samples a new batch of rollouts
from the current model, scores them with a reward function, and stores what policy gradients need for each token: the
log-probability under the sampling policy (`old`) and under the frozen reference model (`reference`), value estimates, and, from
the penalized rewards

    r_t = -beta (log p(token_t) - log p_ref(token_t)),   and at the last token + the reward

advantages and returns (`firth.align.advantages`). The rollouts are then read like any other source, for one or more epochs, by
`PPO` or `Reinforce` in the one training loop. Old log-probabilities are computed by the forward pass of training, not by the
sampler, so that the first ratios are 1 up to rounding. A rollout batch is part of the checkpoint (`state`): an interrupted run
resumes with the same answers.

    rollouts = RolloutSource(prompts, tokenizer, reward, reference, config=RolloutConfig(rollout_size=64, steps=8))
    batches = Batches(rollouts, PPO(), vocab, batch_size=32, seed=0)                # 64 answers x 4 epochs = 8 steps x 32
    train(policy, PPO(), batches, directory, ...)

Each of several ranks samples the whole rollout batch from the same seeds and reads its own share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan

import numpy as np
import torch
from torch import Tensor

from firth.align.advantages import GAE, AdvantageEstimator, discounted_returns
from firth.align.rewards import RewardFunction, RewardModel, Rollout, score_rollouts
from firth.data.shuffle import epoch_permutation
from firth.data.source import Source
from firth.generate.decoding_batch import inference_mode, rectangle
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.generate.streaming import IncrementalDecoder
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.policy_gradient import PER_TOKEN, critic_states, has_critic, init_critic, kl_estimate, values
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import Example, UserError

STATISTICS = (
    "reward", "truth", "kl_per_answer", "explained_variance", "finished", "length", "reward_deviation", "penalized",
    "kl_per_token", "kl_per_token_estimate", "entropy",
)  # fmt: skip
"""Metrics of a rollout batch, in the order in which a checkpoint stores them."""
POSITIONS_PER_CHUNK = 512
"""Positions whose full distributions are held in memory at once."""


@dataclass(frozen=True)
class RolloutConfig:
    """Number and length of the rollouts.

    Args:
        rollout_size: Answers per rollout batch.
        num_generations: Answers per prompt.
        steps: Training steps per rollout batch; rollout_size * epochs / batch size.
        max_new_tokens: Maximum number of tokens of an answer.
        kl_coef: Penalty per nat of divergence from the reference.
        unfinished_score: Reward of an answer without a stop token; None: that of the reward function.

    Raises:
        UserError: A number is out of range.
    """

    rollout_size: int = 64
    num_generations: int = 1
    steps: int = 8
    max_new_tokens: int = 48
    kl_coef: float = 0.05
    unfinished_score: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"examples.max_new_tokens is {self.max_new_tokens} and must be at least 1")
        if (
            self.rollout_size < 1
            or self.num_generations < 1
            or self.steps < 1
            or self.rollout_size % self.num_generations
        ):
            raise UserError(
                f"examples.rollout_size={self.rollout_size} must be a positive multiple of "
                f"examples.num_generations={self.num_generations}, and steps={self.steps} must be positive"
            )


def explained_variance(target: np.ndarray, values: np.ndarray) -> float:
    """Return the fraction of the variance of `target` that estimates explain: at most 1, 0 for a constant, negative if worse.

    >>> explained_variance(np.array([0.0, 2.0]), np.array([5.0, 7.0])), explained_variance(np.ones(2), np.zeros(2))
    (1.0, 0.0)
    """
    variance = float(target.var())
    return 1 - float((target - values).var()) / variance if variance else 0.0


class RolloutSource(Source):
    """The current batch of rollouts, with `rollout_size` examples.

    Training calls `prepare` in the precision of its steps, so that old log-probabilities are those of training.

    Args:
        prompts: Token ids of each prompt, (n,), read in a permuted order that continues from one rollout batch to the next.
        tokenizer: The tokenizer.
        reward_function: Scores the answers.
        reference: The frozen reference model, which is not part of the trained one.
        config: Number and length of the rollouts; default `RolloutConfig()`.
        advantage_estimator: Default `GAE()`.
        true_reward_function: A second reward function that is logged, but not trained on.
        stops: Tokens that end an answer; default: those of the tokenizer.
        seed: Seed of the order of prompts and of sampling.
        batch_size: Sequences per forward pass.
        critic: Reward model that PPO's critic is initialized from before the first rollout batch; without one, or with one of
            another model config, it is initialized from the reference.

    Raises:
        UserError: There are no prompts, or a prompt leaves no room for an answer.
    """

    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        tokenizer: Tokenizer,
        reward_function: RewardFunction,
        reference: LM,
        *,
        config: RolloutConfig | None = None,
        advantage_estimator: AdvantageEstimator | None = None,
        true_reward_function: RewardFunction | None = None,
        stops: Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int = 32,
        critic: RewardModel | None = None,
    ) -> None:
        if not prompts:
            raise UserError("there are no prompts to answer")
        config = config or RolloutConfig()
        longest, room = max(map(len, prompts)), reference.context - config.max_new_tokens
        if longest > room:
            raise UserError(
                f"a prompt of {longest} tokens and an answer of {config.max_new_tokens} do not fit the {reference.context} "
                f"positions of the model: leave out prompts of more than {max(room, 0)} tokens, or lower max_new_tokens"
            )
        self.prompts, self.tokenizer = prompts, tokenizer
        self.reward_function, self.reference = reward_function, reference
        reference.restrict_vocab(tokenizer.vocab)
        self.config, self.true_reward_function = config, true_reward_function
        self.advantage_estimator = advantage_estimator or GAE()
        self.stops, self.seed, self.batch_size, self.critic = stops, seed, batch_size, critic
        self.number = -1
        self.history: list[dict[str, float]] = []
        self.samples: list[Rollout] = []
        self._lengths = np.zeros((0, 2), np.int64)
        self._tokens = np.zeros(0, np.int32)
        self._per_token = np.zeros((len(PER_TOKEN), 0), np.float32)

    def __len__(self) -> int:
        return self.config.rollout_size

    def __getitem__(self, index: int) -> Example:
        if self.number < 0:
            raise UserError("no answers have been sampled yet: call prepare(model, step) first")
        ends = self._lengths.sum(1).cumsum()
        span = slice(ends[index] - self._lengths[index].sum(), ends[index])
        tokens = self._tokens[span]
        values = dict(zip(PER_TOKEN, self._per_token[:, span], strict=True))
        return {"tokens": tokens, "mask": np.arange(len(tokens)) >= self._lengths[index, 0]} | values

    def prepare(self, model: LM, step: int) -> Mapping[str, float]:
        """Sample the rollout batch of this step, unless it is the current one.

        Returns:
            Metrics of a new rollout batch: means over its answers or its tokens. kl_per_answer is in nats; explained_variance is
            that of the rewards-to-go by the critic, which has not been trained on them.
        """
        number = step // self.config.steps
        if number == self.number:
            return {}
        if self.number < 0:
            c = self.critic
            if c is None or not init_critic(model, c.model, c.mean, c.scale):
                init_critic(model, self.reference)
        self._draw(model, number)
        return dict(self.history[-1])

    def _draw(self, model: LM, number: int) -> None:
        """Sample rollout batch `number` and replace the current one, which is kept if the reward function fails."""
        prompts = self._prompts_of(number)
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        engine = Engine(model, self.tokenizer, self.stops, batch_size=self.batch_size)
        completions = engine.generate(prompts, Sampling(max_new_tokens=self.config.max_new_tokens, seed=seed))
        samples = [Rollout.of(p, w) for p, w in zip(prompts, completions, strict=True)]
        score = score_rollouts(self.reward_function, samples, self.tokenizer)
        true_reward = (
            score_rollouts(self.true_reward_function, samples, self.tokenizer).mean()
            if self.true_reward_function
            else nan
        )
        self.number, self.samples = number, samples
        finished = np.array([s.finished for s in self.samples])
        if self.config.unfinished_score is not None:
            score = np.where(finished, score, self.config.unfinished_score)
        numbers = self._read(model)
        real, old, reference = numbers["real"], numbers["old"], numbers["reference"]
        rewards = np.where(real, -self.config.kl_coef * (old - reference), 0.0)
        rewards[np.arange(len(real)), real.sum(1) - 1] += score
        advantage, returns = self.advantage_estimator(rewards, numbers["values"], real, self.config.num_generations)
        self._store(real, numbers | {"advantage": advantage, "returns": returns})
        target = discounted_returns(rewards)[real]
        metrics = {
            "reward": float(score.mean()),
            "truth": float(true_reward),
            "kl_per_answer": float(numbers["kl"].sum(1).mean()),
            "explained_variance": explained_variance(target, numbers["values"][real]) if has_critic(model) else nan,
            "finished": float(finished.mean()),
            "length": float(real.sum(1).mean()),
            "reward_deviation": float(score.std()),
            "penalized": float(rewards.sum(1).mean()),
            "kl_per_token": float(numbers["kl"][real].mean()),
            "kl_per_token_estimate": float(kl_estimate(torch.from_numpy(old[real]), torch.from_numpy(reference[real])).mean()),
            "entropy": float(numbers["entropy"][real].mean()),
        }
        self.history.append(metrics | {"phase": float(self.number)})

    def _prompts_of(self, number: int) -> list[np.ndarray]:
        """Return the prompts of a rollout batch, each `num_generations` times."""
        count = self.config.rollout_size // self.config.num_generations
        _, index = epoch_permutation(len(self.prompts), self.seed, np.arange(count) + count * number)
        return [self.prompts[i] for i in index.tolist() for _ in range(self.config.num_generations)]

    def _read(self, model: LM) -> dict[str, np.ndarray]:
        """Return numbers of policy and reference for each sampled token, (N, T) float64 each, and `real`."""
        longest = max(len(s.answer) for s in self.samples)
        real = np.stack([np.arange(longest) < len(s.answer) for s in self.samples])
        out = {name: np.zeros(real.shape) for name in ("old", "reference", "values", "kl", "entropy")}
        for first in range(0, len(self.samples), self.batch_size):
            some = self.samples[first : first + self.batch_size]
            is_answer = real[first : first + self.batch_size]
            for name, per_token in self._per_token_values(model, some).items():
                out[name][first : first + self.batch_size][is_answer] = per_token.double().cpu().numpy()
        return out | {"real": real}

    def _per_token_values(self, model: LM, samples: Sequence[Rollout]) -> dict[str, Tensor]:
        """Return one number per sampled token of these answers, in row order: (tokens,) each."""
        device = model.tokens.weight.device
        batch = rectangle([s.tokens[:-1] for s in samples], device)
        is_label = rectangle([s.mask[1:] for s in samples], device)["tokens"].bool()
        labels = torch.from_numpy(np.concatenate([s.answer for s in samples]).astype(np.int64)).to(device)
        with inference_mode(model), inference_mode(self.reference):
            hidden, frozen = model(batch), self.reference(batch)[is_label]
            states = hidden[is_label]
            policy_head: LMHead = model.heads["lm"]  # type: ignore[assignment]
            ref_head: LMHead = self.reference.heads["lm"]  # type: ignore[assignment]
            chunks: dict[str, list[Tensor]] = {"old": [], "reference": [], "kl": [], "entropy": []}
            for at in range(0, len(labels), POSITIONS_PER_CHUNK):
                span = slice(at, at + POSITIONS_PER_CHUNK)
                p = policy_head(states[span]).float().log_softmax(-1)  # (chunk, V)
                q = ref_head(frozen[span]).float().log_softmax(-1)
                label = labels[span, None]
                chunks["old"].append(p.gather(-1, label)[:, 0])
                chunks["reference"].append(q.gather(-1, label)[:, 0])
                # Over the whole vocabulary rather than the sampled token: exact at each state, and never negative.
                chunks["kl"].append((p.exp() * (p - q)).sum(-1).clamp(min=0))
                chunks["entropy"].append(-(p.exp() * p).sum(-1))
            out = {name: torch.cat(pieces) for name, pieces in chunks.items()}
            if has_critic(model):
                out["values"] = values(model, critic_states(model, hidden, batch)[is_label])
        return out

    def _store(self, real: np.ndarray, numbers: Mapping[str, np.ndarray]) -> None:
        """Store the rollout batch as flat arrays: tokens of all answers, and PER_TOKEN for each token, 0 on prompts."""
        self._lengths = np.array([(len(s.prompt), len(s.answer)) for s in self.samples])
        self._tokens = np.concatenate([s.tokens for s in self.samples])
        on = np.concatenate([s.mask for s in self.samples])
        self._per_token = np.zeros((len(PER_TOKEN), len(on)), np.float32)
        for row, name in zip(self._per_token, PER_TOKEN, strict=True):
            row[on] = numbers[name][real]

    def state(self) -> dict[str, np.ndarray]:
        """Return the rollout batch and the history, which an interrupted run cannot compute again."""
        history = np.array([[row[name] for name in (*STATISTICS, "phase")] for row in self.history], np.float64)
        return {
            "number": np.array([self.number]),
            "lengths": self._lengths,
            "tokens": self._tokens,
            "per_token": self._per_token,
            "finished": np.array([s.finished for s in self.samples], bool),
            "history": history.reshape(-1, 1 + len(STATISTICS)),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.number = int(state["number"][0])
        self._lengths, self._tokens = np.array(state["lengths"]), np.array(state["tokens"])
        self._per_token = np.array(state["per_token"])
        self.history = [dict(zip((*STATISTICS, "phase"), map(float, row), strict=True)) for row in state["history"]]
        self.samples = []
        ends = self._lengths.sum(1).cumsum()
        for (prompt_length, answer_length), end, finished in zip(self._lengths, ends, state["finished"], strict=True):
            prompt, answer = np.split(self._tokens[end - prompt_length - answer_length : end], [prompt_length])
            self.samples.append(
                Rollout(
                    prompt, answer, IncrementalDecoder(self.tokenizer, prompt).text(answer.tolist()), bool(finished)
                )
            )
