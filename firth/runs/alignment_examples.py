"""Examples for alignment: preferences, reference log-probabilities, rankings, and rollouts scored by a reward function."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from firth.align.precompute import precompute
from firth.align.rewards import (
    PreferencePairs,
    read_preference_pairs,
)
from firth.align.rollouts import RolloutsConfig
from firth.data import rankings
from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig, split_records
from firth.data.source import Source
from firth.data.unpaired import MismatchedAnswers, UnpairedPreferenceRecords
from firth.fields import TokenCount
from firth.objectives.objective import Objective
from firth.objectives.preferences import KTO, build_comparison, build_mismatched, ref_logprobs
from firth.runs.examples import PREFERENCE_FIELDS, PreferencesConfig
from firth.types import DataStats, Example


@dataclass(frozen=True)
class SampledPreferencesConfig(ExamplesConfig):
    """Preferences between answers that a model sampled, stored as the sampled token ids (`firth.align.rewards`)."""

    base_fields: ClassVar[frozenset[str]] = PREFERENCE_FIELDS

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
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

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        return with_ref_logprobs(self.base.build(data, objective), data, build_comparison)


def with_ref_logprobs(plain: DatasetSplits, data: BuildContext, build: Callable[[Example], Example]) -> DatasetSplits:
    """Return the examples with the log-probabilities of the rows that `build` makes, under the model that the run starts from."""
    model = data.frozen_start("the model that training starts from, which is also the reference")
    with data.autocast():
        known = [
            precompute(source, model, build, ref_logprobs, directory=data.directory / "reference" / part)
            if source is not None else None
            for part, source in (("train", plain.train), ("valid", plain.validation))
        ]  # fmt: skip
    assert known[0] is not None
    return dataclasses.replace(plain, train=known[0], validation=known[1])


@dataclass(frozen=True)
class UnpairedPreferencesConfig(ExamplesConfig):
    """Records with a prompt, an answer, and a label that says whether it is desirable, for KTO.

    Each is shown with the answer to another prompt (`firth.data.unpaired`), and with the log-probabilities of both under the
    reference model (`init_from`).
    """

    base_fields: ClassVar[frozenset[str]] = KTO.inputs
    required_fields: ClassVar[frozenset[str]] = frozenset({"desirable"})

    max_length: TokenCount = 256

    def limit_to(self, context: int) -> ExamplesConfig:
        return dataclasses.replace(self, max_length=min(self.max_length, context))

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        plain = split_records(data, lambda paths: UnpairedPreferenceRecords(paths, data.tokenizer, self.max_length))
        held = MismatchedAnswers(plain.validation, self.max_length) if plain.validation is not None else None
        paired = dataclasses.replace(plain, train=MismatchedAnswers(plain.train, self.max_length), validation=held)
        return with_ref_logprobs(paired, data, build_mismatched)


@dataclass(frozen=True)
class RankingsConfig(ExamplesConfig):
    """Records with a prompt and several answers in order of preference (`firth.data.rankings`)."""

    base_fields: ClassVar[frozenset[str]] = frozenset({"answers", "masks", "rank"})

    max_length: TokenCount = 256

    def limit_to(self, context: int) -> ExamplesConfig:
        return dataclasses.replace(self, max_length=min(self.max_length, context))

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return the most answers of a ranking, which is the number of rows per example."""
        files = [paths for paths in (data.config.paths(data.log), data.config.validation_path) if paths]
        return DataStats(max_options=max(self._read(paths, data).most for paths in files))

    def _read(self, paths: Sequence[str], data: BuildContext) -> rankings.RankingRecords:
        return data.read_once(self, paths, lambda: rankings.RankingRecords(paths, data.tokenizer, self.max_length))

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        return split_records(data, lambda paths: self._read(paths, data))


EXAMPLES: dict[str, type[ExamplesConfig]] = {
    "sampled_preferences": SampledPreferencesConfig,
    "ref_logprobs": RefLogprobsConfig,
    "unpaired_preferences": UnpairedPreferencesConfig,
    "rankings": RankingsConfig,
    "rollouts": RolloutsConfig,
}
"""Name in a recipe -> class."""
