"""Who says what is good: a stated scorer, a reward model, and comparisons made from either.

A `Judge` gives one number to each sampled answer. `Truth` reads the number off the text with a function that everybody
can see (in life there is none: it stands in for people, so that a method can be held to what was really wanted);
`RewardModel` has learnt it from comparisons (`firth.objectives.reward_model`). `prefer` asks a judge to compare, with a
stated amount of human inconstancy.

    truth = Truth(lambda text: float(text.endswith(".")))
    comparisons = prefer(first, second, truth, tokenizer=tokenizer, noise=1.0, rng=rng)      # Bradley-Terry
    source = Comparisons(comparisons)          # {"chosen_tokens", "chosen_mask", "rejected_tokens", "rejected_mask"}
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from firth.data.source import Source
from firth.data.split import content_key
from firth.generate.decoding import attention_pattern_of, rectangle
from firth.generate.streaming import Completion
from firth.model.model import LM
from firth.objectives.reward_model import rewards
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import Example, UserError

Scorer = Callable[[str], float]
"""A pure function of an answer's text."""


@dataclass(frozen=True, eq=False)
class Rollout:
    """An answer as a judge sees it: prompt (m,) and answer (n,) token ids, the stop token included where `finished`."""

    prompt: np.ndarray
    answer: np.ndarray
    text: str
    finished: bool

    @staticmethod
    def of(prompt: np.ndarray, written: Completion) -> Rollout:
        """A prompt and what the engine wrote after it."""
        return Rollout(np.asarray(prompt, np.int32), written.tokens, written.text, written.finish == "stop")

    @property
    def tokens(self) -> np.ndarray:
        """Prompt and answer in one row: (m + n,) int32."""
        return np.concatenate((self.prompt, self.answer)).astype(np.int32)

    @property
    def mask(self) -> np.ndarray:
        """True on the answer: (m + n,)."""
        return np.arange(len(self.prompt) + len(self.answer)) >= len(self.prompt)


class RewardError(UserError):
    """A judge that raised, or that returned no finite number, for one sample."""

    def __init__(self, sample: Rollout, fault: str) -> None:
        super().__init__(f"the reward {fault} for the answer {_quoted(sample.text)}; correct the reward")
        self.sample, self.fault = sample, fault


QUOTED_CHARACTERS = 200
"""The most characters of a prompt or an answer in an error."""


def _quoted(text: str) -> str:
    return repr(text if len(text) <= QUOTED_CHARACTERS else text[:QUOTED_CHARACTERS] + "...")


class RewardFunction(Protocol):
    """Scores answers."""

    def __call__(self, samples: Sequence[Rollout]) -> np.ndarray:
        """One number per sample: (N,) float32. Raises RewardError for a sample that it cannot score."""


def score_rollouts(judge: RewardFunction, samples: Sequence[Rollout], tokenizer: Tokenizer) -> np.ndarray:
    """The judge's scores: (N,) float64.

    Raises:
        UserError: The judge raised RewardError, or a score is not finite; it names the prompt and the answer.
    """
    try:
        scores = np.asarray(judge(samples), np.float64)
        for score, sample in zip(scores.tolist(), samples, strict=True):
            if not math.isfinite(score):
                raise RewardError(sample, f"returned {score}")
    except RewardError as error:
        prompt = tokenizer.decode(error.sample.prompt.tolist())
        raise UserError(
            f"the reward {error.fault} for the prompt {_quoted(prompt)} and the answer {_quoted(error.sample.text)}; correct "
            "the reward and run the same command again"
        ) from error
    return scores


@dataclass(frozen=True)
class FunctionReward:
    """A judge that reads the score off the text."""

    scorer: Scorer

    def __call__(self, samples: Sequence[Rollout]) -> np.ndarray:
        return np.array([self._score(sample) for sample in samples], np.float32)

    def _score(self, sample: Rollout) -> float:
        try:
            return float(self.scorer(sample.text))
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}:{at.lineno}"
            raise RewardError(sample, f"raised {type(error).__name__} ({error}) at {where}") from error


@dataclass(frozen=True, eq=False)
class RewardModel:
    """A judge that has learnt from comparisons: (score - mean) / scale.

    A reward model knows differences only; its zero and its unit are whatever training left. `normalised` sets them by
    reference answers, so that a KL penalty means the same whichever reward model stands beside it.
    """

    model: LM
    rows: int = 32
    mean: float = 0.0
    scale: float = 1.0

    def __call__(self, samples: Sequence[Rollout]) -> np.ndarray:
        scores = np.zeros(len(samples), np.float32)
        order = sorted(range(len(samples)), key=lambda i: -len(samples[i].tokens))
        device = self.model.tokens.weight.device
        with attention_pattern_of(self.model):
            for first in range(0, len(order), self.rows):
                index = order[first : first + self.rows]
                batch = rectangle([samples[i].tokens for i in index], device)
                scores[index] = rewards(self.model, self.model(batch), batch).cpu().numpy()
        return (scores - np.float32(self.mean)) / np.float32(self.scale)

    def normalized(self, samples: Sequence[Rollout]) -> RewardModel:
        """The same judge with mean 0 and standard deviation 1 on these samples."""
        scores = self(samples) * self.scale + self.mean
        return replace(self, mean=float(scores.mean()), scale=float(scores.std()) or 1.0)


@dataclass(frozen=True, eq=False)
class PreferencePair:
    """Two answers to one prompt, one of them preferred. margin: the judge's score of the chosen less the rejected's;
    below zero where noise has turned the preference round."""

    chosen: Rollout
    rejected: Rollout
    margin: float


def sample_preference(
    first: Sequence[Rollout],
    second: Sequence[Rollout],
    judge: RewardFunction,
    *,
    tokenizer: Tokenizer,
    noise: float = 0.0,
    rng: np.random.Generator,
) -> list[PreferencePair]:
    """Compare answers pairwise. noise 0 prefers the higher score, and leaves ties out; above it, the first is preferred
    with probability sigma((score_1 - score_2) / noise) (Bradley & Terry 1952). Equal answers are left out.

    Raises:
        UserError: The judge cannot score an answer, or two answers have different prompts.
    """
    drawn = rng.random(len(first))
    kept = []
    scores = zip(*(score_rollouts(judge, side, tokenizer) for side in (first, second)), strict=True)
    for a, b, (x, y), u in zip(first, second, scores, drawn, strict=True):
        if not np.array_equal(a.prompt, b.prompt):
            raise UserError("only answers to the same prompt can be compared")
        apart = float(x) - float(y)
        if np.array_equal(a.answer, b.answer) or (noise == 0 and apart == 0):
            continue
        wins = apart > 0 if noise == 0 else bool(u < 1 / (1 + np.exp(-apart / noise)))
        kept.append(PreferencePair(a, b, apart) if wins else PreferencePair(b, a, -apart))
    return kept


class PreferencePairs(Source):
    """Comparisons as examples of reward models and DPO: chosen and rejected rows of tokens with their masks."""

    def __init__(self, comparisons: Sequence[PreferencePair]) -> None:
        self.comparisons = list(comparisons)

    @property
    def group_ids(self) -> np.ndarray:
        keys = [content_key(" ".join(map(str, one.chosen.prompt.tolist()))) for one in self.comparisons]
        return np.array(keys, np.uint64)

    def __len__(self) -> int:
        return len(self.comparisons)

    def __getitem__(self, index: int) -> Example:
        sides = {"chosen": self.comparisons[index].chosen, "rejected": self.comparisons[index].rejected}
        tokens = {f"{side}_tokens": sample.tokens for side, sample in sides.items()}
        return tokens | {f"{side}_mask": sample.mask for side, sample in sides.items()}


def write_preference_pairs(
    comparisons: Iterable[PreferencePair], path: Path, request: Callable[[np.ndarray], str]
) -> None:
    """Write preferences as every reader of preferences has them, one JSON record a line.

    {"prompt": "Who paints?", "chosen": "The otter.", "rejected": "Who?", "margin": 0.7, "tokens": {"prompt": [...], "chosen":
    [...], "rejected": [...]}, "finished": {"chosen": true, "rejected": false}}

    `firth train reward_model` and `dpo` encode the three texts anew, with the stop token behind both answers. The segment "sampled"
    reads the tokens (`read_comparisons`), which are exactly what was sampled.

    Args:
        comparisons: What to write.
        path: A file of JSON lines.
        request: The text of a prompt, from its tokens (n,): what the user said, without the chat template.
    """
    with path.open("w", encoding="utf-8") as file:
        for one in comparisons:
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
    """The comparisons that `write_comparisons` wrote, by their tokens; UserError with file and line for another record."""
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
                f"{path}:{n}: not a comparison of answers that firth sampled, with their tokens ({error}): delete the file to "
                "make it anew, or read its texts with examples=preferences"
            ) from error
    return found
