"""Rewards of sampled answers (functions and reward models), and preference pairs sampled from them.

A `RewardFunction` gives one number to each sampled answer. `FunctionReward` computes it with a given function of the answer, the
prompt and the fields of its record (a verifiable reward compares with a given result); `RewardModel` is trained on preferences
(`firth.objectives.reward_model`); `WeightedRewards` is a sum of several. `sample_preference` compares answers by their rewards,
with a given amount of noise.

    truth = FunctionReward(lambda text: float(text.endswith(".")))
    pairs = sample_preference(first, second, truth, tokenizer=tokenizer, noise=1.0, rng=rng)      # Bradley-Terry
    source = PreferencePairs(pairs)          # {"chosen_tokens", "chosen_mask", "rejected_tokens", "rejected_mask"}
"""

from __future__ import annotations

import inspect
import json
import math
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from firth.data.dialogues import PREFERENCE_FIELDS
from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig, split_records
from firth.data.source import Source
from firth.data.split import content_key
from firth.generate.decoding_batch import inference_mode, rectangle
from firth.generate.output import Completion
from firth.io import user_code
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.objectives.reward_model import rewards
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import Example, UserError

Scorer = Callable[..., float]
"""A pure function of an answer, and of what its parameters name (`FunctionReward`)."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """A sampled answer.

    Args:
        prompt: Token ids of the prompt, (m,).
        answer: Token ids of the answer, (n,), including the stop token if `finished`.
        text: Text of the answer.
        finished: Whether the answer ended with a stop token.
        fields: The fields of the prompt's record, for reward functions (`firth.data.dialogues.Prompt`).
    """

    prompt: np.ndarray
    answer: np.ndarray
    text: str
    finished: bool
    fields: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(prompt: np.ndarray, completion: Completion, fields: Mapping[str, Any] | None = None) -> Rollout:
        """Build a rollout from a prompt and the engine's completion of it."""
        prompt, finished = np.asarray(prompt, np.int32), completion.finish == "stop"
        return Rollout(prompt, completion.tokens, completion.text, finished, fields or {})

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and answer in one row: (m + n,) int32."""
        return np.concatenate((self.prompt, self.answer)).astype(np.int32)

    @property
    def mask(self) -> np.ndarray:
        """True on the answer: (m + n,)."""
        return np.arange(len(self.prompt) + len(self.answer)) >= len(self.prompt)


class RewardError(UserError):
    """A reward function raised an error, or returned a number that is not finite, for one sample."""

    def __init__(self, sample: Rollout, problem: str) -> None:
        super().__init__(f"the reward {problem} for the answer {_quoted(sample.text)}; correct the reward function")
        self.sample, self.problem = sample, problem


MAX_QUOTED_CHARACTERS = 200
"""Maximum number of characters of a prompt or an answer in an error message."""


def _quoted(text: str) -> str:
    return repr(text if len(text) <= MAX_QUOTED_CHARACTERS else text[:MAX_QUOTED_CHARACTERS] + "...")


class RewardFunction(Protocol):
    """Scores answers."""

    def __call__(self, samples: Sequence[Rollout]) -> np.ndarray:
        """Return one number per sample, (N,) float32. Raises RewardError for a sample that it cannot score."""


def score_rollouts(reward_function: RewardFunction, samples: Sequence[Rollout], tokenizer: Tokenizer) -> np.ndarray:
    """Return the rewards of some answers: (N,) float64.

    Raises:
        UserError: The reward function raised RewardError, or a reward is not finite; the error names the prompt and the answer.
    """
    try:
        scores = np.asarray(reward_function(samples), np.float64)
        for score, sample in zip(scores.tolist(), samples, strict=True):
            if not math.isfinite(score):
                raise RewardError(sample, f"returned {score}")
    except RewardError as error:
        prompt = tokenizer.decode(error.sample.prompt.tolist())
        raise UserError(
            f"the reward {error.problem} for the prompt {_quoted(prompt)} and the answer {_quoted(error.sample.text)}; correct "
            "the reward function and run the same command again"
        ) from error
    return scores


def replace_unfinished(scores: np.ndarray, samples: Sequence[Rollout], unfinished_score: float | None) -> np.ndarray:
    """Return the scores (N,) with that of each answer without a stop token replaced; None replaces nothing."""
    if unfinished_score is None:
        return scores
    return np.where([sample.finished for sample in samples], scores, unfinished_score)


@dataclass(frozen=True)
class FunctionReward:
    """A reward that is computed by a function.

    A function with one parameter is called with the text of the answer. Any other is called with what its parameters name:
    `completion` is the text of the answer, `prompt` that of the prompt, every other name a field of the prompt's record, and
    `**fields` all that are left.

    >>> def correct(completion, result): return float(completion.strip() == result)
    >>> question = np.array([1])
    >>> FunctionReward(correct)([Rollout(question, question, " 7", True, {"prompt": "3 + 4", "result": "7"})]).tolist()
    [1.0]
    """

    scorer: Scorer

    def __call__(self, samples: Sequence[Rollout]) -> np.ndarray:
        return np.array([self._score(sample) for sample in samples], np.float32)

    @cached_property
    def names(self) -> tuple[str, ...] | None:
        """What the function must be called with by name; None for a function of the answer's text alone."""
        parameters = self._parameters
        if len(parameters) == 1 and not self._takes_fields:
            return None
        return tuple(p.name for p in parameters if p.default is p.empty)

    @cached_property
    def _all_parameters(self) -> tuple[inspect.Parameter, ...]:
        try:
            return tuple(inspect.signature(self.scorer).parameters.values())
        except ValueError:  # some built-in functions have no signature
            return (inspect.Parameter("completion", inspect.Parameter.POSITIONAL_ONLY),)

    @property
    def _parameters(self) -> list[inspect.Parameter]:
        variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        return [p for p in self._all_parameters if p.kind not in variable]

    @property
    def _takes_fields(self) -> bool:
        return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in self._all_parameters)

    def missing(self, fields: Mapping[str, Any]) -> list[str]:
        """Return the names of the parameters that are not among the fields of a record."""
        return [name for name in self.names or () if name != "completion" and name not in fields]

    def _score(self, sample: Rollout) -> float:
        missing = self.missing(sample.fields)
        if missing:
            raise RewardError(sample, f"needs the field {missing[0]!r}, which the record lacks,")
        try:
            if self.names is None:
                return float(self.scorer(sample.text))
            given = {**sample.fields, "completion": sample.text}
            known = {p.name for p in self._parameters}
            return float(self.scorer(**{n: x for n, x in given.items() if self._takes_fields or n in known}))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}:{at.lineno}"
            raise RewardError(sample, f"raised {type(error).__name__} ({error}) at {where}") from error


def no_reward(samples: Sequence[Rollout]) -> np.ndarray:
    """Return 0 for every sample, (N,) float32."""
    return np.zeros(len(samples), np.float32)


def rehearsed(reward: RewardFunction) -> RewardFunction:
    """Return a reward that a dry run may call: a model, or 0 in place of a user's function."""
    return no_reward if isinstance(reward, FunctionReward) else reward


@dataclass(frozen=True, eq=False)
class WeightedRewards:
    """A sum of rewards.

    Args:
        parts: Name -> reward.
        weights: The weight of each.
    """

    parts: Mapping[str, RewardFunction]
    weights: Sequence[float]

    @staticmethod
    def of(reward: RewardFunction | WeightedRewards) -> WeightedRewards:
        """Return a reward as a sum of one."""
        return reward if isinstance(reward, WeightedRewards) else WeightedRewards({"reward": reward}, (1.0,))

    def without_functions(self) -> WeightedRewards:
        """Return the same with 0 in place of functions, which may cost money or write files: for a dry run."""
        return replace(self, parts={name: rehearsed(part) for name, part in self.parts.items()})

    def scores(self, samples: Sequence[Rollout], tokenizer: Tokenizer) -> dict[str, np.ndarray]:
        """Return the rewards of some answers by name, unweighted: (N,) each. Raises the errors of `score_rollouts`."""
        return {name: score_rollouts(part, samples, tokenizer) for name, part in self.parts.items()}

    def total(self, scores: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the weighted sum of `scores`: (N,)."""
        return np.sum([w * scores[name] for name, w in zip(self.parts, self.weights, strict=True)], 0)

    def __call__(self, samples: Sequence[Rollout]) -> np.ndarray:
        return self.total({name: part(samples) for name, part in self.parts.items()})


def named_function(name: str) -> Scorer:
    """Return the reward function that `module:function` names.

    Raises:
        UserError: There is no such module or function, or the module fails when it is imported.
    """
    found: Scorer = user_code.find(name, "function")
    if not callable(found):
        raise UserError(f"{name!r} is of type {type(found).__name__}: name a function of the answer")
    return found


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A reward model trained on preferences: (score - mean) / scale.

    Preferences determine only differences of scores. `normalized` sets zero and unit by reference answers, so that a KL penalty has
    the same weight with any reward model.

    Args:
        model: The model, with a reward head.
        batch_size: Answers per forward pass.
        mean: Score that maps to 0.
        scale: Difference of scores that maps to 1.
    """

    model: LM
    batch_size: int = 32
    mean: float = 0.0
    scale: float = 1.0

    def __call__(self, samples: Sequence[Rollout]) -> np.ndarray:
        scores = np.zeros(len(samples), np.float32)
        order = sorted(range(len(samples)), key=lambda i: -len(samples[i].tokens))
        device = self.model.tokens.weight.device
        with inference_mode(self.model):
            for first in range(0, len(order), self.batch_size):
                index = order[first : first + self.batch_size]
                batch = rectangle([samples[i].tokens for i in index], device)
                scores[index] = rewards(self.model, self.model(batch), batch).cpu().numpy()
        return (scores - np.float32(self.mean)) / np.float32(self.scale)

    def normalized(self, samples: Sequence[Rollout]) -> RewardModel:
        """Return the reward model scaled to mean 0 and standard deviation 1 on some answers."""
        scores = self(samples) * self.scale + self.mean
        return replace(self, mean=float(scores.mean()), scale=float(scores.std()) or 1.0)


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """Two answers to one prompt, one of them preferred.

    Args:
        chosen: The preferred answer.
        rejected: The other answer.
        margin: Reward of `chosen` minus that of `rejected`; negative where noise has reversed the preference.
    """

    chosen: Rollout
    rejected: Rollout
    margin: float


def sample_preference(
    first: Sequence[Rollout],
    second: Sequence[Rollout],
    reward_function: RewardFunction,
    *,
    tokenizer: Tokenizer,
    noise: float = 0.0,
    rng: np.random.Generator,
) -> list[PreferencePair]:
    """Sample preferences between pairs of answers. Equal answers are left out.

    Args:
        first: Answers, N.
        second: Answers to the same prompts, N.
        reward_function: Scores the answers.
        tokenizer: Decodes them for error messages.
        noise: 0 prefers the higher reward, and leaves ties out; above 0, the first answer is preferred with probability
            sigma((reward_1 - reward_2) / noise) (Bradley & Terry 1952).
        rng: Random generator.

    Raises:
        UserError: An answer cannot be scored, or two answers have different prompts.
    """
    drawn = rng.random(len(first))
    kept = []
    scores = zip(*(score_rollouts(reward_function, side, tokenizer) for side in (first, second)), strict=True)
    for a, b, (x, y), u in zip(first, second, scores, drawn, strict=True):
        if not np.array_equal(a.prompt, b.prompt):
            raise UserError("the two answers of a preference must have the same prompt")
        margin = float(x) - float(y)
        if np.array_equal(a.answer, b.answer) or (noise == 0 and margin == 0):
            continue
        wins = margin > 0 if noise == 0 else bool(u < 1 / (1 + np.exp(-margin / noise)))
        kept.append(PreferencePair(a, b, margin) if wins else PreferencePair(b, a, -margin))
    return kept


class PreferencePairs(Source):
    """Preference pairs as examples for reward models and DPO: chosen and rejected rows of tokens with their masks."""

    def __init__(self, pairs: Sequence[PreferencePair]) -> None:
        self.pairs = list(pairs)

    @property
    def group_ids(self) -> np.ndarray:
        keys = [content_key(" ".join(map(str, one.chosen.prompt.tolist()))) for one in self.pairs]
        return np.array(keys, np.uint64)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        sides = {"chosen": self.pairs[index].chosen, "rejected": self.pairs[index].rejected}
        tokens = {f"{side}_tokens": sample.tokens for side, sample in sides.items()}
        masks = {f"{side}_mask": sample.mask for side, sample in sides.items()}
        return tokens | masks | {"margin": np.array([self.pairs[index].margin], np.float32)}


def write_preference_pairs(pairs: Iterable[PreferencePair], path: Path, request: Callable[[np.ndarray], str]) -> None:
    """Write preference pairs in the common format for preferences, one JSON record per line.

    {"prompt": "Who paints?", "chosen": "The otter.", "rejected": "Who?", "margin": 0.7, "tokens": {"prompt": [...], "chosen":
    [...], "rejected": [...]}, "finished": {"chosen": true, "rejected": false}}

    The recipes `reward_model` and `dpo` encode the three texts again, with the stop token after both answers. With
    examples=sampled_preferences they read the tokens (`read_preference_pairs`), which are exactly those that were sampled.

    Args:
        pairs: The pairs.
        path: The JSONL file to write.
        request: Decodes a prompt (n,) to the user's text, without the chat template.
    """
    with path.open("w", encoding="utf-8") as file:
        for one in pairs:
            sides = {"chosen": one.chosen, "rejected": one.rejected}
            record: dict[str, Any] = {"prompt": request(one.chosen.prompt)} | {
                side: sample.text for side, sample in sides.items()
            }
            tokens = {"prompt": one.chosen.prompt} | {side: sample.answer for side, sample in sides.items()}
            record |= {
                "margin": one.margin,
                "tokens": {name: ids.tolist() for name, ids in tokens.items()},
                "finished": {side: sample.finished for side, sample in sides.items()},
            }
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_preference_pairs(path: Path) -> list[PreferencePair]:
    """Read the tokens of the pairs that `write_preference_pairs` wrote.

    Raises:
        UserError: A line is not such a record; the error names file and line.
    """
    found = []
    for n, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line:
            continue
        try:
            record = json.loads(line)
            ids = {name: np.array(record["tokens"][name], np.int32) for name in ("prompt", "chosen", "rejected")}
            chosen, rejected = (
                Rollout(ids["prompt"], ids[side], record[side], record["finished"][side])
                for side in ("chosen", "rejected")
            )
            found.append(PreferencePair(chosen, rejected, record["margin"]))
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}:{n}: this is not a pair of answers that firth sampled, with their tokens ({error}): delete the file to "
                "create it again, or read its texts with examples=preferences"
            ) from error
    return found


@dataclass(frozen=True)
class SampledPreferencesConfig(ExamplesConfig):
    """Preferences between answers that a model sampled, stored as the sampled token ids."""

    base_fields: ClassVar[frozenset[str]] = PREFERENCE_FIELDS

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        def read(paths: Sequence[str]) -> Source:
            return PreferencePairs([c for path in paths for c in read_preference_pairs(Path(path))])

        return split_records(data, read)
