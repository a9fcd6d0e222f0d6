"""Held-out prompts of a run: answers that are scored during training, and texts for its report.

A run that trains on answers to prompts (instruction tuning, text to text, reward models, DPO, REINFORCE, PPO) writes
`held_out_texts.jsonl`, one row for each of eight prompts and each step, before and after training:

    {"step": 0, "prompt": "Who paints the boat?", "held_out": true, "score": "reward",
     "answers": [{"name": "model", "text": "The otter.", "score": 0.7}]}

`score` names what the numbers are: a reward, or nats of log-probability above the reference model. Answers that the
records contain (reference, preferred, rejected) are also in `answers`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import torch

from firth.align.answers import per_token_numbers, sample_shared, score_shared
from firth.align.rewards import (
    RewardFunction,
    RewardModel,
    Rollout,
    WeightedRewards,
    replace_unfinished,
    score_rollouts,
)
from firth.data.collate import collate
from firth.data.dialogues import Prompt
from firth.data.examples import DatasetSplits
from firth.data.source import Source
from firth.generate.decoding_batch import inference_mode
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.model.model import LM
from firth.objectives.preferences import build_comparison, ref_logprobs
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import Example, RankGroup


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


FILE = "held_out_texts.jsonl"
COUNT = 8
"""Number of prompts."""

MAX_NEW_TOKENS = 64

Rows = list[dict[str, Any]]


@dataclass(frozen=True, eq=False)
class HeldOutTexts:
    """Prompts and given answers whose texts and scores are recorded before and after training.

    Args:
        examples: One example for each prompt, with the fields `tokens` and `mask`; `source` and `target`; `chosen_*` and
            `rejected_*`, for DPO also `reference`; or only `tokens`, a prompt without an answer, and `fields`, those of its record.
        held_out: Whether the prompts are not trained on.
        judge: Scores the sampled answers; None for no scores.
        max_new: The most tokens of an answer.
    """

    examples: Sequence[Example]
    held_out: bool
    judge: RewardFunction | None = None
    max_new: int = MAX_NEW_TOKENS

    def rows(self, model: LM, tokenizer: Tokenizer, step: int, seed: int) -> Rows:
        """Return one row for each prompt: the model's answer, the given answers, and their scores.

        Args:
            model: The model at this step.
            step: Optimizer steps taken so far.
            seed: Seed of the sampled answers; the same seed before and after training.
        """
        shown = [example for example in self.examples if 0 < len(_prompt(example)) < model.context]
        answers = [self._given(model, tokenizer, example) for example in shown]
        score = "reward" if self.judge or "reward" in model.heads else "nats above the reference"
        if model.has_lm_head and "reward" not in model.heads:
            sampling = Sampling(max_new_tokens=self.max_new, temperature=0.8, seed=seed)
            prompts = [_prompt(example) for example in shown]
            written = Engine(model, tokenizer).generate(prompts, sampling) if prompts else []
            samples = [Rollout.of(p, w, e.get("fields")) for p, w, e in zip(prompts, written, shown, strict=True)]
            scores = (
                score_rollouts(self.judge, samples, tokenizer).tolist()
                if self.judge and samples
                else [None] * len(samples)
            )
            for own, sample, value in zip(answers, samples, scores, strict=True):
                own.insert(0, {"name": "model", "text": sample.text, "score": value})
        return [
            {
                "step": step,
                "prompt": tokenizer.decode(_prompt(example)),
                "held_out": self.held_out,
                "score": score,
                "answers": own,
            }
            for example, own in zip(shown, answers, strict=True)
        ]

    def _given(self, model: LM, tokenizer: Tokenizer, example: Example) -> Rows:
        """Return the answers of the record, with the scores that this model gives to them."""
        if "target" in example:
            return [{"name": "reference", "text": tokenizer.decode(example["target"]), "score": None}]
        if "chosen_tokens" not in example:
            answer = _answer(example["tokens"], example["mask"]) if "mask" in example else np.zeros(0, np.int32)
            text = {"name": "reference", "text": tokenizer.decode(answer), "score": None}
            return [text] if len(answer) else []
        samples, sides = [], ("chosen", "rejected")
        for side in sides:
            tokens, mask = example[f"{side}_tokens"], example[f"{side}_mask"]
            start, end = _first(mask), int(np.flatnonzero(mask)[-1]) + 1
            samples.append(Rollout(tokens[:start], tokens[start:end], tokenizer.decode(tokens[start:end]), True))
        scores: list[float | None] = [None, None]
        if "reward" in model.heads:
            scores = RewardModel(model)(samples).tolist()
        elif "reference" in example:
            device = model.tokens.weight.device
            batch = {name: field.to(device) for name, field in collate([build_comparison(example)]).items()}
            with inference_mode(model):
                now = ref_logprobs(model, batch)["reference"][0].cpu()
            scores = (now - torch.from_numpy(np.array(example["reference"]))).tolist()
        names = ("preferred", "rejected")
        return [{"name": n, "text": s.text, "score": v} for n, s, v in zip(names, samples, scores, strict=True)]


@dataclass(frozen=True)
class PromptSplits(DatasetSplits):
    """The data of a run that trains on its own answers: held-out prompts in place of a validation source.

    Args:
        texts: The prompts of the report.
        prompts: Held-out prompts that are answered during training; None if there are none.
    """

    texts: HeldOutTexts | None = None
    prompts: HeldOutPrompts | None = None


def choose(train: Source, valid: Source | None, fields: frozenset[str]) -> HeldOutTexts | None:
    """Return texts of held-out examples, evenly spaced, or of training examples where none are held out.

    Args:
        train: The training source.
        valid: The held-out source; None where nothing is held out.
        fields: The fields of the examples.

    Returns:
        None if the examples are not prompts with answers.
    """
    if not any(needed <= fields for needed in ({"tokens", "mask"}, {"source", "target"}, {"chosen_tokens"})):
        return None
    source = valid if valid is not None and len(valid) else train
    at = np.unique(np.linspace(0, len(source) - 1, COUNT).round().astype(int)).tolist()
    return HeldOutTexts([source[i] for i in at], source is valid)


def _prompt(example: Example) -> np.ndarray:
    """Return the tokens that an answer follows: (n,)."""
    if "source" in example:
        return np.asarray(example["source"])
    side = "chosen_" if "chosen_tokens" in example else ""
    tokens = example[f"{side}tokens"]
    return np.asarray(tokens[: _first(example[f"{side}mask"])] if f"{side}mask" in example else tokens)


def _first(mask: np.ndarray) -> int:
    """Return the index of the first answer token."""
    return int(np.flatnonzero(mask)[0])


def _answer(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the first answer of a dialogue: (n,)."""
    start = _first(mask)
    run = mask[start:]
    end = start + (int(np.flatnonzero(~run)[0]) if not run.all() else len(run))
    return np.asarray(tokens[start:end])
