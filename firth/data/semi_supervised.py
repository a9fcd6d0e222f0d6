"""Few labeled and many unlabeled texts, and examples with several labels each, for semi-supervised and weakly supervised learning.

The labels of an example are those of real or simulated annotators:

    {"text": "...", "labels": ["good", "bad", "good"]}          ->  {"tokens", "votes": [1, 0, 1], "label": 1}

`label` is the majority label, so any objective that reads one label is a baseline for the objective that reads all of them
(`firth.objectives.semi_supervised`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig, WrappingConfig
from firth.data.labeled import LabeledConfig, TextsConfig, class_number
from firth.data.records import Record, Records
from firth.data.shuffle import ExampleRNG, epoch_permutation
from firth.data.source import MixtureSource, Source, SubsetSource, UnlabeledSource, WrappedSource
from firth.fields import NonNegativeInt, PositiveFloat, PositiveInt, Share, path_field
from firth.types import IGNORE, Example, UserError

if TYPE_CHECKING:
    from firth.objectives.objective import Objective


def choose_labeled(source: Source, num_labeled: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of `num_labeled` labeled examples, balanced over the classes, and those of all others; both ascending.

    The choice depends on the seed.

    Raises:
        UserError: A class has fewer examples than its share.
    """
    labels = np.array([int(source[i]["label"]) for i in range(len(source))])
    _, drawn = epoch_permutation(len(source), seed, np.arange(len(source)))
    classes = np.unique(labels)
    chosen = np.zeros(len(source), bool)
    for class_index, label in enumerate(classes):
        share = num_labeled // len(classes) + (class_index < num_labeled % len(classes))
        of_class = drawn[labels[drawn] == label][:share]
        if len(of_class) < share:
            raise UserError(
                f"{num_labeled} labeled examples are required, and class {label} has only {len(of_class)} of its {share}"
            )
        chosen[of_class] = True
    return np.flatnonzero(chosen), np.flatnonzero(~chosen)


@dataclass(frozen=True)
class PartiallyLabeledConfig(WrappingConfig):
    """Labeled records and unlabeled texts. Set one of `num_labeled` and `unlabeled_path`.

    Args:
        base: The labeled examples.
        num_labeled: For an experiment: this many records keep their label, balanced over the classes; the others lose it.
        unlabeled_ratio: Unlabeled texts per labeled text in every batch.
        unlabeled_path: Files of unlabeled texts. Held-out texts are removed from them.
    """

    base: ExamplesConfig = LabeledConfig()
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


def majority(votes: np.ndarray) -> int:
    """Return the class with the most votes; ties go to the class that was voted for first. IGNORE is not a vote.

    >>> majority(np.array([2, 0, 0, 2, IGNORE]))
    2
    """
    given = votes[votes != IGNORE]
    counts = np.bincount(given)
    return int(given[counts[given].argmax()])


@dataclass(frozen=True)
class MultiAnnotatorConfig(TextsConfig):
    """Records with the labels of several annotators: {"tokens", "votes", "label"}.

    Shorter lists are padded with IGNORE to the longest one. In evaluation, a record without such a list counts its `label` as one vote.

    Args:
        max_length: The most tokens of a text.
        text_field: The field of the text.
        labels_field: The field with the list of labels.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "label", "votes"})
    class_column: ClassVar[str] = "label"

    text_field: str = "text"
    labels_field: str = "labels"

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.text_field,)

    def labels(self, record: Record, records: Records) -> Sequence[int]:
        if records.purpose == "evaluate" and self.labels_field not in record and "label" in record:
            return [class_number(record["label"], records)]
        given = record.get(self.labels_field)
        if type(given) is not list or not given:
            raise UserError(
                f"the field {self.labels_field!r} must be a list of one or more labels by different annotators, and it is {given!r}: "
                "use the recipe `classification` for records with one label, or set examples=simulated_annotators to simulate "
                "annotators"
            )
        return [class_number(value, records) for value in given]

    def to_example(self, arrays: Example, records: Records) -> Example:
        votes = arrays["label"]
        padded = np.pad(votes, (0, records.longest("label") - len(votes)), constant_values=IGNORE)
        return {"tokens": arrays["tokens"], "votes": padded, "label": majority(votes)}


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

    base: ExamplesConfig = LabeledConfig()
    num_annotators: PositiveInt = 5
    annotator_accuracy: Share = 0.7

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        whole = self.base.build(data, objective)
        data.log(
            f"a simulation: the labels of {len(whole.train):,} records are replaced by the votes of {self.num_annotators} annotators, "
            f"each right with probability {self.annotator_accuracy:g} (examples=simulated_annotators)"
        )
        train = SimulatedAnnotators(whole.train, self, len(objective.constraints.class_names), data.seed)
        return replace(whole, train=train)


class SimulatedAnnotators(WrappedSource):
    """A source with simulated annotators, each of which is right with a given probability and otherwise picks a random other class.

    The label of annotator k for example i depends on (seed, i) alone, so it is the same in every epoch.

    Args:
        source: The labeled examples.
        config: Number and accuracy of the annotators.
        classes: Number of classes.
        seed: Random seed.

    Raises:
        UserError: There are fewer than two classes.

    >>> class One(Source):
    ...     def __len__(self): return 9
    ...     def __getitem__(self, i): return {"tokens": np.array([5]), "label": 1}
    >>> SimulatedAnnotators(One(), SimulatedAnnotatorsConfig(annotator_accuracy=0.6), classes=2)[0]
    {'tokens': array([5]), 'label': 1, 'votes': array([1, 0, 0, 1, 1])}
    """

    def __init__(self, source: Source, config: SimulatedAnnotatorsConfig, classes: int, seed: int = 0) -> None:
        if classes < 2:
            raise UserError(f"annotators choose among classes, and there is {classes}: name two or more")
        super().__init__(source)
        self.config, self.classes = config, classes
        self._draws = ExampleRNG(seed, "votes")

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        count = self.config.num_annotators
        rng = self._draws.at(0, index)
        wrong = rng.random(count) >= self.config.annotator_accuracy
        votes = (int(example["label"]) + wrong * rng.integers(1, self.classes, count)) % self.classes
        return example | {"votes": votes, "label": majority(votes)}
