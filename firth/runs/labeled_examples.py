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
from firth.objectives.objective import DataStats, Objective
from firth.runs import class_counts
from firth.runs.examples import DatasetSplits, ExamplesConfig, held_out, split_records
from firth.runs.prepare import RunData
from firth.validated import TokenCount


@dataclass(frozen=True)
class RecordsConfig(ExamplesConfig):
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

    def within(self, context: int) -> ExamplesConfig:
        return dataclasses.replace(self, length=min(self.length, context))


@dataclass(frozen=True)
class TextRecordsConfig(labeled.TextFields, RecordsConfig):
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
class LabeledConfig(TextRecordsConfig):
    """Records with a class, in the field `label`."""

    gives: ClassVar[frozenset[str]] = frozenset({"tokens", "label"})

    def _read(self, paths: Sequence[str], material: RunData, classes: Sequence[str] = ()) -> labeled.LabeledTexts:
        return labeled.LabeledTexts(paths, material.tokenizer, self.length, self, classes=classes)

    def untold(self, paths: Sequence[str], material: RunData) -> Source:
        """Texts of the same fields that nobody labelled; plain text has one a line."""
        return labeled.UnlabeledTexts(paths, material.tokenizer, self.length, self, asked=False)

    def settle(self, objective: Objective, material: RunData) -> Objective:
        """The classes are named by the records, unless the recipe names them, and those to learn from are counted."""

        @functools.cache
        def known() -> DataStats:
            found = self._read(material.source.paths(material.echo), material, objective.classes)
            if material.source.weights:  # what is held out is drawn path by path
                parts = [
                    split_records(m, partial(self._read, material=m, classes=found.classes)) for m in material.parts()
                ]
                counts = [list(class_counts.all_of(part.train).values()) for part in parts]
                return DataStats(classes=found.classes, counts=tuple(np.sum(counts, 0).tolist()))
            learnt = found.per_class(np.flatnonzero(~held_out(found, material)))
            return DataStats(classes=found.classes, counts=tuple(learnt.values()))

        return objective.told(known)

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        return split_records(material, lambda paths: self._read(paths, material, objective.classes))


@dataclass(frozen=True)
class ScoredConfig(TextRecordsConfig):
    """Records with a number, in the field `label`; the others as of `labelled`."""

    gives: ClassVar[frozenset[str]] = frozenset({"tokens", "score"})

    def _read(self, paths: Sequence[str], material: RunData) -> labeled.ScoredTexts:
        return labeled.ScoredTexts(paths, material.tokenizer, self.length, self)

    def settle(self, objective: Objective, material: RunData) -> Objective:
        """Numbers are learnt in units of their own spread, unless the recipe says which."""

        @functools.cache
        def known() -> DataStats:
            scores = self._read(material.source.paths(material.echo), material).scores
            return DataStats(mean=float(scores.mean()), spread=float(scores.std()) or 1.0)

        return objective.told(known)

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        return split_records(material, lambda paths: self._read(paths, material))


@dataclass(frozen=True)
class MultipleChoiceConfig(labeled.OptionFields, RecordsConfig):
    """Records with options, one of them right."""

    gives: ClassVar[frozenset[str]] = frozenset({"options", "label"})

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.text, *self.options)

    @property
    def named(self) -> tuple[str, ...]:
        return self.columns

    def _read(self, paths: Sequence[str], material: RunData) -> labeled.MultipleChoiceRecords:
        return labeled.MultipleChoiceRecords(paths, material.tokenizer, self.length, self)

    def settle(self, objective: Objective, material: RunData) -> Objective:
        """A group has as many rows as the longest list of options."""
        paths = [*material.source.paths(material.echo), *material.source.valid]
        return objective.told(lambda: DataStats(options=self._read(paths, material).most))

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        return split_records(material, lambda paths: self._read(paths, material))


@dataclass(frozen=True)
class TaggedConfig(labeled.TagFields, RecordsConfig):
    """Records with a tag for each word."""

    gives: ClassVar[frozenset[str]] = frozenset({"tokens", "tags"})

    reader: ClassVar[tables.Reader | None] = staticmethod(tables.sentences)

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.words,)

    @property
    def named(self) -> tuple[str, ...]:
        return self.columns

    def _read(self, paths: Sequence[str], material: RunData, classes: Sequence[str] = ()) -> labeled.TaggedSentences:
        return labeled.TaggedSentences(paths, material.tokenizer, self.length, self, classes=classes)

    def settle(self, objective: Objective, material: RunData) -> Objective:
        """The tags are named by the records to learn from, unless the recipe names them."""
        return objective.told(
            lambda: DataStats(classes=self._read(material.source.paths(material.echo), material).classes)
        )

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        return split_records(material, lambda paths: self._read(paths, material, objective.classes))


@dataclass(frozen=True)
class QuestionsConfig(RecordsConfig):
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

    def _read(self, paths: Sequence[str], material: RunData) -> question_answering.QuestionRecords:
        return question_answering.QuestionRecords(
            paths, material.tokenizer, self.length, stride=self.stride, question=self.question, context=self.context
        )

    def settle(self, objective: Objective, material: RunData) -> Objective:
        """Whether a question may have no answer at all is what the questions to learn from say."""
        paths = material.source.paths(material.echo)
        return objective.told(lambda: DataStats(unanswerable=self._read(paths, material).unanswerable > 0))

    def cut(self, material: RunData, objective: Objective) -> DatasetSplits:
        return split_records(material, lambda paths: self._read(paths, material))


EXAMPLES: dict[str, type[ExamplesConfig]] = {
    "labelled": LabeledConfig, "scored": ScoredConfig, "chosen": MultipleChoiceConfig, "tagged": TaggedConfig, "questions": QuestionsConfig,
}  # fmt: skip
"""Name in a recipe -> class."""
