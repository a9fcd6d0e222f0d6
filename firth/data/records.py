"""Examples from records in JSONL, Parquet or tables: what every kind of them has, and the store that holds them.

A kind of records is one frozen dataclass: its settings, and how a record becomes an example. `Records` is the same for all kinds. It
reads the files once and encodes every record once, into a memory-mapped temporary file. An epoch then costs no encoding, memory
use stays small, and truncated and omitted records are known before the first step (`counts`):

    cut               longer than `max_length`: truncated at the end
    unanswered        no label is left after that: omitted. If that is true of all records, UserError
    mismatched        a row of a table with too many or too few cells: omitted
    unnamed_columns   a column of a table has no name: read as `Unnamed: 2`, the name that pandas gives it
    bad_utf8          a line was not UTF-8: read with U+FFFD in it
    blank             a text was empty: read as it is
    duplicates        the same content as an earlier record: read as it is, in the same split as that one

The first of each is reported with its file and line (`notes`).

    source = Records(LabeledConfig(max_length=64), ["reviews.jsonl"], tokenizer)
    source[0]                                                    # {"label": 1, "tokens": array([2, 17, 9, 3])}
"""

from __future__ import annotations

import copy
import hashlib
import tempfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar

import numpy as np

from firth.corpora import readers
from firth.corpora.input_files import ReadStats
from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig, split_records
from firth.data.labels import ClassNumbering, in_order
from firth.data.source import Source
from firth.data.split import content_key
from firth.fields import TokenCount
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import IGNORE, DataStats, Example, UserError

if TYPE_CHECKING:
    from firth.objectives.objective import Objective

Record = dict[str, Any]
OMITTED: Sequence[Example] = []
"""Result of `RecordsConfig.examples` for a record that gives no example for a reason that has been noted; compared by identity."""

RECORDS_PER_BATCH = 1024
"""Records whose texts are encoded together."""

Purpose = Literal["train", "evaluate", "predict"]
"""What records are read for: training; evaluation of a trained model; prediction, where records have no labels."""

T = TypeVar("T")

NOTE_TEMPLATES = {
    "unanswered": "record{s} had nothing to learn from and {were} left out",
    "mismatched": "row{s} had another number of cells than {their} head and {were} left out",
    "unnamed_columns": "column{s} {have} no name and {are} called 'Unnamed: ' and {their} place from 0",
    "misplaced": "answer{s} {are} not in {their} passage at the given character, and {were} left out",
    "begun": "tag{s} continued an entity that had not begun (IOB1, IO), and {were} read as its beginning",
    "bad_utf8": "line{s} {were} not UTF-8 and {have} U+FFFD in place of what could not be read",
    "nul": "NUL character{s} {were} removed",
    "too_long": "record{s} {were} longer than 4 MB and {were} left out",
    "blank": "text{s} {were} empty and {were} read as {they} {are}",
    "trimmed": "label{s} had white space around {them}, which was dropped",
    "decimal": "label{s} {were} written as a decimal number (1.0) and {were} read as a whole one",
    "unlabeled": "record{s} {have} no label and {were} left out",
    "unanswerable": "question{s} {have} no answer, so the model may say that there is none",
    "duplicates": "record{s} {have} the same content as an earlier one",
    "lost": "question{s} {have} no answer though every question of SQuAD 1.1 has one, and {were} left out",
    "cut": "text{s} {were} longer than {limit} tokens and lost {their} end",
    "long_questions": "question{s} {were} longer than {limit} tokens and lost {their} end",
    "long_answers": "answer{s} {were} longer than {limit} tokens and lost {their} end",
}
"""Kind of note -> end of the sentence that reports it."""

SINGULAR = {"s": "", "were": "was", "their": "its", "they": "it", "them": "it", "are": "is", "have": "has"}
PLURAL = {"s": "s"} | {word: word for word in SINGULAR if word != "s"}


def describe_note(
    kind: str, count: int, location: str, limit: int = 0, templates: Mapping[str, str] = NOTE_TEMPLATES
) -> str:
    """Return the sentence that reports a kind of note.

    Args:
        kind: Key of `templates`.
        count: How often it occurred.
        location: File and line of the first.
        limit: Maximum number of tokens, for truncated texts.
        templates: Kind -> end of the sentence.

    >>> describe_note("mismatched", 1, "a.csv:3"), describe_note("cut", 2, "a.csv:7", 128)
    ... # doctest: +NORMALIZE_WHITESPACE
    ('1 row had another number of cells than its head and was left out; the first is a.csv:3',
     '2 texts were longer than 128 tokens and lost their end; the first is a.csv:7')
    """
    text = templates[kind].format(limit=limit, **(SINGULAR if count == 1 else PLURAL))
    return f"{count:,} {text}; the first is {location}"


class ArrayColumn:
    """Arrays of varied length in a temporary file that is removed with the process."""

    def __init__(self, dtype: type) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the column
        self._dtype = np.dtype(dtype)
        self._ends = array("q", [0])
        self._values: np.ndarray = np.zeros(0, dtype)

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self._dtype, copy=False).tobytes())
        self._ends.append(self._ends[-1] + len(values))

    def close(self) -> None:
        """End writing and open the file for reading."""
        self._file.flush()
        if self._ends[-1]:
            self._values = np.memmap(self._file, self._dtype, "r").view(np.ndarray)

    @property
    def whole(self) -> np.ndarray:
        """All arrays, concatenated."""
        return self._values

    @property
    def lengths(self) -> np.ndarray:
        """Length of each array: (n,)."""
        return np.diff(self._ends)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._values[self._ends[index] : self._ends[index + 1]]

    def some(self, indices: np.ndarray) -> np.ndarray:
        """Return some of the arrays, concatenated."""
        ends, n = np.array(self._ends), self.lengths[indices]
        return self._values[np.repeat(ends[indices] - np.cumsum(n) + n, n) + np.arange(n.sum())]


class TextColumn:
    """Texts in a temporary file, at most one for each record. A text that is equal to the one before it is stored once."""

    def __init__(self) -> None:
        self._texts = ArrayColumn(np.uint8)
        self._numbers = array("q")
        self._latest: str | None = None

    def append(self, record: int, text: str) -> None:
        """Store the text of a record. Records come in order, and some may have none."""
        if text != self._latest:
            self._texts.append(np.frombuffer(text.encode(), np.uint8))
            self._latest = text
        self._numbers.extend([-1] * (record - len(self._numbers)))
        self._numbers.append(len(self._texts.lengths) - 1)

    def close(self) -> None:
        """End writing and open the file for reading."""
        self._texts.close()

    def __getitem__(self, record: int) -> str:
        return self._texts[self._numbers[record]].tobytes().decode()


@dataclass(frozen=True)
class RecordsConfig(ExamplesConfig):
    """Base class of the kinds of examples that are made of records. A subclass has the settings, and makes examples of a record.

    Attributes:
        columns: Array of an example -> the type in which it is stored.
        class_column: The array that holds numbers of classes: "label" (of a record) or "tags" (of its words); empty: none does.

    Args:
        max_length: The most tokens of a row; a longer one is truncated at the end.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset()
    columns: ClassVar[Mapping[str, type]] = {}
    class_column: ClassVar[str] = ""

    max_length: TokenCount = 128

    @property
    def fields(self) -> frozenset[str]:
        return self.base_fields or frozenset(self.columns)

    def limit_to(self, context: int) -> ExamplesConfig:
        return replace(self, max_length=min(self.max_length, context))

    @classmethod
    def of(cls, settings: Mapping[str, Any], **changes: Any) -> Self:
        """Return an instance with the settings of a recipe's examples section, with defaults for missing ones."""
        names = cls.__dataclass_fields__
        return cls(**{name: value for name, value in settings.items() if name in names} | changes)

    def read(self, paths: Sequence[str], counts: ReadStats, labeled: bool = True) -> Iterator[tuple[str, Record]]:
        """Yield the file and line of each record, and the record.

        Args:
            paths: Files, directories or globs.
            counts: Counts what was read, repaired and skipped.
            labeled: Whether the records have labels.
        """
        return readers.records(paths, counts=counts)

    def group(self, record: Record) -> str:
        """Return the text that records of one group share, the prompt: a group is held out together, or not at all.

        A record without a prompt returns its whole content.
        """
        raise NotImplementedError(type(self).__name__)

    def texts(self, record: Record, labeled: bool = True) -> list[str]:
        """Return the texts of a record that are encoded separately."""
        return []

    def examples(self, record: Record, encoded: list[np.ndarray], records: Records) -> Sequence[Example]:
        """Return the arrays of the examples of a record: one or none, several for records that are read in windows.

        Returns OMITTED where the reason for having none has been noted.

        Args:
            record: The record.
            encoded: The tokens of its `texts`.
            records: The store that the examples go to, with the tokenizer; it counts what is truncated (`Records.fit`).
        """
        found = self.example(record, encoded, records)
        return [] if found is None else [found]

    def example(self, record: Record, encoded: list[np.ndarray], records: Records) -> Example | None:
        """Return the arrays of the one example of a record; None if it has no labels."""
        raise NotImplementedError(type(self).__name__)

    def to_example(self, arrays: Example, records: Records) -> Example:
        """Return the example that the stored arrays are; classes are numbered in their final order."""
        return arrays

    def metadata(self, index: int, records: Records) -> Mapping[str, Any]:
        """Return what a metric needs of an example and its arrays do not contain."""
        return {}

    @property
    def limits(self) -> Mapping[str, int]:
        """Kind of truncation -> maximum number of tokens, where that is not `max_length`."""
        return {}

    def note_templates(self, purpose: Purpose) -> Mapping[str, str]:
        """Kind of note -> end of the sentence that reports it, where that is not in `NOTE_TEMPLATES`."""
        return {}

    def check_classes(self, names: Sequence[str]) -> None:
        """Raise a UserError for names of classes that were found in the records and are not supported."""

    def tokenizer_texts(self, paths: Sequence[str]) -> Iterator[tuple[str, list[str]]] | None:
        """Yield the group and the texts of each record, to train a tokenizer; None for documents."""
        return (self._with_group(location, record) for location, record in self.read(paths, ReadStats()))

    def _with_group(self, location: str, record: Record) -> tuple[str, list[str]]:
        with located(location):
            texts = self.tokenizer_texts_of(record)  # first: its errors name a missing field
            return self.group(record), texts

    def tokenizer_texts_of(self, record: Record) -> list[str]:
        """Return the texts of a record that a tokenizer is trained on; by default those that are encoded."""
        return self.texts(record)

    def records(self, data: BuildContext, paths: Sequence[str], class_names: Sequence[str] = ()) -> Records:
        """Return the records of some files, which are read once a run.

        Args:
            data: The data of the run.
            paths: The files.
            class_names: Names of the classes, in the order of their numbers; empty: those found in the records.
        """
        found = data.read_once(self, paths, lambda: Records(self, paths, data.tokenizer, classes=class_names))
        if not class_names or found.classes == tuple(class_names):
            return found
        if set(found.classes) <= set(class_names):
            return found.with_classes(class_names)
        return Records(self, paths, data.tokenizer, classes=class_names)

    def training_records(
        self, data: BuildContext, class_names: Sequence[str] = ()
    ) -> list[tuple[BuildContext, Records]]:
        """Return the records of the training files, with the data that they are: one pair, or one for each path of a mixture."""
        parts = data.per_path() if data.config.weights else [data]
        found = [self.records(part, part.config.paths(part.log), class_names) for part in parts]
        if self.class_column and not class_names:
            names = in_order({name for one in found for name in one.classes})
            found = [one.with_classes(names) for one in found]
        return list(zip(parts, found, strict=True))

    def longest(self, data: BuildContext, column: str) -> int:
        """Return the length of the longest array of a column, in the training and the validation files."""
        found = [records for _, records in self.training_records(data)]
        held = [self.records(data, data.config.validation_path)] if data.config.validation_path else []
        return max(records.longest(column) for records in (*found, *held))

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        names = objective.constraints.class_names if self.class_column else ()
        return split_records(data, lambda paths: self.records(data, paths, names))

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        if not self.class_column:
            return DataStats()
        [(_, found), *_] = self.training_records(data, class_names)
        return DataStats(class_names=found.classes)


CLASS_NOUNS = {"label": ("label", "record", "class"), "tags": ("tag", "tag", "tag")}
"""Column of classes -> what a value of it, what has one, and what a class is called."""


class Records(Source):
    """The examples of some records, stored as arrays.

    Args:
        kind: Makes examples of a record.
        paths: Files, directories or globs.
        tokenizer: The tokenizer.
        classes: Class names in the order of their numbers; empty: those found in the records.
        purpose: What the records are read for.

    Raises:
        UserError: A record is malformed, a label is not one of the classes, or no record can be used.
    """

    def __init__(
        self,
        kind: RecordsConfig,
        paths: Sequence[str],
        tokenizer: Tokenizer,
        *,
        classes: Sequence[str] = (),
        purpose: Purpose = "train",
    ) -> None:
        self.kind, self.paths, self.tokenizer, self.purpose = kind, paths, tokenizer, purpose
        self._columns = {name: ArrayColumn(dtype) for name, dtype in kind.columns.items()}
        self._texts: dict[str, TextColumn] = {}
        self._longest: dict[str, int] = {}
        self._size = self.num_records = self._record = 0
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._location = self._unknown = ""
        self._record_ids = array("q")
        self._groups = array("Q")
        self._contents: set[int] = set()
        self._numbering = ClassNumbering(classes)
        self._latest: tuple[str, Any] = ("", None)
        read_stats = ReadStats()
        records = kind.read(paths, read_stats, self.labeled)
        while chunk := list(islice(records, RECORDS_PER_BATCH)):
            self._add(chunk)
        for column in self._columns.values():
            column.close()
        for text_column in self._texts.values():
            text_column.close()
        self._contents.clear()
        self._counts.update(read_stats.rows())
        self._first |= read_stats.at
        if not self._size:
            left = ", ".join(f"{n:,} {name}" for name, n in self._counts.items() if n and name != "files")
            raise UserError(f"{', '.join(paths)}: no record can be used{f' ({left})' if left else ''}")
        self._check_unknown_classes()
        self.classes, self._final_numbers = self._numbering.names, self._numbering.final
        if self.labeled and kind.class_column and not classes:
            kind.check_classes(self.classes)

    @property
    def labeled(self) -> bool:
        """Whether the records have labels."""
        return self.purpose != "predict"

    @property
    def counts(self) -> Mapping[str, int]:
        return {"examples": self._size, **{name: n for name, n in self._counts.items() if n}}

    @property
    def notes(self) -> Sequence[str]:
        templates = {**NOTE_TEMPLATES, **self.kind.note_templates(self.purpose)}
        limits = self.kind.limits
        found = [
            describe_note(kind, self._counts[kind], location, limits.get(kind, self.kind.max_length), templates)
            for kind, location in self._first.items()
        ]
        empty = [repr(name) for name, n in self.class_counts(np.arange(len(self))).items() if not n]
        if empty:
            _, _, noun = CLASS_NOUNS[self.kind.class_column]
            plural = {"class": "classes", "tag": "tags"}[noun] if len(empty) > 1 else noun
            found.append(f"no record of {', '.join(self.paths)} has the {plural} {', '.join(empty)}")
        return found

    @property
    def lengths(self) -> np.ndarray:
        """Number of values of each example over all columns."""
        return np.sum([column.lengths for column in self._columns.values()], 0)

    @property
    def record_ids(self) -> np.ndarray:
        """Number of the record of each example, from 0: (n,)."""
        return np.array(self._record_ids)

    @property
    def group_ids(self) -> np.ndarray:
        return np.array(self._groups, np.uint64)

    def record_of(self, index: int) -> int:
        """Return the number of the record of one example."""
        return self._record_ids[index]

    def location_of(self, index: int) -> str:
        """Return the file and line of the record of one example; the files are read again up to it."""
        records = self.kind.read(self.paths, ReadStats(), self.labeled)
        return next(islice(records, self.record_of(index), None))[0]

    def column(self, name: str) -> ArrayColumn:
        """Return one of the arrays of all examples, as stored."""
        return self._columns[name]

    def longest(self, name: str) -> int:
        """Return the length of the longest array of a column."""
        if name not in self._longest:
            self._longest[name] = int(self._columns[name].lengths.max())
        return self._longest[name]

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        if not self.labeled or not self.kind.class_column:
            return {}
        found = self._columns[self.kind.class_column].some(indices)
        numbers = self._final_numbers[found[found != IGNORE]]
        return dict(zip(self.classes, np.bincount(numbers, minlength=len(self.classes)).tolist(), strict=True))

    def with_classes(self, names: Sequence[str]) -> Records:
        """Return the same records with the numbers of other class names, which include those of the records."""
        if tuple(names) == self.classes:
            return self
        other = copy.copy(self)
        other.classes = tuple(names)
        other._final_numbers = np.array([other.classes.index(self.classes[i]) for i in self._final_numbers], np.int64)
        return other

    def metadata(self, index: int) -> Mapping[str, Any]:
        return self.kind.metadata(index, self)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        arrays = {name: column[index] for name, column in self._columns.items()}
        if name := self.kind.class_column:
            numbers = np.full(len(arrays[name]), IGNORE)
            known = arrays[name] != IGNORE
            numbers[known] = self._final_numbers[arrays[name][known]] if self.labeled else 0
            arrays[name] = numbers
        return self.kind.to_example(arrays, self)

    # What a kind calls while a record is read.

    def note(self, kind: str) -> None:
        """Count a note about the record being read, and keep the place of the first."""
        self._counts[kind] += 1
        self._first.setdefault(kind, self._location)

    def fit(self, tokens: np.ndarray, room: int, kind: str = "cut") -> np.ndarray:
        """Truncate tokens to `room`, and note that as `kind`."""
        if len(tokens) > room:
            self.note(kind)
        return tokens[:room]

    def class_number(self, label: str | int) -> int:
        """Return the number of a class, as it is stored: found names are numbered in the order in which they occur."""
        number = self._numbering.number(label)
        if number is None:
            self._unknown = self._unknown or str(label)
            self.note("unknown")
        return number or 0

    def is_class(self, label: str | int) -> bool:
        """Return whether a label is the name or number of one of the given classes."""
        return self._numbering.number(label) is not None

    @property
    def known_classes(self) -> Sequence[str]:
        """The given names of the classes; empty where names are found in the records."""
        return () if self._numbering.open else self._numbering.names

    def for_text(self, text: str, compute: Callable[[], T]) -> T:
        """Return what is computed for a text, once for consecutive records with the same text: questions about a passage."""
        if text != self._latest[0] or self._latest[1] is None:
            self._latest = (text, compute())
        found: T = self._latest[1]
        return found

    def keep_text(self, name: str, text: str) -> None:
        """Store a text of the record being read, for `text_of`."""
        self._texts.setdefault(name, TextColumn()).append(self._record, text)

    def text_of(self, name: str, record: int) -> str:
        """Return a text that was kept of a record, by the number of the record from 0."""
        return self._texts[name][record]

    def _add(self, records: list[tuple[str, Record]]) -> None:
        texts = []
        for location, record in records:
            with located(location):
                texts.append(self.kind.texts(record, self.labeled))
        encoded = iter(self.tokenizer.encode_batch([text for record_texts in texts for text in record_texts]))
        self._counts["records"] += len(records)
        for (location, record), record_texts in zip(records, texts, strict=True):
            self._location = location
            with located(location):
                examples = self.kind.examples(record, list(islice(encoded, len(record_texts))), self)
            if examples is not OMITTED:
                self._store(record, examples)
            self._record += 1
        self.num_records += len(records)

    def _store(self, record: Record, examples: Sequence[Example]) -> None:
        if not examples:
            self.note("unanswered")
            return
        group = content_key(self.kind.group(record))
        self._groups.extend([group] * len(examples))
        content = b"".join(example[name].tobytes() for example in examples for name in self._columns)
        content += group.to_bytes(8)  # tells truncated texts with the same beginning from each other
        key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
        if key in self._contents:
            self.note("duplicates")
        self._contents.add(key)
        for example in examples:
            for name, column in self._columns.items():
                column.append(example[name])
            self._record_ids.append(self._record)
        self._size += len(examples)

    def _check_unknown_classes(self) -> None:
        """Raise UserError for labels that are not one of the classes: it names the first and counts the others."""
        if not (count := self._counts["unknown"]):
            return
        what, of, _ = CLASS_NOUNS[self.kind.class_column]
        rest = count - 1
        others = f"; {rest:,} more {of}{'s have' if rest > 1 else ' has'} the same problem" if rest else ""
        raise UserError(
            f"{self._first['unknown']}: the {what} {self._unknown} is none of the classes ({', '.join(self._numbering.names)}){others}; "
            "correct or remove it, or add it to objective.class_names"
        )


@contextmanager
def located(location: str) -> Iterator[None]:
    """Prefix errors with the file and line of the record."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(location) else f"{location}: {error}") from None
