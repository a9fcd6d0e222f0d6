"""Examples of labeled records: labeled, scored, multiple_choice, tagged, questions.

    firth train classification init_from=runs/bert data=mine.csv examples.text_field=review examples.label_field=stars

Each kind reads JSONL, Parquet, CSV and TSV (tagged: also CoNLL columns; questions: also SQuAD's JSON). The recipe names the
fields; `column_names` names the columns of a table without a header. Dataset statistics (class names and counts, mean and
standard deviation, the most options) are stored in the resolved recipe.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np

from firth.corpora import readers, tables
from firth.data import class_counts, labeled, question_answering
from firth.data.annotations import AnnotatedTexts
from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig, held_out, split_records
from firth.data.source import Source
from firth.fields import TokenCount
from firth.objectives.objective import Objective
from firth.types import DataStats

R = TypeVar("R", labeled.LabeledTexts, labeled.TaggedSentences, AnnotatedTexts)


def read_classes_once(
    settings: RecordsConfig, paths: Sequence[str], data: BuildContext, classes: Sequence[str], read: Callable[[], R]
) -> R:
    """Return records with classes, which are read once a run: to find the names of the classes, and as examples.

    Args:
        settings: The examples section.
        paths: The files.
        data: The data of the run.
        classes: Class names; empty takes those that the records have, and the names are then those of a later call.
        read: Reads the files.
    """
    found = data.read_once((settings, tuple(classes)), paths, read)
    data.read_once((settings, tuple(found.classes)), paths, lambda: found)
    return found


@dataclass(frozen=True)
class RecordsConfig(ExamplesConfig):
    """Base class of examples from records, truncated to `max_length` tokens or the model's context."""

    reader: ClassVar[tables.Reader | None] = None

    max_length: TokenCount = 128

    @property
    def max_tokens(self) -> int:
        return self.max_length

    @property
    def read_fields(self) -> tuple[str, ...]:
        """The fields of a record that hold a text or a list of texts."""
        raise NotImplementedError(type(self).__name__)

    def tokenizer_texts(self, paths: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
        for place, record in readers.records(paths, columns=self.table_columns, text=type(self).reader):
            values = [(field, record.get(field)) for field in self.read_fields]
            texts = [
                " ".join(map(str, value)) if isinstance(value, list) else readers.text_field(record, field, place)
                for field, value in values
            ]
            yield texts[0], texts

    @property
    def tokenizer_settings(self) -> tuple[Any, ...]:
        return (self.read_fields, self.table_columns)

    @property
    def table_columns(self) -> tuple[str, ...]:
        """The column names of a table without a header."""
        return ()

    def limit_to(self, context: int) -> ExamplesConfig:
        return dataclasses.replace(self, max_length=min(self.max_length, context))


@dataclass(frozen=True)
class TextRecordsConfig(labeled.TextFields, RecordsConfig):
    """Base class of records with an annotated text or pair of texts."""

    @property
    def fields(self) -> frozenset[str]:
        return self.base_fields | {"token_type_ids"} if self.text_pair_field else self.base_fields

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.text_field, self.text_pair_field) if self.text_pair_field else (self.text_field,)

    @property
    def table_columns(self) -> tuple[str, ...]:
        return self.column_names


@dataclass(frozen=True)
class LabeledConfig(TextRecordsConfig):
    """Records with a class label, in the field `label_field`."""

    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "label"})

    def _read(self, paths: Sequence[str], data: BuildContext, classes: Sequence[str] = ()) -> labeled.LabeledTexts:
        return read_classes_once(
            self, paths, data, classes,
            lambda: labeled.LabeledTexts(paths, data.tokenizer, self.max_length, self, classes=classes),
        )  # fmt: skip

    def unlabeled(self, paths: Sequence[str], data: BuildContext) -> Source:
        """Return unlabeled texts with the same fields; plain text files have one per line."""
        return labeled.UnlabeledTexts(paths, data.tokenizer, self.max_length, self, labeled=False)

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return the class names of the records, and the training counts of each class."""
        found = self._read(data.config.paths(data.log), data, class_names)
        if data.config.weights:  # records are held out path by path
            parts = [split_records(m, partial(self._read, data=m, classes=found.classes)) for m in data.per_path()]
            counts = [list(class_counts.count_classes(part.train).values()) for part in parts]
            return DataStats(class_names=found.classes, class_counts=tuple(np.sum(counts, 0).tolist()))
        counted = found.class_counts(np.flatnonzero(~held_out(found, data)))
        return DataStats(class_names=found.classes, class_counts=tuple(counted.values()))

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        return split_records(data, lambda paths: self._read(paths, data, objective.constraints.class_names))


@dataclass(frozen=True)
class ScoredConfig(TextRecordsConfig):
    """Records with a number, in the field `label_field`."""

    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "score"})

    def _read(self, paths: Sequence[str], data: BuildContext) -> labeled.ScoredTexts:
        return data.read_once(self, paths, lambda: labeled.ScoredTexts(paths, data.tokenizer, self.max_length, self))

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return the mean and standard deviation that standardize the numbers."""
        scores = self._read(data.config.paths(data.log), data).scores
        return DataStats(mean=float(scores.mean()), std=float(scores.std()) or 1.0)

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        return split_records(data, lambda paths: self._read(paths, data))


@dataclass(frozen=True)
class MultipleChoiceConfig(labeled.OptionFields, RecordsConfig):
    """Records with several options, of which one is correct."""

    base_fields: ClassVar[frozenset[str]] = frozenset({"options", "label"})

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.text_field, *self.option_fields)

    @property
    def table_columns(self) -> tuple[str, ...]:
        return self.column_names

    def _read(self, paths: Sequence[str], data: BuildContext) -> labeled.MultipleChoiceRecords:
        return data.read_once(
            self, paths, lambda: labeled.MultipleChoiceRecords(paths, data.tokenizer, self.max_length, self)
        )

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return the most options of a record, which is the number of rows per example."""
        files = [paths for paths in (data.config.paths(data.log), data.config.validation_path) if paths]
        return DataStats(max_options=max(self._read(paths, data).most for paths in files))

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        return split_records(data, lambda paths: self._read(paths, data))


@dataclass(frozen=True)
class TaggedConfig(labeled.TagFields, RecordsConfig):
    """Records of words with one tag each."""

    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "tags"})

    reader: ClassVar[tables.Reader | None] = staticmethod(tables.sentences)

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.words_field,)

    @property
    def table_columns(self) -> tuple[str, ...]:
        return self.column_names

    def _read(self, paths: Sequence[str], data: BuildContext, classes: Sequence[str] = ()) -> labeled.TaggedSentences:
        return read_classes_once(
            self, paths, data, classes,
            lambda: labeled.TaggedSentences(paths, data.tokenizer, self.max_length, self, classes=classes),
        )  # fmt: skip

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return the tag names of the training records."""
        return DataStats(class_names=self._read(data.config.paths(data.log), data).classes)

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        return split_records(data, lambda paths: self._read(paths, data, objective.constraints.class_names))


@dataclass(frozen=True)
class QuestionsConfig(RecordsConfig):
    """Questions about a passage, answered by a span of it (extractive question answering).

    Without validation files, whole passages are held out.

    Args:
        max_length: The most tokens of a window with the question.
        doc_stride: Tokens from one window of a long passage to the next.
        max_question_length: The most tokens of a question.
        context_field: The field of the passage.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "token_type_ids", "start", "end"})

    max_length: TokenCount = 384
    doc_stride: TokenCount = 128
    max_question_length: TokenCount = 64
    context_field: str = "context"

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.context_field, "question")

    def _read(self, paths: Sequence[str], data: BuildContext) -> question_answering.QuestionRecords:
        return data.read_once(
            self, paths,
            lambda: question_answering.QuestionRecords(
                paths, data.tokenizer, self.max_length, stride=self.doc_stride, question=self.max_question_length,
                context=self.context_field,
            ),
        )  # fmt: skip

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return whether a question may be unanswerable, from the training records."""
        return DataStats(has_unanswerable=self._read(data.config.paths(data.log), data).unanswerable > 0)

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        return split_records(data, lambda paths: self._read(paths, data))


EXAMPLES: dict[str, type[ExamplesConfig]] = {
    "labeled": LabeledConfig,
    "scored": ScoredConfig,
    "multiple_choice": MultipleChoiceConfig,
    "tagged": TaggedConfig,
    "questions": QuestionsConfig,
}
"""Name in a recipe -> class."""
