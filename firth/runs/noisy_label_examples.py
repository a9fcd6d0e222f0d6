"""Segments of records whose labels are few, or many and noisy: partly, taught, voted, votes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from firth.align.precompute import precompute
from firth.data.annotations import AnnotatedTexts as Voting
from firth.data.annotations import SimulatedAnnotators
from firth.data.labeled import TextFields
from firth.data.source import MixtureSource, Source, SubsetSource
from firth.data.unlabeled import UnlabeledSource, choose_labeled
from firth.evaluate.tokenizer_match import check_same_tokenizer
from firth.objectives.objective import DataStats, Objective
from firth.objectives.semi_supervised import teacher_probabilities, unlabeled_example
from firth.runs.config_io import path_field
from firth.runs.examples import DatasetSplits, ExamplesConfig, required_model, split_records
from firth.runs.labeled_examples import LabeledConfig, RecordsConfig
from firth.runs.prepare import RunData
from firth.types import Example, UserError
from firth.validated import NonNegativeInt, PositiveFloat, PositiveInt, Share


@dataclass(frozen=True)
class WrappingConfig(ExamplesConfig):
    """What another segment reads, seen otherwise, and what is said of it beside."""

    gives: ClassVar[frozenset[str]] = frozenset()

    of: ExamplesConfig = LabeledConfig()

    @property
    def given(self) -> frozenset[str]:
        return self.of.given | self.gives

    @property
    def longest(self) -> int:
        return self.of.longest

    def grouped_texts(self, paths: Sequence[str]) -> Iterator[tuple[str, list[str]]] | None:
        return self.of.grouped_texts(paths)

    @property
    def text_fields(self) -> tuple[Any, ...]:
        return self.of.text_fields

    def within(self, context: int) -> ExamplesConfig:
        return replace(self, of=self.of.within(context))

    def settle(self, objective: Objective, material: RunData) -> Objective:
        return self.of.settle(objective, material)


@dataclass(frozen=True)
class PartiallyLabeledConfig(WrappingConfig):
    """Records with a label, and texts without one. One of the two says which texts have none.

    Args:
        few: For a trial: this many records keep their label, as many of each class, and the others are read without it.
        unlabelled: Texts without a label for each one with a label, in every batch.
        others: Files of texts without a label. Texts that are held out are left out of them.
    """

    few: NonNegativeInt = 0
    unlabelled: PositiveFloat = 3.0
    others: tuple[str, ...] = path_field("files", ())

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        if bool(self.few) == bool(self.others):
            raise UserError(
                "set one of segment.others=[FILE], files of texts without a label, and segment.few=N, a trial in which N records "
                "keep their label and the others are read without it"
            )
        whole = self.of.cut(material, objective)
        if self.others:
            parts: list[Source] = [whole.train, self._unlabelled(whole.valid, material)]
            return replace(whole, train=MixtureSource(parts, [1.0, self.unlabelled]))
        known, others = choose_labeled(whole.train, self.few, material.seed)
        if not len(others):
            raise UserError(f"all {self.few} records keep their label and none is left without: lower segment.few")
        material.echo(
            f"a trial: {len(known):,} of {len(whole.train):,} records keep their label (segment.few={self.few})"
        )
        parts = [SubsetSource(whole.train, known), UnlabeledSource(SubsetSource(whole.train, others))]
        return replace(whole, train=MixtureSource(parts, [1.0, self.unlabelled]))

    def _unlabelled(self, valid: Source | None, material: RunData) -> Source:
        """The texts of `others`, less those whose prompt or text is held out."""
        texts = self.of.untold(self.others, material)
        if valid is None:
            return texts
        held = np.isin(texts.families, valid.families)
        if held.all():
            raise UserError(
                f"all {len(texts):,} texts of segment.others are held out, so none is left to train on: give other files"
            )
        if held.any():
            material.echo(
                f"{held.sum():,} of {len(texts):,} texts in segment.others are left out: they are held out; the first is number "
                f"{held.argmax() + 1:,}"
            )
        return UnlabeledSource(SubsetSource(texts, np.flatnonzero(~held))) if held.any() else texts


@dataclass(frozen=True)
class PseudoLabeledConfig(PartiallyLabeledConfig):
    """Partly labelled records, with the classes that a teacher predicts for each text.

    Args:
        teacher: The run of a classifier that was trained on the labelled records alone.
    """

    gives: ClassVar[frozenset[str]] = frozenset({"taught"})
    wants: ClassVar[frozenset[str]] = frozenset({"label"})

    teacher: str = path_field("model", "")

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        what = "the run of `firth train classify` on the labelled records, which gives the pseudo-labels"
        place = required_model(self.teacher, "segment.teacher", what)
        cure = "train the teacher and this run from the same start, or with the same tokenizer.path"
        check_same_tokenizer(material.tokenizer, place, "segment.teacher:", cure)
        model = material.frozen(place)
        plain = super().cut(material, objective)
        vocab = material.tokenizer.vocab

        def show(example: Example) -> Example:
            return unlabeled_example(objective, example, vocab)

        with material.casts():
            known = precompute(plain.train, model, show, teacher_probabilities, directory=material.directory / "taught")
        return replace(plain, train=known)


@dataclass(frozen=True)
class SimulatedAnnotatorsConfig(WrappingConfig):
    """A simulation: records with one true label each, which `annotators` simulated ones replace by votes that are right with
    probability `accuracy`; held-out records keep the truth."""

    gives: ClassVar[frozenset[str]] = frozenset({"votes"})
    wants: ClassVar[frozenset[str]] = frozenset({"label"})

    annotators: PositiveInt = 5
    accuracy: Share = 0.7

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        whole = self.of.cut(material, objective)
        material.echo(
            f"a simulation: the labels of {len(whole.train):,} records are replaced by the votes of {self.annotators} annotators, "
            f"each right with probability {self.accuracy:g} (segment=voted)"
        )
        train = SimulatedAnnotators(
            whole.train, classes=len(objective.classes), count=self.annotators, accuracy=self.accuracy,
            seed=material.seed,
        )  # fmt: skip
        return replace(whole, train=train)


@dataclass(frozen=True)
class MultiAnnotatorConfig(RecordsConfig):
    """Records with a list of labels in the field `votes`, by as many annotators as there are."""

    gives: ClassVar[frozenset[str]] = frozenset({"tokens", "label", "votes"})

    text: str = "text"
    votes: str = "labels"

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.text,)

    def _read(self, paths: Sequence[str], material: RunData, classes: Sequence[str] = ()) -> Voting:
        return Voting(paths, material.tokenizer, self.length, TextFields(self.text, self.votes), classes=classes)

    def settle(self, objective: Objective, material: RunData) -> Objective:
        return objective.told(
            lambda: DataStats(classes=self._read(material.source.paths(material.echo), material).classes)
        )

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        return split_records(material, lambda paths: self._read(paths, material, objective.classes))


EXAMPLES: dict[str, type[ExamplesConfig]] = {
    "partly": PartiallyLabeledConfig,
    "taught": PseudoLabeledConfig,
    "voted": SimulatedAnnotatorsConfig,
    "votes": MultiAnnotatorConfig,
}
"""Name in a recipe -> class."""
