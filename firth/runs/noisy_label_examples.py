"""Examples with few or noisy labels: partially_labeled, pseudo_labeled, simulated_annotators, multi_annotator."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from firth.align.precompute import precompute
from firth.data.annotations import AnnotatedTexts, SimulatedAnnotators
from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig, split_records
from firth.data.labeled import TextFields
from firth.data.source import MixtureSource, Source, SubsetSource
from firth.data.unlabeled import UnlabeledSource, choose_labeled
from firth.fields import NonNegativeInt, PositiveFloat, PositiveInt, Share, path_field
from firth.objectives.objective import Objective
from firth.objectives.semi_supervised import teacher_probabilities, unlabeled_example
from firth.runs.labeled_examples import LabeledConfig, RecordsConfig, read_classes_once
from firth.types import DataStats, Example, UserError


@dataclass(frozen=True)
class WrappingConfig(ExamplesConfig):
    """Base class of examples that wrap another kind (`base`) and change or add fields."""

    base_fields: ClassVar[frozenset[str]] = frozenset()

    base: ExamplesConfig = LabeledConfig()

    @property
    def fields(self) -> frozenset[str]:
        return self.base.fields | self.base_fields

    @property
    def max_tokens(self) -> int:
        return self.base.max_tokens

    def tokenizer_texts(self, paths: Sequence[str]) -> Iterator[tuple[str, list[str]]] | None:
        return self.base.tokenizer_texts(paths)

    @property
    def tokenizer_settings(self) -> tuple[Any, ...]:
        return self.base.tokenizer_settings

    def limit_to(self, context: int) -> ExamplesConfig:
        return replace(self, base=self.base.limit_to(context))

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        return self.base.stats(data, class_names)


@dataclass(frozen=True)
class PartiallyLabeledConfig(WrappingConfig):
    """Labeled records and unlabeled texts. Set one of `num_labeled` and `unlabeled_path`.

    Args:
        base: The labeled examples.
        num_labeled: For an experiment: this many records keep their label, balanced over the classes; the others lose it.
        unlabeled_ratio: Unlabeled texts per labeled text in every batch.
        unlabeled_path: Files of unlabeled texts. Held-out texts are removed from them.
    """

    num_labeled: NonNegativeInt = 0
    unlabeled_ratio: PositiveFloat = 3.0
    unlabeled_path: tuple[str, ...] = path_field("files", ())

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        if bool(self.num_labeled) == bool(self.unlabeled_path):
            raise UserError(
                "set one of examples.unlabeled_path=[FILE], files of texts without a label, and examples.num_labeled=N, a trial "
                "in which N records keep their label and the others are read without it"
            )
        whole = self.base.build(data, objective)
        if self.unlabeled_path:
            parts: list[Source] = [whole.train, self._unlabeled(whole.validation, data)]
            return replace(whole, train=MixtureSource(parts, [1.0, self.unlabeled_ratio]))
        known, others = choose_labeled(whole.train, self.num_labeled, data.seed)
        if not len(others):
            raise UserError(
                f"all {self.num_labeled} records keep their label and none is left without: lower examples.num_labeled"
            )
        data.log(
            f"a trial: {len(known):,} of {len(whole.train):,} records keep their label (examples.num_labeled={self.num_labeled})"
        )
        parts = [SubsetSource(whole.train, known), UnlabeledSource(SubsetSource(whole.train, others))]
        return replace(whole, train=MixtureSource(parts, [1.0, self.unlabeled_ratio]))

    def _unlabeled(self, valid: Source | None, data: BuildContext) -> Source:
        """Return the texts of `unlabeled_path` without those that are held out."""
        texts = self.base.unlabeled(self.unlabeled_path, data)
        if valid is None:
            return texts
        held = np.isin(texts.group_ids, valid.group_ids)
        if held.all():
            raise UserError(
                f"all {len(texts):,} texts of examples.unlabeled_path are held out, so none is left to train on: give other files"
            )
        if held.any():
            data.log(
                f"{held.sum():,} of {len(texts):,} texts in examples.unlabeled_path are left out: they are held out; the first is number "
                f"{held.argmax() + 1:,}"
            )
        return UnlabeledSource(SubsetSource(texts, np.flatnonzero(~held))) if held.any() else texts


@dataclass(frozen=True)
class PseudoLabeledConfig(PartiallyLabeledConfig):
    """Partially labeled records with the class probabilities of a teacher for each text.

    Args:
        teacher: The run of a classifier that was trained on the labeled records alone.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"taught"})
    required_fields: ClassVar[frozenset[str]] = frozenset({"label"})

    teacher: str = path_field("model", "")

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        what = "the run of `firth train classification` on the labeled records, which gives the pseudo-labels"
        hint = "train the teacher and this run from the same start, or with the same tokenizer.path"
        model = data.frozen_model(self.teacher, "examples.teacher", what, hint)
        plain = super().build(data, objective)
        vocab = data.tokenizer.vocab

        def show(example: Example) -> Example:
            return unlabeled_example(objective, example, vocab)

        with data.autocast():
            known = precompute(plain.train, model, show, teacher_probabilities, directory=data.directory / "taught")
        return replace(plain, train=known)


@dataclass(frozen=True)
class SimulatedAnnotatorsConfig(WrappingConfig):
    """Records whose true label is replaced by the votes of simulated annotators; held-out records keep the true label.

    Args:
        base: The labeled examples.
        num_annotators: Number of simulated annotators.
        annotator_accuracy: Probability that a vote is correct.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"votes"})
    required_fields: ClassVar[frozenset[str]] = frozenset({"label"})

    num_annotators: PositiveInt = 5
    annotator_accuracy: Share = 0.7

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        whole = self.base.build(data, objective)
        data.log(
            f"a simulation: the labels of {len(whole.train):,} records are replaced by the votes of {self.num_annotators} annotators, "
            f"each right with probability {self.annotator_accuracy:g} (examples=simulated_annotators)"
        )
        train = SimulatedAnnotators(
            whole.train, classes=len(objective.constraints.class_names), count=self.num_annotators, accuracy=self.annotator_accuracy,
            seed=data.seed,
        )  # fmt: skip
        return replace(whole, train=train)


@dataclass(frozen=True)
class MultiAnnotatorConfig(RecordsConfig):
    """Records with the labels of several annotators.

    Args:
        max_length: The most tokens of a text.
        text_field: The field of the text.
        labels_field: The field with the list of labels.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "label", "votes"})

    text_field: str = "text"
    labels_field: str = "labels"

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.text_field,)

    def _read(self, paths: Sequence[str], data: BuildContext, classes: Sequence[str] = ()) -> AnnotatedTexts:
        fields = TextFields(self.text_field, self.labels_field)
        return read_classes_once(
            self, paths, data, classes,
            lambda: AnnotatedTexts(paths, data.tokenizer, self.max_length, fields, classes=classes),
        )  # fmt: skip

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        return DataStats(class_names=self._read(data.config.paths(data.log), data).classes)

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        return split_records(data, lambda paths: self._read(paths, data, objective.constraints.class_names))


EXAMPLES: dict[str, type[ExamplesConfig]] = {
    "partially_labeled": PartiallyLabeledConfig,
    "pseudo_labeled": PseudoLabeledConfig,
    "simulated_annotators": SimulatedAnnotatorsConfig,
    "multi_annotator": MultiAnnotatorConfig,
}
"""Name in a recipe -> class."""
