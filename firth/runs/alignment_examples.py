"""Examples for alignment: preferences, reference log-probabilities, rankings, and rollouts scored by a reward function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from firth.align.advantages import GAE, LeaveOneOut
from firth.align.precompute import precompute
from firth.align.rewards import (
    FunctionReward,
    PreferencePairs,
    RewardFunction,
    RewardModel,
    Rollout,
    read_preference_pairs,
)
from firth.align.rollouts import RolloutConfig
from firth.align.rollouts import RolloutSource as OnPolicy
from firth.data import rankings, records
from firth.data.source import Source
from firth.data.split import held_out_keys
from firth.evaluate.tokenizer_match import check_same_tokenizer
from firth.fields import NonNegativeFloat, PositiveInt, TokenCount
from firth.generate.engine import Engine
from firth.generate.sampling import Sampling
from firth.io import user_code
from firth.model.model import LM
from firth.objectives.dpo import build_comparison, ref_logprobs
from firth.objectives.objective import DataStats, Objective
from firth.objectives.policy_gradient import PER_TOKEN
from firth.runs import held_out_texts
from firth.runs.config_io import path_field
from firth.runs.examples import (
    PREFERENCE_FIELDS,
    DatasetSplits,
    ExamplesConfig,
    PreferencesConfig,
    split_records,
)
from firth.runs.held_out_texts import HeldOutTexts
from firth.runs.prepare import RunData
from firth.runs.start_model import model_directory
from firth.types import UserError


@dataclass(frozen=True)
class SampledPreferencesConfig(ExamplesConfig):
    """Preferences between answers that a model sampled, stored as the sampled token ids (`firth.align.rewards`)."""

    base_fields: ClassVar[frozenset[str]] = PREFERENCE_FIELDS

    def build(self, data: RunData, objective: Objective) -> DatasetSplits:
        def read(paths: Sequence[str]) -> Source:
            return PreferencePairs([c for path in paths for c in read_preference_pairs(Path(path))])

        return split_records(data, read)


@dataclass(frozen=True)
class RefLogprobsConfig(ExamplesConfig):
    """Preferences with the log-probabilities of both answers under the reference model (`init_from`), for DPO."""

    base: ExamplesConfig = PreferencesConfig()

    def limit_to(self, context: int) -> ExamplesConfig:
        return dataclasses.replace(self, base=self.base.limit_to(context))

    @property
    def fields(self) -> frozenset[str]:
        return self.base.fields | {"reference"}

    def build(self, data: RunData, objective: Objective) -> DatasetSplits:
        model = data.start.frozen("the model that DPO starts from, which is also its reference")
        plain = self.base.build(data, objective)
        with data.autocast():
            known = [
                precompute(source, model, build_comparison, ref_logprobs, directory=data.directory / "reference" / part)
                if source is not None else None
                for part, source in (("train", plain.train), ("valid", plain.validation))
            ]  # fmt: skip
        assert known[0] is not None
        return dataclasses.replace(plain, train=known[0], validation=known[1])


@dataclass(frozen=True)
class RankingsConfig(ExamplesConfig):
    """Records with a prompt and several answers in order of preference (`firth.data.rankings`)."""

    base_fields: ClassVar[frozenset[str]] = frozenset({"answers", "masks", "rank"})

    max_length: TokenCount = 256

    def limit_to(self, context: int) -> ExamplesConfig:
        return dataclasses.replace(self, max_length=min(self.max_length, context))

    def stats(self, data: RunData, class_names: Sequence[str] = ()) -> DataStats:
        """Return the most answers of a ranking, which is the number of rows per example."""
        files = [paths for paths in (data.config.paths(data.log), data.config.validation_path) if paths]
        return DataStats(max_options=max(self._read(paths, data).most for paths in files))

    def _read(self, paths: Sequence[str], data: RunData) -> rankings.RankingRecords:
        return data.read_once(self, paths, lambda: rankings.RankingRecords(paths, data.tokenizer, self.max_length))

    def build(self, data: RunData, objective: Objective) -> DatasetSplits:
        return split_records(data, lambda paths: self._read(paths, data))


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

    def build(self, data: RunData, objective: Objective) -> DatasetSplits:
        start = data.start.frozen("the model that writes the first answers, which is also the reference")
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
        judge: RewardFunction = learned or FunctionReward(function(self.reward_function))
        steps, over = divmod(self.rollout_size * self.num_epochs, data.batch_size)
        if over or not steps:
            raise UserError(
                f"{self.rollout_size} answers for {self.num_epochs} epochs do not fill steps of batch.size={data.batch_size} evenly"
            )
        source = OnPolicy(
            prompts, data.tokenizer, judge, start, seed=data.seed,
            config=RolloutConfig(
                rollout_size=self.rollout_size, num_generations=self.num_generations, steps=steps,
                max_new_tokens=self.max_new_tokens, kl_coef=self.kl_coef, unfinished_score=self.unfinished_score,
            ),
            advantage_estimator=LeaveOneOut() if self.advantages == "group" else GAE(value_lam=1.0),
            true_reward_function=FunctionReward(function(self.true_reward_function)) if self.true_reward_function else None,
            critic=learned,
        )  # fmt: skip
        shown = [{"tokens": prompt} for prompt in (held or prompts)[: held_out_texts.COUNT]]
        return DatasetSplits(source, None, texts=HeldOutTexts(shown, bool(held), judge, self.max_new_tokens))

    def _prompts(self, data: RunData, start: LM, paths: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return the prompts that fit into the context with `max_new_tokens`, and their keys; report how many do not."""
        room = start.context - self.max_new_tokens
        if room < 1:
            raise UserError(
                f"examples.max_new_tokens={self.max_new_tokens} leaves no room for a prompt in the {start.context} positions of the model: "
                "lower examples.max_new_tokens"
            )
        limit = min(self.max_prompt_length, room)
        prompts, keys, counts = records.prompts(paths, data.tokenizer, limit)
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

    def _reward_model(self, data: RunData, prompts: Sequence[np.ndarray], start: LM) -> RewardModel:
        """Return the reward model, normalized on answers of the initial model so that `kl_coef` does not depend on its scale."""
        run = model_directory(self.reward_model)
        hint = "train the reward model from the same start as the policy"
        check_same_tokenizer(data.tokenizer, run, "examples.reward_model:", hint)
        judge = RewardModel(data.load_frozen(run))
        some = [prompts[i] for i in range(0, len(prompts), max(1, len(prompts) // 64))][:64]
        with data.autocast():
            sampling = Sampling(max_new_tokens=self.max_new_tokens, seed=data.seed)
            written = Engine(start, data.tokenizer).generate(some, sampling)
            return judge.normalized([Rollout.of(p, w) for p, w in zip(some, written, strict=True)])


def function(name: str) -> Callable[[str], float]:
    """Return the reward function that `module:function` names.

    Raises:
        UserError: There is no such module or function, or the module fails when it is imported.
    """
    found: Callable[[str], float] = user_code.find(name, "function")
    if not callable(found):
        raise UserError(f"{name!r} is of type {type(found).__name__}: name a function of the answer's text")
    return found


EXAMPLES: dict[str, type[ExamplesConfig]] = {
    "sampled_preferences": SampledPreferencesConfig,
    "ref_logprobs": RefLogprobsConfig,
    "rankings": RankingsConfig,
    "rollouts": RolloutsConfig,
}
"""Name in a recipe -> class."""
