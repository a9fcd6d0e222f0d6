"""Best-of-n: sample answers, rank them by a reward and keep the best, the simplest way to use a reward.

The best of n answers has a KL divergence from the sampler of at most log n - (n - 1)/n nats, equal if no two answers tie (Stiennon
2020). From N samples of each prompt the expected reward of the best of n <= N is estimated without bias: the i-th smallest of N is the
largest of n drawn ones in C(i - 1, n - 1) of C(N, n) draws.

>>> best_of(np.array([[0.0, 1.0, 2.0]]), 1).tolist(), best_of(np.array([[0.0, 1.0, 2.0]]), 3).tolist()
([1.0], [2.0])
>>> round(kl_bound(4), 4)
0.6363
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, isfinite, log
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np
from annotated_types import Interval

from firth.align.rewards import FunctionReward, RewardError, RewardFunction, RewardModel, Rollout, named_function
from firth.corpora.readers import records
from firth.evaluate.prompting.requests import GenerateRequest, sample_seed
from firth.evaluate.task import EvaluatedModel, load_evaluated_model
from firth.fields import NonNegativeInt, PositiveFloat, ShareAboveZero, TokenCount
from firth.pipelines.stage import Asker, PromptRecord, Stage, Summary, Weights, read_prompts, write_records
from firth.tokenizer import chat
from firth.types import UserError


@dataclass(frozen=True)
class SampleAnswers(Stage):
    """Sample answers to prompts; writes {"prompt", "samples": [...]} with the other fields of each record.

    Args:
        model: A run, a model directory, an adapter, a GGUF file, or `openai:URL`.
        data: Files of records with a prompt of one user message.
        num_samples: Answers to each prompt.
        temperature: Temperature of sampling.
        top_p: Nucleus of sampling.
        max_new_tokens: Most tokens of an answer.
        chat: Whether prompts are messages of the model's chat template.
        limit: Most prompts; 0 for all.
        seed: Seed of sampling.
        weights: Data type of the weights, but not of an endpoint's; "" takes bf16 where it is faster.
    """

    main: ClassVar[str] = "model"
    output: ClassVar[str] = "answers.jsonl"

    model: str
    data: tuple[str, ...]
    num_samples: Annotated[int, Interval(ge=1, le=1000)] = 4
    temperature: PositiveFloat = 1.0
    top_p: ShareAboveZero = 1.0
    max_new_tokens: TokenCount = 64
    chat: bool = True
    limit: NonNegativeInt = 0
    seed: NonNegativeInt = 0
    weights: Weights = ""

    def run(self, directory: Path) -> Summary:
        prompts = read_prompts(self.data, self.limit)
        requests = [
            GenerateRequest(
                prompt.prompt,
                (),
                self.max_new_tokens,
                self.temperature,
                self.top_p,
                sample_seed(self.seed, prompt.prompt, number),
                self.chat,
            )
            for prompt in prompts
            for number in range(self.num_samples)
        ]
        locations = [prompt.location for prompt in prompts for _ in range(self.num_samples)]
        replies = Asker(self.model, self.weights).write(requests, locations)
        texts = np.array([reply.text.strip() for reply in replies], object).reshape(len(prompts), self.num_samples)
        write_records(
            directory / self.output,
            (
                {**prompt.fields, "prompt": prompt.prompt, "samples": samples}
                for prompt, samples in zip(prompts, texts.tolist(), strict=True)
            ),
        )
        return {
            "prompts": len(prompts),
            "answers": len(replies),
            "different": sum(len(set(row)) for row in texts.tolist()) / len(replies),
            "finished": sum(reply.finish == "stop" for reply in replies) / len(replies),
        }


def kl_bound(n: int) -> float:
    """Return the largest KL divergence of best-of-n from its sampler, in nats."""
    return log(n) - (n - 1) / n


def best_of(scores: np.ndarray, n: int, values: np.ndarray | None = None) -> np.ndarray:
    """Return the expected value of the best of n answers to each prompt, (P,).

    Args:
        scores: Rewards that choose, (P, N).
        n: At most N.
        values: What is averaged over the chosen answers, (P, N); the scores themselves by default.
    """
    total = scores.shape[1]
    weights = np.array([comb(i, n - 1) for i in range(total)], np.float64) / comb(total, n)
    order = scores.argsort(1, kind="stable")
    chosen: np.ndarray = np.take_along_axis(scores if values is None else values, order, 1) @ weights
    return chosen


@dataclass(frozen=True)
class RankAnswers(Stage):
    """Rank the answers of `sample` by a reward; writes {"prompt", "answers", "scores", "chosen", "rejected"}, the best first.

    The records serve as rankings, as preferences of the best over the worst answer, and for finetuning on the best
    (`examples.completion_template="{chosen}"`). Prompts whose answers all have the same reward are left out.

    Args:
        data: Files of {"prompt", "samples"}, with further fields that the reward function names.
        reward_function: `module:function`, as in `firth train grpo`; "" for none.
        reward_model: The run of a reward model; "" for none.
        true_reward_function: A further function whose mean is reported for the answers that the reward prefers; "" for none.
        limit: Most prompts; 0 for all.
    """

    main: ClassVar[str] = "data"
    output: ClassVar[str] = "ranked.jsonl"

    data: tuple[str, ...]
    reward_function: str = ""
    reward_model: str = ""
    true_reward_function: str = ""
    limit: NonNegativeInt = 0

    def check(self) -> None:
        if bool(self.reward_function) == bool(self.reward_model):
            raise UserError("set reward_function or reward_model, one of them")

    def run(self, directory: Path) -> Summary:
        prompts, samples = _read(self.data, self.limit)
        scores = (
            _model_scores(self.reward_model, prompts, samples)
            if self.reward_model
            else _function_scores(self.reward_function, prompts, samples)
        )
        order = (-scores).argsort(1, kind="stable")
        rows = []
        for i, prompt in enumerate(prompts):
            answers, rewards = [samples[i][k] for k in order[i]], [float(scores[i, k]) for k in order[i]]
            if rewards[0] > rewards[-1]:
                rows.append(
                    {"prompt": prompt.prompt, "answers": answers, "scores": rewards, "chosen": answers[0], "rejected": answers[-1]}
                )  # fmt: skip
        write_records(directory / self.output, rows)
        total = scores.shape[1]
        summary: dict[str, float | str] = {"prompts": len(prompts), "answers of a prompt": total, "ranked": len(rows)}
        true = _function_scores(self.true_reward_function, prompts, samples) if self.true_reward_function else None
        for n in sorted({*(2**k for k in range(total.bit_length())), total}):
            if n <= total:
                summary[f"reward of the best of {n}"] = float(best_of(scores, n).mean())
                if true is not None:
                    summary[f"truth of the best of {n}"] = float(best_of(scores, n, true).mean())
                summary[f"KL of the best of {n}, at most"] = kl_bound(n)
        return summary


def _read(paths: Sequence[str], limit: int) -> tuple[list[PromptRecord], list[list[str]]]:
    """Return the prompts and the answers to each."""
    prompts: list[PromptRecord] = []
    samples: list[list[str]] = []
    for location, record in records(paths):
        found = record.get("samples")
        if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
            raise UserError(f"{location}: there is no list of answers: samples is what `firth pipeline sample` writes")
        if samples and len(found) != len(samples[0]):
            raise UserError(f"{location}: {len(found)} answers, and the first record has {len(samples[0])}")
        prompts.append(PromptRecord(location, str(record.get("prompt", "")), record))
        samples.append(found)
        if limit and len(prompts) == limit:
            break
    if not prompts:
        raise UserError(f"{', '.join(paths)}: there is no record")
    return prompts, samples


def _function_scores(name: str, prompts: Sequence[PromptRecord], samples: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the reward of each answer by a function, (P, N)."""
    none = np.zeros(0, np.int32)
    rollouts = [
        Rollout(none, none, text, True, {**prompt.fields, "prompt": prompt.prompt})
        for prompt, row in zip(prompts, samples, strict=True)
        for text in row
    ]
    return _scores(FunctionReward(named_function(name)), rollouts, prompts)


def load_reward_model(name: str) -> EvaluatedModel:
    """Return a reward model and its tokenizer; UserError if the model has no reward head."""
    loaded = load_evaluated_model(Path(name))
    if "reward" not in loaded.model.heads:
        raise UserError(f"{name}: this model has no reward head: name the run of a reward model")
    return loaded


def _model_scores(name: str, prompts: Sequence[PromptRecord], samples: Sequence[Sequence[str]]) -> np.ndarray:
    """Return the reward of each answer by a reward model, (P, N)."""
    loaded = load_reward_model(name)
    rollouts = []
    for prompt, row in zip(prompts, samples, strict=True):
        for text in row:
            messages = [{"role": "user", "content": prompt.prompt}, {"role": "assistant", "content": text}]
            tokens, mask = chat.encode(loaded.tokenizer, messages)
            answer = np.flatnonzero(mask)
            if len(tokens) > loaded.model.context:
                raise UserError(
                    f"{prompt.location}: prompt and answer have {len(tokens):,} tokens, and the reward model reads "
                    f"{loaded.model.context:,}: leave the record out"
                )
            rollouts.append(Rollout(tokens[: answer[0]], tokens[answer[0] : answer[-1] + 1], text, True))
    return _scores(RewardModel(loaded.model), rollouts, prompts)


def _scores(reward: RewardFunction, rollouts: Sequence[Rollout], prompts: Sequence[PromptRecord]) -> np.ndarray:
    """Return the rewards of all answers, (P, N), which must be finite."""
    try:
        scores = np.asarray(reward(rollouts), np.float64)
        for score, rollout in zip(scores.tolist(), rollouts, strict=True):
            if not isfinite(score):
                raise RewardError(rollout, f"returned {score}")
    except RewardError as error:
        number = next(i for i, rollout in enumerate(rollouts) if rollout is error.sample)
        raise UserError(f"{prompts[number * len(prompts) // len(rollouts)].location}: {error}") from error
    return scores.reshape(len(prompts), -1)
