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

    rollouts = RolloutSource(prompts, tokenizer, reward, reference, config=RolloutsConfig(rollout_size=64), steps=8)
    batches = Batches(rollouts, PPO(), vocab, batch_size=32, seed=0)                # 64 answers x 4 epochs = 8 steps x 32
    train(policy, PPO(), batches, directory, ...)

Each of several ranks samples the whole rollout batch from the same seeds and reads its own share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from firth.align import held_out_texts
from firth.align.advantages import GAE, AdvantageEstimator, Baseline, discounted_returns
from firth.align.held_out_texts import HeldOutTexts
from firth.align.rewards import FunctionReward, RewardFunction, RewardModel, Rollout, named_function, score_rollouts
from firth.data.dialogues import prompts as read_prompts
from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig
from firth.data.shuffle import epoch_permutation
from firth.data.source import Source
from firth.data.split import held_out_keys
from firth.fields import NonNegativeFloat, PositiveInt, TokenCount, path_field
from firth.generate.decoding_batch import inference_mode, rectangle
from firth.generate.engine import Engine, IncrementalDecoder
from firth.generate.sampling import Sampling
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.objectives.policy_gradient import PER_TOKEN, critic_states, has_critic, init_critic, kl, values
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
class RolloutsConfig(ExamplesConfig):
    """Rollouts: answers that the policy samples to the prompts of the records, scored by a reward.

    Prompts that are too long are dropped and counted.

    Args:
        rollout_size: Answers per rollout phase.
        num_generations: Answers to each prompt.
        num_epochs: Epochs of training on each rollout.
        max_new_tokens: The most tokens of an answer.
        max_prompt_length: The most tokens of a prompt; it must also fit into the context with `max_new_tokens`.
        kl_coef: Penalty per nat of divergence from the initial model.
        reward_model: The run of a reward model.
        reward_function: In place of `reward_model`, a function of the answer's text as `module:function`, which may be in
            the working directory.
        true_reward_function: A second such function that is logged and not trained on.
        unfinished_score: The score of an answer that reached `max_new_tokens` without a stop token; None uses the reward.
        advantages: "gae" for PPO, which has a critic; "group" for REINFORCE, which has none.

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
    reward_model: str = path_field("model", "")
    reward_function: str = ""
    true_reward_function: str = ""
    unfinished_score: float | None = None
    advantages: Literal["gae", "group"] = "gae"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rollout_size % self.num_generations:
            raise UserError(
                f"examples.rollout_size={self.rollout_size} must be a positive multiple of "
                f"examples.num_generations={self.num_generations}"
            )

    def steps(self, batch_size: int) -> int:
        """Return the training steps per rollout batch, for a batch size in answers.

        Raises:
            UserError: The answers do not fill these steps evenly.
        """
        steps, over = divmod(self.rollout_size * self.num_epochs, batch_size)
        if over or not steps:
            raise UserError(
                f"{self.rollout_size} answers for {self.num_epochs} epochs do not fill steps of batch.size={batch_size} evenly"
            )
        return steps

    def check_objective(self, objective: Objective) -> None:
        read = objective.inputs
        if self.advantages == "group" and "returns" in read:
            raise UserError(
                "examples.advantages=group compares answers with each other, and the critic of objective ppo would be trained for "
                "nothing: set examples.advantages=gae, or take objective=reinforce"
            )
        if self.advantages == "gae" and "advantage" in read and "returns" not in read:
            raise UserError(
                "examples.advantages=gae needs the estimates of a critic, which objective reinforce does not have: set "
                "examples.advantages=group, or take objective=ppo"
            )

    @property
    def functions(self) -> dict[str, str]:
        return {
            name: value
            for name, value in (
                ("reward_function", self.reward_function),
                ("true_reward_function", self.true_reward_function),
            )
            if value
        }

    def row_limits(self, text: int, source: int) -> dict[str, int]:
        return {"max_prompt_length": text - self.max_new_tokens}

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        start = data.frozen_start("the model that writes the first answers, which is also the reference")
        found, keys = self._prompts(data, start, data.config.paths(data.log))
        aside = held_out_keys(keys, 0.0 if data.config.validation_path else data.config.validation_fraction, len(found))
        prompts, held = ([p for p, out in zip(found, aside, strict=True) if out == side] for side in (False, True))
        if data.config.validation_path:
            held, _ = self._prompts(data, start, data.config.validation_path)
        if bool(self.reward_model) == bool(self.reward_function):
            raise UserError(
                "rollouts need one reward: set examples.reward_model=RUN or examples.reward_function=module:function"
            )
        learned = self._reward_model(data, prompts, start) if self.reward_model else None
        judge: RewardFunction = learned or FunctionReward(named_function(self.reward_function))
        source = RolloutSource(
            prompts, data.tokenizer, judge, start, config=self, steps=self.steps(data.batch_size), seed=data.seed,
            advantage_estimator=Baseline() if self.advantages == "group" else GAE(value_lam=1.0),
            true_reward_function=FunctionReward(named_function(self.true_reward_function)) if self.true_reward_function else None,
            critic=learned,
        )  # fmt: skip
        shown = [{"tokens": prompt} for prompt in (held or prompts)[: held_out_texts.COUNT]]
        return DatasetSplits(source, None, texts=HeldOutTexts(shown, bool(held), judge, self.max_new_tokens))

    def _prompts(self, data: BuildContext, start: LM, paths: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
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
        config: RolloutsConfig | None = None,
        steps: int = 8,
        advantage_estimator: AdvantageEstimator | None = None,
        true_reward_function: RewardFunction | None = None,
        stops: Sequence[int] | None = None,
        seed: int = 0,
        batch_size: int = 32,
        critic: RewardModel | None = None,
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
        self.reward_function, self.reference = reward_function, reference
        reference.restrict_vocab(tokenizer.vocab)
        self.config, self.steps, self.true_reward_function = config, steps, true_reward_function
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
        number = step // self.steps
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
            "kl_per_token_estimate": float(kl(torch.from_numpy(old[real]), torch.from_numpy(reference[real])).mean()),
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
