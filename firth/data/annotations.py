"""Several labels per example, some of them wrong: records that hold a list, and annotators that are simulated.

    {"text": "...", "labels": ["good", "bad", "good"]}          ->  {"tokens", "votes": [1, 0, 1], "label": 1}

`label` is the majority's, so that every objective that reads one label is the baseline of the one that reads them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from firth.data.labeled import LabeledTexts
from firth.data.records import Record
from firth.data.shuffle import ExampleRNG
from firth.data.source import Source, WrappedSource
from firth.types import IGNORE, Example, UserError


def majority(votes: np.ndarray) -> int:
    """The class with the most votes; among equals, the one that was voted for first. IGNORE is no vote.

    >>> majority(np.array([2, 0, 0, 2, IGNORE]))
    2
    """
    given = votes[votes != IGNORE]
    counts = np.bincount(given)
    return int(given[counts[given].argmax()])


class AnnotatedTexts(LabeledTexts):
    """Texts with a list of labels each; lists of fewer than the longest are filled with IGNORE."""

    @cached_property
    def _most(self) -> int:
        return max(len(self._columns["label"][i]) for i in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        example = {name: column[index] for name, column in self._columns.items()}
        votes = self._number[example["label"]]
        padded = np.pad(votes, (0, self._most - len(votes)), constant_values=IGNORE)
        return {"tokens": example["tokens"], "votes": padded, "label": majority(votes)}

    def labels(self, record: Record) -> Sequence[int]:
        given = record.get(self._label)
        if type(given) is not list or not given:
            raise UserError(
                f"the field {self._label!r} must be a list of one label or more, by several annotators, and is {given!r}: train "
                "`classify` on records with one label, or set examples=simulated_annotators to simulate annotators of them"
            )
        return [self.number(value) for value in given]


class ClassifiedAnnotations(AnnotatedTexts):
    """Votes to be measured by: the label of a record without any is its `label`, which counts as one."""

    def labels(self, record: Record) -> Sequence[int]:
        votes = self._label in record or "label" not in record
        return super().labels(record) if votes else [self.number(record["label"])]


class SimulatedAnnotators(WrappedSource):
    """A source with `count` simulated annotators: each is right with probability `accuracy`, and else says any other class.

    What annotator k says of example i is fixed by (seed, i) alone, so it is the same in every epoch.

    >>> class One(Source):
    ...     def __len__(self): return 9
    ...     def __getitem__(self, i): return {"tokens": np.array([5]), "label": 1}
    >>> SimulatedAnnotators(One(), classes=2, count=5, accuracy=0.6)[0]
    {'tokens': array([5]), 'label': 1, 'votes': array([1, 0, 0, 1, 1])}
    """

    def __init__(self, source: Source, *, classes: int, count: int, accuracy: float, seed: int = 0) -> None:
        if not (count >= 1 and 0 <= accuracy <= 1 and classes >= 2):
            raise UserError(
                f"{count} annotators of accuracy {accuracy} for {classes} classes: there must be one annotator or more, "
                "two classes or more, and the accuracy is a share from 0 to 1"
            )
        super().__init__(source)
        self.classes, self.count, self.accuracy = classes, count, accuracy
        self._draws = ExampleRNG(seed, "votes")

    def __getitem__(self, index: int) -> Example:
        example = self.source[index]
        rng = self._draws.at(0, index)
        wrong = rng.random(self.count) >= self.accuracy
        votes = (int(example["label"]) + wrong * rng.integers(1, self.classes, self.count)) % self.classes
        return example | {"votes": votes, "label": majority(votes)}
