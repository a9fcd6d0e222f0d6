"""An on-policy source: examples which the model being trained has written itself.

Training asks a source for the examples of a step; this one first asks the model for its text. Every `phase.steps`
steps it draws a new phase of answers from the model as it is then, has a judge score them, and writes down all that
policy gradients need, per token: the log-probability under the policy that drew it (`old`) and under the frozen
starting point (`reference`), value estimates, and from the penalised rewards

    r_t = -beta (log p(token_t) - log p_ref(token_t)),   and at the last token + the judge's score

advantages and returns (`firth.align.advantages`). Then it is a source like any other, read for one or more epochs by
`PPO` or `Reinforce` through the one training loop. Old log-probabilities are computed by the pass that training makes,
not taken from the sampler, so that the first ratios are 1 up to rounding. A phase is part of the checkpoint (`state`):
a run killed in its middle goes on with the very same answers.

    rollouts = Rollouts(prompts, tokenizer, judge, reference=copy.deepcopy(policy), phase=Phase(answers=64, steps=8))
    train(policy, PPO(), Batches(rollouts, PPO(), vocab, rows=32, seed=0), directory, ...)     # 64 x 4 epochs = 8 x 32

With several ranks each draws the whole phase from the same seeds and reads its own share.
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
from firth.generate.decoding import attention_pattern_of, rectangle
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.generate.streaming import IncrementalDecoder
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.ppo import PER_TOKEN, critic_states, has_critic, init_critic, kl, values
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import Example, UserError

STATISTICS = (
    "reward", "truth", "kl_per_answer", "explained_variance", "finished", "length", "reward_deviation", "penalised",
    "kl_per_token", "kl_per_token_estimate", "entropy",
)  # fmt: skip
CHUNK = 512
"""Positions whose full distributions are held at once."""


@dataclass(frozen=True)
class RolloutConfig:
    """How much is drawn, and how often.

    answers: sampled per phase. group: answers per prompt. steps: training steps on each phase; with `rows` examples a
    step and E epochs that is answers * E / rows. max_new: most tokens of an answer. beta: what a nat of divergence from
    the reference costs. unfinished: the judge's score for an answer without a stop token; None leaves it to the judge.
    """

    rollout_size: int = 64
    num_generations: int = 1
    steps: int = 8
    max_new_tokens: int = 48
    kl_coef: float = 0.05
    unfinished_score: float | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new is {self.max_new_tokens}: an answer has at least 1 token")
        if (
            self.rollout_size < 1
            or self.num_generations < 1
            or self.steps < 1
            or self.rollout_size % self.num_generations
        ):
            raise UserError(
                f"{self.rollout_size} answers a phase cannot be shared out in groups of {self.num_generations}"
            )


def explained_variance(followed: np.ndarray, values: np.ndarray) -> float:
    """The share of the variance of `followed` that estimates of it take away: 1 at best, 0 for a constant, below it worse.

    >>> explained_variance(np.array([0.0, 2.0]), np.array([5.0, 7.0])), explained_variance(np.ones(2), np.zeros(2))
    (1.0, 0.0)
    """
    spread = float(followed.var())
    return 1 - float((followed - values).var()) / spread if spread else 0.0


class RolloutSource(Source):
    """The newest phase of answers. len() = phase.answers.

    prompts: token ids (n,) each, taken in a permuted order that goes on from phase to phase. judge: scores answers.
    reference: the frozen model; it is never part of the trained one. truth: a second judge which is measured but not
    learnt from. phase, credit: how much is drawn, and how scores become advantages; `Phase()` and `GAE()` unless given. stops:
    the tokens that end an answer, the tokenizer's own unless given. seed: of the order of prompts and of every draw. rows: how
    many are read at once. critic: the reward model that PPO's critic starts from before the first phase; where there is
    none, or one of another shape, it starts from the reference. Training calls `prepare` in the precision of its steps, so
    that old log-probabilities are those of training.
    """

    def __init__(
        self,
        prompts: Sequence[np.ndarray],
        tokenizer: Tokenizer,
        judge: RewardFunction,
        reference: LM,
        *,
        phase: RolloutConfig | None = None,
        credit: AdvantageEstimator | None = None,
        truth: RewardFunction | None = None,
        stops: Sequence[int] | None = None,
        seed: int = 0,
        rows: int = 32,
        critic: RewardModel | None = None,
    ) -> None:
        if not prompts:
            raise UserError("there are no prompts to answer")
        phase = phase or RolloutConfig()
        longest, room = max(map(len, prompts)), reference.context - phase.max_new_tokens
        if longest > room:
            raise UserError(
                f"a prompt of {longest} tokens and an answer of {phase.max_new_tokens} do not fit the {reference.context} positions of "
                f"the model: leave out prompts of more than {max(room, 0)} tokens, or lower max_new"
            )
        self.prompts, self.tokenizer, self.judge, self.reference = prompts, tokenizer, judge, reference
        reference.restrict_vocab(tokenizer.vocab)
        self.phase, self.credit, self.truth = phase, credit or GAE(), truth
        self.stops, self.seed, self.rows, self.critic = stops, seed, rows, critic
        self.number = -1
        self.history: list[dict[str, float]] = []
        self.samples: list[Rollout] = []
        self._lengths = np.zeros((0, 2), np.int64)
        self._tokens = np.zeros(0, np.int32)
        self._told = np.zeros((len(PER_TOKEN), 0), np.float32)

    def __len__(self) -> int:
        return self.phase.rollout_size

    def __getitem__(self, index: int) -> Example:
        if self.number < 0:
            raise UserError("no answers have been drawn yet: call prepare(model, step) first")
        ends = self._lengths.sum(1).cumsum()
        there = slice(ends[index] - self._lengths[index].sum(), ends[index])
        tokens = self._tokens[there]
        told = dict(zip(PER_TOKEN, self._told[:, there], strict=True))
        return {"tokens": tokens, "mask": np.arange(len(tokens)) >= self._lengths[index, 0]} | told

    def prepare(self, model: LM, step: int) -> Mapping[str, float]:
        """Draw the phase that this step belongs to, unless it is there.

        Returns the fresh phase in numbers: means over its answers or its tokens. kl_per_answer: nats. explained_variance:
        of the sums of rewards that followed each token, how much the critic foresaw, which has seen none of them.
        """
        number = step // self.phase.steps
        if number == self.number:
            return {}
        if self.number < 0:
            c = self.critic
            if c is None or not init_critic(model, c.model, c.mean, c.scale):
                init_critic(model, self.reference)
        self._draw(model, number)
        return dict(self.history[-1])

    def _draw(self, model: LM, number: int) -> None:
        """Phase `number` takes the place of the present one, which stays where the judge fails."""
        prompts = self._asked(number)
        seed = int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])
        engine = Engine(model, self.tokenizer, self.stops, batch_size=self.rows)
        written = engine.generate(prompts, Sampling(max_new_tokens=self.phase.max_new_tokens, seed=seed))
        samples = [Rollout.of(p, w) for p, w in zip(prompts, written, strict=True)]
        score = score_rollouts(self.judge, samples, self.tokenizer)
        truth = score_rollouts(self.truth, samples, self.tokenizer).mean() if self.truth else nan
        self.number, self.samples = number, samples
        finished = np.array([s.finished for s in self.samples])
        if self.phase.unfinished_score is not None:
            score = np.where(finished, score, self.phase.unfinished_score)
        now = self._read(model)
        real, old, reference = now["real"], now["old"], now["reference"]
        rewards = np.where(real, -self.phase.kl_coef * (old - reference), 0.0)
        rewards[np.arange(len(real)), real.sum(1) - 1] += score
        advantage, returns = self.credit(rewards, now["values"], real, self.phase.num_generations)
        self._store(real, now | {"advantage": advantage, "returns": returns})
        followed = discounted_returns(rewards)[real]
        found = {
            "reward": float(score.mean()),
            "truth": float(truth),
            "kl_per_answer": float(now["kl"].sum(1).mean()),
            "explained_variance": explained_variance(followed, now["values"][real]) if has_critic(model) else nan,
            "finished": float(finished.mean()),
            "length": float(real.sum(1).mean()),
            "reward_deviation": float(score.std()),
            "penalised": float(rewards.sum(1).mean()),
            "kl_per_token": float(now["kl"][real].mean()),
            "kl_per_token_estimate": float(kl(torch.from_numpy(old[real]), torch.from_numpy(reference[real])).mean()),
            "entropy": float(now["entropy"][real].mean()),
        }
        self.history.append(found | {"phase": float(self.number)})

    def _asked(self, number: int) -> list[np.ndarray]:
        """The prompts of a phase, each `group` times."""
        count = self.phase.rollout_size // self.phase.num_generations
        _, index = epoch_permutation(len(self.prompts), self.seed, np.arange(count) + count * number)
        return [self.prompts[i] for i in index.tolist() for _ in range(self.phase.num_generations)]

    def _read(self, model: LM) -> dict[str, np.ndarray]:
        """What policy and reference say of each sampled token: (N, T) float64 each, and `real`."""
        longest = max(len(s.answer) for s in self.samples)
        real = np.stack([np.arange(longest) < len(s.answer) for s in self.samples])
        out = {name: np.zeros(real.shape) for name in ("old", "reference", "values", "kl", "entropy")}
        for first in range(0, len(self.samples), self.rows):
            some = self.samples[first : first + self.rows]
            there = real[first : first + self.rows]
            for name, told in self._told_by(model, some).items():
                out[name][first : first + self.rows][there] = told.double().cpu().numpy()
        return out | {"real": real}

    def _told_by(self, model: LM, samples: Sequence[Rollout]) -> dict[str, Tensor]:
        """One number per sampled token of these answers, in row order: (tokens,) each."""
        device = model.tokens.weight.device
        batch = rectangle([s.tokens[:-1] for s in samples], device)
        asked = rectangle([s.mask[1:] for s in samples], device)["tokens"].bool()
        labels = torch.from_numpy(np.concatenate([s.answer for s in samples]).astype(np.int64)).to(device)
        with attention_pattern_of(model), attention_pattern_of(self.reference):
            hidden, frozen = model(batch), self.reference(batch)[asked]
            states = hidden[asked]
            ours: LMHead = model.heads["lm"]  # type: ignore[assignment]
            theirs: LMHead = self.reference.heads["lm"]  # type: ignore[assignment]
            told: dict[str, list[Tensor]] = {"old": [], "reference": [], "kl": [], "entropy": []}
            for at in range(0, len(labels), CHUNK):
                here = slice(at, at + CHUNK)
                p = ours(states[here]).float().log_softmax(-1)  # (chunk, V)
                q = theirs(frozen[here]).float().log_softmax(-1)
                pick = labels[here, None]
                told["old"].append(p.gather(-1, pick)[:, 0])
                told["reference"].append(q.gather(-1, pick)[:, 0])
                # Over the whole vocabulary, not the sampled token alone: exact at each state, and never negative.
                told["kl"].append((p.exp() * (p - q)).sum(-1).clamp(min=0))
                told["entropy"].append(-(p.exp() * p).sum(-1))
            out = {name: torch.cat(pieces) for name, pieces in told.items()}
            if has_critic(model):
                out["values"] = values(model, critic_states(model, hidden, batch)[asked])
        return out

    def _store(self, real: np.ndarray, numbers: Mapping[str, np.ndarray]) -> None:
        """Keep the phase as flat arrays: tokens of all answers in a row, and PER_TOKEN beside them, 0 on prompts."""
        self._lengths = np.array([(len(s.prompt), len(s.answer)) for s in self.samples])
        self._tokens = np.concatenate([s.tokens for s in self.samples])
        on = np.concatenate([s.mask for s in self.samples])
        self._told = np.zeros((len(PER_TOKEN), len(on)), np.float32)
        for row, name in zip(self._told, PER_TOKEN, strict=True):
            row[on] = numbers[name][real]

    def state(self) -> dict[str, np.ndarray]:
        """The phase as it is, and the history: all that a run in its middle cannot compute again."""
        history = np.array([[row[name] for name in (*STATISTICS, "phase")] for row in self.history], np.float64)
        return {
            "number": np.array([self.number]),
            "lengths": self._lengths,
            "tokens": self._tokens,
            "told": self._told,
            "finished": np.array([s.finished for s in self.samples], bool),
            "history": history.reshape(-1, 1 + len(STATISTICS)),
        }

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.number = int(state["number"][0])
        self._lengths, self._tokens = np.array(state["lengths"]), np.array(state["tokens"])
        self._told = np.array(state["told"])
        self.history = [dict(zip((*STATISTICS, "phase"), map(float, row), strict=True)) for row in state["history"]]
        self.samples = []
        ends = self._lengths.sum(1).cumsum()
        for (asked, answered), end, finished in zip(self._lengths, ends, state["finished"], strict=True):
            prompt, answer = np.split(self._tokens[end - asked - answered : end], [asked])
            self.samples.append(
                Rollout(
                    prompt, answer, IncrementalDecoder(self.tokenizer, prompt).text(answer.tolist()), bool(finished)
                )
            )
