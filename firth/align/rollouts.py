"""An on-policy source: its examples are answers sampled from the model in training.

Training calls `prepare` before it builds the batches of a step. Every `steps` steps the source samples a new batch of rollouts
from the current model, scores them with a reward function, and stores what policy gradients need for each token: the
log-probability under the sampling policy (`old`) and under the frozen reference model (`reference`), value estimates, and, from
the penalized rewards

    r_t = -beta (log p(token_t) - log p_ref(token_t)),   and at the last token + the reward

advantages and returns (`firth.align.advantages`). The rollouts are then read like any other source, for one or more epochs, by
`PPO`, `GRPO`, `RLOO` or `Reinforce` in the one training loop. Old log-probabilities are computed by the forward pass of
training, not by the sampler, so that the first ratios are 1 up to rounding; where the sampler's differ, truncated importance
sampling weighs the advantages (Yao 2025). A rollout batch is part of the checkpoint (`state`): an interrupted run resumes
with the same answers.

    rollouts = RolloutSource(prompts, tokenizer, reward, reference, config=RolloutsConfig(rollout_size=64), steps=8)
    batches = Batches(rollouts, PPO(), vocab, batch_size=32, seed=0)                # 64 answers x 4 epochs = 8 steps x 32
    train(policy, PPO(), batches, directory, ...)

Of several ranks each samples and scores the answers to its share of the prompts, from the same seeds as one rank
(`firth.align.answers`). All then compute the numbers of the whole batch, which they need for means over it, and read
their share of the examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import nan
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from firth.align import held_out
from firth.align.advantages import GAE, AdvantageEstimator, GroupNormalized, LeaveOneOut, discounted_returns
from firth.align.answers import answer_mask, batch_numbers, per_token_numbers, sample_shared, score_shared
from firth.align.held_out import HeldOutPrompts, HeldOutTexts, PromptSplits
from firth.align.rewards import (
    FunctionReward,
    RewardFunction,
    RewardModel,
    Rollout,
    WeightedRewards,
    named_function,
    rehearsed,
    replace_unfinished,
)
from firth.data.dialogues import Prompt
from firth.data.dialogues import prompts as read_prompts
from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig
from firth.data.shuffle import epoch_permutation
from firth.data.source import MixtureSource, Source
from firth.data.split import held_out_keys
from firth.data.windows import Documents, WindowsConfig
from firth.fields import NonNegativeFloat, NonNegativeInt, PositiveInt, Share, TokenCount, path_field
from firth.generate.engine import Engine
from firth.generate.output import IncrementalDecoder
from firth.generate.sampling import Sampling
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.objectives.policy_gradient import PER_TOKEN, KLEstimator, has_critic, init_critic, kl_estimate
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import DataStats, Example, RankGroup, UserError

STATISTICS = (
    "reward", "truth", "kl_per_answer", "explained_variance", "finished", "length", "reward_deviation", "penalized",
    "kl_per_token", "kl_per_token_estimate", "entropy", "kl_coef", "sampler_difference",
)  # fmt: skip
"""Metrics of a rollout batch, in the order in which a checkpoint stores them; each of several rewards follows."""

SAMPLER_TOLERANCE = 1e-5
"""Largest difference between the log-probabilities of sampler and training that is rounding."""


@dataclass(frozen=True)
class RolloutsConfig(ExamplesConfig):
    """Rollouts: answers that the policy samples to the prompts of the records, scored by a reward.

    Prompts that are too long are dropped and counted.

    Args:
        rollout_size: Answers per rollout phase.
        num_generations: Answers to each prompt.
        num_epochs: Epochs of training on each rollout.
        max_new_tokens: The most tokens of an answer.
        max_prompt_length: The most tokens of a prompt; it must also fit into the context with `max_new_tokens`.
        kl_coef: Penalty per nat of divergence from the initial model, which is subtracted from the reward token by token.
        kl_estimator: How the divergence at a token is estimated: "k1", "k2" or "k3" (`firth.objectives.policy_gradient`).
        kl_target: Divergence in nats per answer that `kl_coef` is adapted to (Ziegler 2019, section 2.2); 0 keeps it fixed.
        kl_gain: How fast it is adapted: by at most a fifth of this per rollout phase.
        reward_model: The run of a reward model.
        reward_function: Functions as `module:function`, which may be in the working directory. A function has one parameter,
            the text of the answer, or names what it needs: `completion`, `prompt`, and fields of the record.
        reward_weights: Weights of the reward model, if there is one, and of the functions; empty: 1 each.
        true_reward_function: A further function that is logged and not trained on.
        unfinished_score: The score of an answer that reached `max_new_tokens` without a stop token; None uses the reward.
        advantages: "gae" for PPO, which has a critic. Without one, "rloo" subtracts the mean reward of the other answers
            (RLOO, REINFORCE), "grpo" that of the group.
        scale_rewards: With "grpo", the standard deviation that the advantages are divided by: that of the "group", of the
            "batch", or "none" (Dr. GRPO).
        gamma: With "gae", the discount of a reward one token later.
        lam: With "gae", how far sampled rewards are relied on, against the critic.
        whiten_advantages: With "gae", whether the advantages of a rollout phase get mean 0 and standard deviation 1.
        importance_sampling_cap: The largest weight by which an answer's token is corrected where sampler and training disagree on
            its probability (truncated importance sampling); 0 corrects nothing.
        pretraining_path: Text files that are trained on in the same steps, with the weight `objective.ptx_coef` (PPO-ptx).
        pretraining_rows: Rows of that text in each step, of the batch.size rows.
        pretraining_length: Tokens of a row of that text.

    Raises:
        UserError: A number is out of range.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "mask", *PER_TOKEN})
    required_fields: ClassVar[frozenset[str]] = frozenset({"mask"})
    drops_long_records: ClassVar[bool] = True

    rollout_size: PositiveInt = 64
    num_generations: PositiveInt = 1
    num_epochs: PositiveInt = 2
    max_new_tokens: TokenCount = 48
    max_prompt_length: TokenCount = 192
    kl_coef: NonNegativeFloat = 0.05
    kl_estimator: KLEstimator = "k1"
    kl_target: NonNegativeFloat = 0.0
    kl_gain: NonNegativeFloat = 0.1
    reward_model: str = path_field("model", "")
    reward_function: tuple[str, ...] = ()
    reward_weights: tuple[NonNegativeFloat, ...] = ()
    true_reward_function: str = ""
    unfinished_score: float | None = None
    advantages: Literal["gae", "rloo", "grpo"] = "gae"
    scale_rewards: Literal["group", "batch", "none"] = "group"
    gamma: Share = 1.0
    lam: Share = 0.95
    whiten_advantages: bool = True
    importance_sampling_cap: NonNegativeFloat = 2.0
    pretraining_path: tuple[str, ...] = path_field("files", ())
    pretraining_rows: NonNegativeInt = 0
    pretraining_length: TokenCount = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_size % self.num_generations:
            raise UserError(
                f"examples.rollout_size={self.rollout_size} must be a positive multiple of "
                f"examples.num_generations={self.num_generations}"
            )
        rewards = bool(self.reward_model) + len(self.reward_function)
        if self.reward_weights and len(self.reward_weights) != rewards:
            raise UserError(
                f"examples.reward_weights has {len(self.reward_weights)} numbers for {rewards} rewards: give one for the reward "
                "model, if there is one, and one for each function"
            )

    def steps(self, batch_size: int) -> int:
        """Return the training steps per rollout batch, for a batch size in rows.

        Raises:
            UserError: The answers do not fill these steps evenly.
        """
        answers = batch_size - self.pretraining_rows
        if answers < 1:
            raise UserError(
                f"examples.pretraining_rows={self.pretraining_rows} leaves no row of batch.size={batch_size} for an answer: raise "
                "batch.size"
            )
        steps, over = divmod(self.rollout_size * self.num_epochs, answers)
        if over or not steps:
            text = f" less examples.pretraining_rows={self.pretraining_rows}" if self.pretraining_rows else ""
            raise UserError(
                f"{self.rollout_size} answers for {self.num_epochs} epochs do not fill steps of batch.size={batch_size}{text} evenly"
            )
        return steps

    def check_objective(self, objective: Objective) -> None:
        critic = "returns" in objective.inputs
        if self.advantages != "gae" and critic:
            raise UserError(
                f"examples.advantages={self.advantages} compares answers with each other, and the critic of objective ppo would be "
                "trained for nothing: set examples.advantages=gae, or take objective=grpo"
            )
        if self.advantages == "gae" and "advantage" in objective.inputs and not critic:
            raise UserError(
                "examples.advantages=gae needs the estimates of a critic, which only objective ppo has: set "
                "examples.advantages=rloo or grpo, or take objective=ppo"
            )
        if bool(self.pretraining_rows) != ("ptx" in objective.labels):
            raise UserError(
                "rows of pretraining text need a weight, and a weight needs rows: set objective.ptx_coef and "
                "examples.pretraining_rows together"
            )

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return the most tokens of an answer, which Dr. GRPO divides by."""
        return DataStats(max_answer_tokens=self.max_new_tokens)

    def estimator(self) -> AdvantageEstimator:
        """Return how advantages are computed from rewards."""
        if self.advantages == "gae":
            return GAE(self.gamma, self.lam, self.whiten_advantages, value_lam=1.0)
        return LeaveOneOut() if self.advantages == "rloo" else GroupNormalized(self.scale_rewards)

    @property
    def functions(self) -> dict[str, str]:
        names = [f"reward_function.{i}" for i in range(len(self.reward_function))]
        found = dict(zip(names if len(names) > 1 else ["reward_function"], self.reward_function, strict=False))
        return found | ({"true_reward_function": self.true_reward_function} if self.true_reward_function else {})

    def row_limits(self, text: int, source: int) -> dict[str, int]:
        return {"max_prompt_length": text - self.max_new_tokens}

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        if data.siblings:
            raise UserError(
                "data.weights cannot mix prompts, which are drawn from all records of data.path in turn: remove data.weights, and "
                "repeat the records that are to be answered more often"
            )
        if bool(self.pretraining_path) != bool(self.pretraining_rows):
            raise UserError("set examples.pretraining_path and examples.pretraining_rows together")
        start = data.frozen_start("the model that writes the first answers, which is also the reference")
        found, keys = self._prompts(data, start, data.config.paths(data.log))
        aside = held_out_keys(keys, 0.0 if data.config.validation_path else data.config.validation_fraction, len(found))
        prompts, held = ([p for p, out in zip(found, aside, strict=True) if out == side] for side in (False, True))
        if data.config.validation_path:
            held, _ = self._prompts(data, start, data.config.validation_path)
        learned = self._reward_model(data, [p.tokens for p in prompts], start) if self.reward_model else None
        judge = self._rewards(learned, [*prompts, *held])
        true = FunctionReward(named_function(self.true_reward_function)) if self.true_reward_function else None
        if true is not None:
            _check_fields("true_reward_function", self.true_reward_function, true, [*prompts, *held])
        source: Source = RolloutSource(
            [p.tokens for p in prompts], data.tokenizer, judge, start, config=self, steps=self.steps(data.batch_size), seed=data.seed,
            advantage_estimator=self.estimator(), true_reward_function=true, critic=learned, fields=[p.fields for p in prompts],
            ranks=data.ranks,
        )  # fmt: skip
        if self.pretraining_rows:
            text = replace(
                data, config=replace(data.config, path=self.pretraining_path, corpus="", validation_path=(), weights=())
            )
            kind = WindowsConfig(max_length=self.pretraining_length)
            windows = Documents(kind, text.stores()[0], data.tokenizer.vocab)
            source = MixtureSource([source, windows], [data.batch_size - self.pretraining_rows, self.pretraining_rows])
        examples = [{"tokens": p.tokens, "fields": p.fields} for p in (held or prompts)[: held_out.COUNT]]
        measured = HeldOutPrompts(
            held, data.tokenizer, judge, start, self.max_new_tokens, data.seed, true, unfinished_score=self.unfinished_score,
            ranks=data.ranks,
        ) if held else None  # fmt: skip
        texts = HeldOutTexts(examples, bool(held), judge, self.max_new_tokens)
        return PromptSplits(source, None, texts=texts, prompts=measured)

    def _rewards(self, learned: RewardModel | None, prompts: Sequence[Prompt]) -> WeightedRewards:
        """Return the rewards of the recipe, which the records have the fields for."""
        parts: dict[str, RewardFunction] = {} if learned is None else {"reward_model": learned}
        for name in self.reward_function:
            function = FunctionReward(named_function(name))
            _check_fields("reward_function", name, function, prompts)
            parts[name.partition(":")[2]] = function
        if not parts:
            raise UserError(
                "rollouts need a reward: set examples.reward_model=RUN or examples.reward_function=module:function"
            )
        if len(parts) < bool(learned) + len(self.reward_function):
            raise UserError("two functions of examples.reward_function have the same name: rename one of them")
        return WeightedRewards(parts, self.reward_weights or [1.0] * len(parts))

    def _prompts(self, data: BuildContext, start: LM, paths: Sequence[str]) -> tuple[list[Prompt], np.ndarray]:
        """Return the prompts that fit into the context with `max_new_tokens`, and their keys; report how many do not."""
        room = start.context - self.max_new_tokens
        if room < 1:
            raise UserError(
                f"examples.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in the {start.context} positions of the model: "
                "lower examples.max_new_tokens"
            )
        limit = min(self.max_prompt_length, room)
        prompts, keys, counts = read_prompts(paths, data.tokenizer, limit)
        if counts.get("too_long"):
            why = (
                f"examples.max_prompt_length={limit}"
                if limit < room
                else f"{start.context} positions less examples.max_new_tokens={self.max_new_tokens}"
            )
            data.log(
                f"{counts['too_long']:,} of {counts['records']:,} prompts are left out: longer than {limit} tokens ({why})"
            )
        return prompts, keys

    def _reward_model(self, data: BuildContext, prompts: Sequence[np.ndarray], start: LM) -> RewardModel:
        """Return the reward model, normalized on answers of the initial model so that `kl_coef` does not depend on its scale."""
        hint = "train the reward model from the same start as the policy"
        judge = RewardModel(
            data.frozen_model(self.reward_model, "examples.reward_model", "the run of a reward model", hint)
        )
        some = [prompts[i] for i in range(0, len(prompts), max(1, len(prompts) // 64))][:64]
        with data.autocast():
            sampling = Sampling(max_new_tokens=self.max_new_tokens, seed=data.seed)
            written = Engine(start, data.tokenizer).generate(some, sampling)
            return judge.normalized([Rollout.of(p, w) for p, w in zip(some, written, strict=True)])


def _check_fields(setting: str, name: str, function: FunctionReward, prompts: Sequence[Prompt]) -> None:
    """Raise a UserError if a record lacks a field that a reward function names."""
    for prompt in prompts:
        missing = function.missing(prompt.fields)
        if missing:
            raise UserError(
                f"{prompt.location}: the record has no field {missing[0]!r}, which examples.{setting}={name} names: add it, or "
                f"give the parameter a default; the record has {', '.join(prompt.fields)}"
            )


def next_kl_coef(kl_coef: float, divergence: float, target: float, gain: float) -> float:
    """Return the adapted weight of the KL penalty: beta (1 + gain * clip(KL / target - 1, -0.2, 0.2)) (Ziegler 2019, section 2.2).

    >>> next_kl_coef(0.1, divergence=3.3, target=3.0, gain=0.1), next_kl_coef(0.1, divergence=30.0, target=3.0, gain=0.5)
    (0.101, 0.11000000000000001)
    """
    return kl_coef * (1 + gain * min(max(divergence / target - 1, -0.2), 0.2))


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
        config: Number and length of the rollouts; default `RolloutsConfig()`.
        steps: Training steps per rollout batch: rollout_size * epochs / batch size.
        advantage_estimator: Default `GAE()`.
        true_reward_function: A second reward function that is logged, but not trained on.
        stops: Tokens that end an answer; default: those of the tokenizer.
        seed: Seed of the order of prompts and of sampling.
        batch_size: Sequences per forward pass.
        critic: Reward model that PPO's critic is initialized from before the first rollout batch; without one, or with one of
            another model config, it is initialized from the reference.
        fields: The fields of each prompt's record, for reward functions.
        ranks: The ranks that share the sampling and the rewards; None for one.

    Raises:
        UserError: There are no prompts, or a prompt leaves no room for an answer.
    """

    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        tokenizer: Tokenizer,
        reward_function: RewardFunction | WeightedRewards,
        reference: LM,
        *,
        config: RolloutsConfig | None = None,
        steps: int = 8,
        advantage_estimator: AdvantageEstimator | None = None,
        true_reward_function: RewardFunction | None = None,
        stops: Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int = 32,
        critic: RewardModel | None = None,
        fields: Sequence[Mapping[str, Any]] | None = None,
        ranks: RankGroup | None = None,
    ) -> None:
        if not prompts:
            raise UserError("there are no prompts to answer")
        config = config or RolloutsConfig()
        longest, room = max(map(len, prompts)), reference.context - config.max_new_tokens
        if longest > room:
            raise UserError(
                f"a prompt of {longest} tokens and an answer of {config.max_new_tokens} do not fit the {reference.context} "
                f"positions of the model: leave out prompts of more than {max(room, 0)} tokens, or lower max_new_tokens"
            )
        self.prompts, self.tokenizer = prompts, tokenizer
        self.fields = fields or [{}] * len(prompts)
        self.rewards, self.reference = WeightedRewards.of(reward_function), reference
        reference.restrict_vocab(tokenizer.vocab)
        self.config, self.steps, self.true_reward_function = config, steps, true_reward_function
        self.advantage_estimator = advantage_estimator or GAE()
        self.stops, self.seed, self.batch_size, self.critic, self.ranks = stops, seed, batch_size, critic, ranks
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
        number = step // self.steps
        if number == self.number:
            return {}
        if self.number < 0:
            c = self.critic
            if c is None or not init_critic(model, c.model, c.mean, c.scale):
                init_critic(model, self.reference)
        self._draw(model, number)
        return dict(self.history[-1])

    def rehearse(self) -> int:
        self.number, self.rewards = 0, self.rewards.without_functions()
        self.true_reward_function = self.true_reward_function and rehearsed(self.true_reward_function)
        self.samples = self._longest_answers(0)
        real = answer_mask([len(sample.answer) for sample in self.samples])
        self._store(real, dict.fromkeys(PER_TOKEN, np.zeros(real.shape)))
        models = [self.reference, *([self.critic.model] if self.critic is not None else [])]
        return sum(p.numel() * p.element_size() for model in models for p in model.parameters())

    def rehearse_rollout(self, model: LM, number: int) -> None:
        samples = self._longest_answers(number)
        for first in range(0, len(samples), self.batch_size):
            batch_numbers(model, model, samples[first : first + self.batch_size])

    def _longest_answers(self, number: int) -> list[Rollout]:
        """Return answers of the most tokens to the prompts of a rollout batch."""
        answer = np.full(self.config.max_new_tokens, self.tokenizer.vocab.size - 1, np.int32)
        return [Rollout(self.prompts[i], answer, "", True) for i in self._prompts_of(number)]

    @property
    def steps_per_rollout(self) -> int:
        return self.steps

    @property
    def statistics(self) -> tuple[str, ...]:
        """The metrics of a rollout batch."""
        parts = self.rewards.parts
        return (*STATISTICS, *(f"reward/{name}" for name in parts if len(parts) > 1))

    @property
    def notes(self) -> Sequence[str]:
        largest = max((row["sampler_difference"] for row in self.history), default=0.0)
        if not largest > SAMPLER_TOLERANCE:
            return []
        cap = self.config.importance_sampling_cap
        how = (
            f"truncated importance sampling corrects for it, with weights up to {cap:g}"
            if cap
            else "nothing corrects for it"
        )
        return [
            f"the log-probabilities of sampled tokens differ by up to {largest:.2g} nats between sampling and training, which rounds "
            f"differently: {how} (examples.importance_sampling_cap)"
        ]

    @property
    def kl_coef(self) -> float:
        """The weight of the KL penalty for the next rollout batch."""
        c = self.config
        if not c.kl_target or not self.history:
            return c.kl_coef
        last = self.history[-1]
        return next_kl_coef(last["kl_coef"], last["kl_per_answer"], c.kl_target, c.kl_gain)

    def _draw(self, model: LM, number: int) -> None:
        """Sample rollout batch `number` and replace the current one, which is kept if the reward function fails."""
        index = self._prompts_of(number)
        prompts = [self.prompts[i] for i in index]
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        engine = Engine(model, self.tokenizer, self.stops, batch_size=self.batch_size)
        sampling = Sampling(max_new_tokens=self.config.max_new_tokens, seed=seed)
        with model.whole():
            completions = sample_shared(engine, prompts, sampling, self.ranks)
        samples = [Rollout.of(p, w, self.fields[i]) for p, w, i in zip(prompts, completions, index, strict=True)]
        scores = score_shared(self.rewards, samples, self.tokenizer, self.ranks)
        score = self.rewards.total(scores)
        true_reward = nan
        if self.true_reward_function:
            true = WeightedRewards.of(self.true_reward_function)
            true_reward = true.total(score_shared(true, samples, self.tokenizer, self.ranks)).mean()
        kl_coef = self.kl_coef
        self.number, self.samples = number, samples
        finished = np.array([s.finished for s in self.samples])
        score = replace_unfinished(score, self.samples, self.config.unfinished_score)
        with model.whole():
            numbers = per_token_numbers(model, self.reference, self.samples, self.batch_size)
        real, old, reference = numbers["real"], numbers["old"], numbers["reference"]
        divergence = kl_estimate(torch.from_numpy(old), torch.from_numpy(reference), self.config.kl_estimator).numpy()
        rewards = np.where(real, -kl_coef * divergence, 0.0)
        rewards[np.arange(len(real)), real.sum(1) - 1] += score
        advantage, returns = self.advantage_estimator(rewards, numbers["values"], real, self.config.num_generations)
        sampler = np.zeros(real.shape)
        sampler[real] = np.concatenate([w.logprobs for w in completions])
        difference = float(np.abs(old - sampler).max())
        if difference > SAMPLER_TOLERANCE and self.config.importance_sampling_cap:
            advantage = advantage * np.minimum(np.exp(old - sampler), self.config.importance_sampling_cap)
        self._store(real, numbers | {"advantage": advantage, "returns": returns})
        estimator = self.advantage_estimator
        target = discounted_returns(rewards, estimator.gamma if isinstance(estimator, GAE) else 1.0)[real]
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
            "kl_per_token_estimate": float(
                kl_estimate(torch.from_numpy(old[real]), torch.from_numpy(reference[real])).mean()
            ),
            "entropy": float(numbers["entropy"][real].mean()),
            "kl_coef": kl_coef,
            "sampler_difference": difference,
        }
        metrics |= {f"reward/{name}": float(x.mean()) for name, x in scores.items() if len(scores) > 1}
        self.history.append(metrics | {"phase": float(self.number)})

    def _prompts_of(self, number: int) -> list[int]:
        """Return the indices of the prompts of a rollout batch, each `num_generations` times."""
        count = self.config.rollout_size // self.config.num_generations
        _, index = epoch_permutation(len(self.prompts), self.seed, np.arange(count) + count * number)
        return [i for i in index.tolist() for _ in range(self.config.num_generations)]

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
        history = np.array([[row[name] for name in (*self.statistics, "phase")] for row in self.history], np.float64)
        return {
            "number": np.array([self.number]),
            "lengths": self._lengths,
            "tokens": self._tokens,
            "per_token": self._per_token,
            "finished": np.array([s.finished for s in self.samples], bool),
            "history": history.reshape(-1, 1 + len(self.statistics)),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.number = int(state["number"][0])
        self._lengths, self._tokens = np.array(state["lengths"]), np.array(state["tokens"])
        self._per_token = np.array(state["per_token"])
        self.history = [
            dict(zip((*self.statistics, "phase"), map(float, row), strict=True)) for row in state["history"]
        ]
        self.samples = []
        ends = self._lengths.sum(1).cumsum()
        for (prompt_length, answer_length), end, finished in zip(self._lengths, ends, state["finished"], strict=True):
            prompt, answer = np.split(self._tokens[end - prompt_length - answer_length : end], [prompt_length])
            self.samples.append(
                Rollout(
                    prompt, answer, IncrementalDecoder(self.tokenizer, prompt).text(answer.tolist()), bool(finished)
                )
            )
