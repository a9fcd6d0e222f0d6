"""Examples with several labels each, by real or simulated annotators.

    {"text": "...", "labels": ["good", "bad", "good"]}          ->  {"tokens", "votes": [1, 0, 1], "label": 1}

`label` is the majority label, so any objective that reads one label is a baseline for the objective that reads all of them.
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
    """Return the class with the most votes; ties go to the class that was voted for first. IGNORE is not a vote.

    >>> majority(np.array([2, 0, 0, 2, IGNORE]))
    2
    """
    given = votes[votes != IGNORE]
    counts = np.bincount(given)
    return int(given[counts[given].argmax()])


class AnnotatedTexts(LabeledTexts):
    """Texts with a list of labels each. Shorter lists are padded with IGNORE to the longest one."""

    @cached_property
    def _max_votes(self) -> int:
        return max(len(self._columns["label"][i]) for i in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        example = {name: column[index] for name, column in self._columns.items()}
        votes = self._number[example["label"]]
        padded = np.pad(votes, (0, self._max_votes - len(votes)), constant_values=IGNORE)
        return {"tokens": example["tokens"], "votes": padded, "label": majority(votes)}

    def labels(self, record: Record) -> Sequence[int]:
        given = record.get(self._label)
        if type(given) is not list or not given:
            raise UserError(
                f"the field {self._label!r} must be a list of one or more labels by different annotators, and it is {given!r}: "
                "use the recipe `classification` for records with one label, or set examples=simulated_annotators to simulate "
                "annotators"
            )
        return [self.number(value) for value in given]


class ClassifiedAnnotations(AnnotatedTexts):
    """Annotated texts for evaluation: a record without a list of votes counts its `label` as one vote."""

    def labels(self, record: Record) -> Sequence[int]:
        votes = self._label in record or "label" not in record
        return super().labels(record) if votes else [self.number(record["label"])]


class SimulatedAnnotators(WrappedSource):
    """A source with simulated annotators, each of which is right with a given probability and otherwise picks a random other class.

    The label of annotator k for example i depends on (seed, i) alone, so it is the same in every epoch.

    Args:
        source: The labeled examples.
        classes: Number of classes.
        count: Number of annotators.
        accuracy: Probability that an annotator is right, 0 to 1.
        seed: Random seed.

    Raises:
        UserError: A number is out of range.

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
                "two classes or more, and the accuracy is between 0 and 1"
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
