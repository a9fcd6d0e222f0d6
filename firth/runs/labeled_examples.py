"""Segments of records with a label: labelled, scored, chosen, tagged, questions.

    firth train classify start=runs/bert source=mine.csv segment.text=review segment.label=stars

Each reads JSONL, Parquet, CSV and TSV (tagged: CoNLL's columns too, questions: SQuAD's JSON), with the fields that it is
told; `columns` names those of a table without a head. What only the data knows (the classes, how many examples each has,
the mean and spread of numbers, the most options) goes into the settled recipe.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from firth.corpora import readers, tables
from firth.data import labeled, question_answering
from firth.data.source import Source
from firth.objectives.objective import Known, Objective
from firth.runs import class_counts
from firth.runs.examples import Cut, Segment, held_out, recorded
from firth.runs.prepare import Material
from firth.validated import TokenCount


@dataclass(frozen=True)
class Framed(Segment):
    """Records that are read in rows of at most `length` tokens, and of no more than the model can."""

    reader: ClassVar[tables.Reader | None] = None

    length: TokenCount = 128

    @property
    def longest(self) -> int:
        return self.length

    @property
    def read_fields(self) -> tuple[str, ...]:
        """The fields of a record that hold text, or lists of it."""
        raise NotImplementedError(type(self).__name__)

    def grouped_texts(self, paths: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        for place, record in readers.records(paths, columns=self.named, text=type(self).reader):
            values = [(field, record.get(field)) for field in self.read_fields]
            texts = [
                " ".join(map(str, value)) if isinstance(value, list) else readers.text_field(record, field, place)
                for field, value in values
            ]
            yield texts[0], texts

    @property
    def text_fields(self) -> tuple[Any, ...]:
        return (self.read_fields, self.named)

    @property
    def named(self) -> tuple[str, ...]:
        """The columns of a table without a head."""
        return ()

    def within(self, context: int) -> Segment:
        return dataclasses.replace(self, length=min(self.length, context))


@dataclass(frozen=True)
class Told(labeled.TextFields, Framed):
    """Records with something told of a text."""

    @property
    def given(self) -> frozenset[str]:
        return self.gives | {"segments"} if self.pair else self.gives

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.text, self.pair) if self.pair else (self.text,)

    @property
    def named(self) -> tuple[str, ...]:
        return self.columns


@dataclass(frozen=True)
class Labelled(Told):
    """Records with a class, in the field `label`."""

    gives: ClassVar[frozenset[str]] = frozenset({"tokens", "label"})

    def _read(self, paths: Sequence[str], material: Material, classes: Sequence[str] = ()) -> labeled.Labelled:
        return labeled.Labelled(paths, material.tokenizer, self.length, self, classes=classes)

    def untold(self, paths: Sequence[str], material: Material) -> Source:
        """Texts of the same fields that nobody labelled; plain text has one a line."""
        return labeled.Untold(paths, material.tokenizer, self.length, self, asked=False)

    def settle(self, objective: Objective, material: Material) -> Objective:
        """The classes are named by the records, unless the recipe names them, and those to learn from are counted."""

        @functools.cache
        def known() -> Known:
            found = self._read(material.source.paths(material.echo), material, objective.classes)
            if material.source.weights:  # what is held out is drawn path by path
                parts = [recorded(m, partial(self._read, material=m, classes=found.classes)) for m in material.parts()]
                counts = [list(class_counts.all_of(part.train).values()) for part in parts]
                return Known(classes=found.classes, counts=tuple(np.sum(counts, 0).tolist()))
            learnt = found.per_class(np.flatnonzero(~held_out(found, material)))
            return Known(classes=found.classes, counts=tuple(learnt.values()))

        return objective.told(known)

    def cut(self, material: Material, objective: Objective) -> Cut:
        return recorded(material, lambda paths: self._read(paths, material, objective.classes))


@dataclass(frozen=True)
class Scored(Told):
    """Records with a number, in the field `label`; the others as of `labelled`."""

    gives: ClassVar[frozenset[str]] = frozenset({"tokens", "score"})

    def _read(self, paths: Sequence[str], material: Material) -> labeled.Scored:
        return labeled.Scored(paths, material.tokenizer, self.length, self)

    def settle(self, objective: Objective, material: Material) -> Objective:
        """Numbers are learnt in units of their own spread, unless the recipe says which."""

        @functools.cache
        def known() -> Known:
            scores = self._read(material.source.paths(material.echo), material).scores
            return Known(mean=float(scores.mean()), spread=float(scores.std()) or 1.0)

        return objective.told(known)

    def cut(self, material: Material, objective: Objective) -> Cut:
        return recorded(material, lambda paths: self._read(paths, material))


@dataclass(frozen=True)
class Chosen(labeled.OptionFields, Framed):
    """Records with options, one of them right."""

    gives: ClassVar[frozenset[str]] = frozenset({"options", "label"})

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.text, *self.options)

    @property
    def named(self) -> tuple[str, ...]:
        return self.columns

    def _read(self, paths: Sequence[str], material: Material) -> labeled.Chosen:
        return labeled.Chosen(paths, material.tokenizer, self.length, self)

    def settle(self, objective: Objective, material: Material) -> Objective:
        """A group has as many rows as the longest list of options."""
        paths = [*material.source.paths(material.echo), *material.source.valid]
        return objective.told(lambda: Known(options=self._read(paths, material).most))

    def cut(self, material: Material, objective: Objective) -> Cut:
        return recorded(material, lambda paths: self._read(paths, material))


@dataclass(frozen=True)
class Tagged(labeled.TagFields, Framed):
    """Records with a tag for each word."""

    gives: ClassVar[frozenset[str]] = frozenset({"tokens", "tags"})

    reader: ClassVar[tables.Reader | None] = staticmethod(tables.sentences)

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.words,)

    @property
    def named(self) -> tuple[str, ...]:
        return self.columns

    def _read(self, paths: Sequence[str], material: Material, classes: Sequence[str] = ()) -> labeled.Tagged:
        return labeled.Tagged(paths, material.tokenizer, self.length, self, classes=classes)

    def settle(self, objective: Objective, material: Material) -> Objective:
        """The tags are named by the records to learn from, unless the recipe names them."""
        return objective.told(lambda: Known(classes=self._read(material.source.paths(material.echo), material).classes))

    def cut(self, material: Material, objective: Objective) -> Cut:
        return recorded(material, lambda paths: self._read(paths, material, objective.classes))


@dataclass(frozen=True)
class Questions(Framed):
    """Questions about a passage, answered by a span of it. stride: tokens from one window of a long passage to the next.
    question: its most tokens. context: the field of the passage. Where no files are held out, whole passages are."""

    gives: ClassVar[frozenset[str]] = frozenset({"tokens", "segments", "start", "end"})

    length: TokenCount = 384
    stride: TokenCount = 128
    question: TokenCount = 64
    context: str = "context"

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.context, "question")

    def _read(self, paths: Sequence[str], material: Material) -> question_answering.Questions:
        return question_answering.Questions(
            paths, material.tokenizer, self.length, stride=self.stride, question=self.question, context=self.context
        )

    def settle(self, objective: Objective, material: Material) -> Objective:
        """Whether a question may have no answer at all is what the questions to learn from say."""
        paths = material.source.paths(material.echo)
        return objective.told(lambda: Known(unanswerable=self._read(paths, material).unanswerable > 0))

    def cut(self, material: Material, objective: Objective) -> Cut:
        return recorded(material, lambda paths: self._read(paths, material))


SEGMENTS: dict[str, type[Segment]] = {
    "labelled": Labelled, "scored": Scored, "chosen": Chosen, "tagged": Tagged, "questions": Questions,
}  # fmt: skip
"""Name in a recipe -> class."""
