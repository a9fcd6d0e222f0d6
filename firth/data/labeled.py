"""Examples from records that have a label: a class, a number, a tag for each word, the right one of several options.

    {"text": "a fine film", "label": "good"}                                Labelled    {"tokens", "label"}
    {"text": "a man sings", "other": "a man is singing", "label": 4.6}      Scored      {"tokens", "token_type_ids", "score"}
    {"text": "She opens", "options": ["the door", "the sea"], "label": 0}   Chosen      {"options", "label"}
    {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}                   Tagged      {"tokens", "tags"}

All of them read JSONL, Parquet and tables (`firth.corpora.tables`), and are framed as [CLS] text [SEP] or [CLS] text [SEP]
other [SEP], which for a decoder are its own beginning and end. `asked=False` reads records without their labels, for a
model to tell them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np

from firth.corpora import readers, tables
from firth.data import layout
from firth.data.class_names import ClassNumbering
from firth.data.records import LEFT_OUT, Record, Records
from firth.data.tags import check_scheme, has_spans, to_bio2
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import IGNORE, Example, UserError


@dataclass(frozen=True)
class RecordFields:
    """What the fields of the records are called. columns: names of all of them, for a table without a head."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """As a run's recipe calls them; the usual names where it says nothing."""
        return cls(*(told.get(field.name, field.default) for field in dataclasses.fields(cls)))


@dataclass(frozen=True)
class TextFields(RecordFields):
    """text: of the text; label: of what is told of it; pair: of a second text, if there is one. absent: labels which say
    that there is none ("-" where the annotators of SNLI and MNLI do not agree): such records are left out, and counted."""

    text_field: str = "text"
    label_field: str = "label"
    text_pair_field: str = ""
    column_names: tuple[str, ...] = ()
    missing_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptionFields(RecordFields):
    """options: of their list, or a field for each. begin: of a text that every option begins with (SWAG's sent2). label: of
    the right option's place, or of the option itself."""

    text_field: str = "text"
    label_field: str = "label"
    option_fields: tuple[str, ...] = ("options",)
    option_prefix_field: str = ""
    column_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class TagFields(RecordFields):
    """words, tags: of their lists, or two of CoNLL's `columns`."""

    words_field: str = "tokens"
    tags_field: str = "tags"
    column_names: tuple[str, ...] = ()


class TextRecords(Records):
    """Texts, or pairs of them, with something to be told of each. Of two texts that are too long together, the longer one
    is cut."""

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "token_type_ids": np.uint8, "label": np.int32}

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, fields: TextFields = TextFields(), *,
        asked: bool = True,
    ) -> None:  # fmt: skip
        self._fields, self._label = (
            [fields.text_field, fields.text_pair_field] if fields.text_pair_field else [fields.text_field],
            fields.label_field,
        )
        self.asked, self._absent = asked, fields.missing_labels
        super().__init__(paths, tokenizer, length, names=fields.column_names)

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        return {name: field for name, field in example.items() if name != "token_type_ids" or len(self._fields) > 1}

    def group(self, record: Record) -> str:
        return str(record[self._fields[0]])

    def texts(self, record: Record, place: str) -> list[str]:
        return [readers.text_field(record, field, place) for field in self._fields]

    def examples(self, record: Record, encoded: list[np.ndarray]) -> Sequence[Example]:
        if self.asked and self._absent and str(record.get(self._label)).strip() in self._absent:
            self.note("unlabelled")
            return LEFT_OUT
        for _ in range(sum(not record[field].strip() for field in self._fields)):
            self.note("blank")
        return super().examples(record, encoded)

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        told = np.array(self.labels(record)) if self.asked else np.zeros(1)
        return self.framed(encoded) | {"label": told}

    def framed(self, encoded: Sequence[np.ndarray]) -> Example:
        """One text or two as a model reads them: {"tokens", "token_type_ids"}."""
        vocab = self.tokenizer.vocab
        if len(encoded) == 2:
            room = self.length - 3
            first, second = encoded
            if len(first) + len(second) > room:
                self.note("cut")
            first = first[: max(room - len(second), room - room // 2)]
            return layout.pair(first, second[: room - len(first)], vocab)
        if "cls" in vocab.roles and "sep" in vocab.roles:
            tokens = vocab.add_special_tokens(self.fit(encoded[0], self.length - 2))
        else:
            tokens = np.append(self.fit(encoded[0], self.length - 1), vocab.eos)
        return {"tokens": tokens, "token_type_ids": np.zeros(len(tokens), np.uint8)}

    def labels(self, record: Record) -> Sequence[float]:
        """What a record says is to be told: one number here."""
        if self._label not in record:
            raise UserError(f"there is no field {self._label!r} for the label; {readers.nearest(self._label, record)}")
        return [self.number(record[self._label])]

    def without_decimals(self, value: Any) -> Any:
        """A label as a whole number where it is one written as 1.0, which is noted; else as it is."""
        if not isinstance(value, float) or not value.is_integer():
            return value
        self.note("decimal")
        return int(value)

    def number(self, value: Any) -> float:
        """A label as a number."""
        raise NotImplementedError(type(self).__name__)


class LabeledTexts(TextRecords):
    """Texts with a class: {"tokens", "label"}, and "token_type_ids" of a pair.

    classes: their names, in the order that the labels count; those found in the records if empty. A record's label is a
    class's name or its number. Labels that are none of the classes are counted, and then a UserError names the first.
    """

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, fields: TextFields = TextFields(), *,
        classes: Sequence[str] = (), asked: bool = True,
    ) -> None:  # fmt: skip
        self._known = ClassNumbering(classes)
        self._unknown = ""
        super().__init__(paths, tokenizer, length, fields, asked=asked)
        check_known_classes("label", "record", self._unknown, self._tally["unknown"], self._first, classes)
        self.classes, self._number = self._known.names, self._known.final

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        return counted(self.classes, self._number[self._columns["label"].some(indices)]) if self.asked else {}

    @property
    def notes(self) -> Sequence[str]:
        return [*super().notes, *empty("class", self.paths, self.class_counts(np.arange(len(self))))]

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        label = example.pop("label")[0]
        return {"label": self._number[label] if self.asked else label} | example

    def number(self, value: Any) -> int:
        """The number of a label, as it stands in the columns (names found on the way are numbered as they come)."""
        value = self.without_decimals(value)
        name = value.strip() if isinstance(value, str) else json.dumps(value)
        if not isinstance(value, (str, int)):
            cure = "train `regress` on numbers" if isinstance(value, float) else "write one"
            raise UserError(
                f"the label is {name}, and a name or a whole number is wanted: {cure}, or remove the record"
            )
        if not name:
            raise UserError(
                "the label is empty, and a name or a whole number is wanted: write one, or remove the record"
            )
        if isinstance(value, str) and name != value:
            self.note("trimmed")
        found = self._known.number(value if type(value) is int else name)
        if found is None:
            self._unknown = self._unknown or name
            self.note("unknown")
        return found or 0


class UnlabeledTexts(LabeledTexts):
    """Texts whose class nobody told: {"tokens", "label": IGNORE}. Plain text has one a line."""

    reader: ClassVar[tables.Reader | None] = staticmethod(tables.lines)

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        return {}

    @property
    def counts(self) -> Mapping[str, int]:
        return {"unlabelled" if name == "examples" else name: n for name, n in super().counts.items()}

    def __getitem__(self, index: int) -> Example:
        return super().__getitem__(index) | {"label": np.int64(IGNORE)}


class ScoredTexts(TextRecords):
    """Texts with a number: {"tokens", "score"}, and "token_type_ids" of a pair."""

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "token_type_ids": np.uint8, "label": np.float64}

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        return {"score": float(example.pop("label")[0])} | example

    @property
    def scores(self) -> np.ndarray:
        """All the numbers: (n,)."""
        return self._columns["label"].whole

    def number(self, value: Any) -> float:
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise UserError(f"the field {self._label!r} holds {value!r}, and a number is wanted")
        return found


class MultipleChoiceRecords(TextRecords):
    """Questions with options, one of them right: {"options": rows of {"tokens", "token_type_ids"}, "label": its place}.

    A record's label is an option's place from 0, or the option itself.
    """

    columns: ClassVar[dict[str, type]] = {
        "tokens": np.int32, "token_type_ids": np.uint8, "lengths": np.int32, "label": np.int32,
    }  # fmt: skip

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, fields: OptionFields = OptionFields(), *,
        asked: bool = True,
    ) -> None:  # fmt: skip
        self._options, self._begin = fields.option_fields, fields.option_prefix_field
        texts = TextFields(fields.text_field, fields.label_field, column_names=fields.column_names)
        super().__init__(paths, tokenizer, length, texts, asked=asked)
        self.most = max(len(self._columns["lengths"][i]) for i in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        example = Records.__getitem__(self, index)
        cuts = np.cumsum(example["lengths"])[:-1]
        rows = zip(np.split(example["tokens"], cuts), np.split(example["token_type_ids"], cuts), strict=True)
        return {
            "options": [{"tokens": tokens, "token_type_ids": segments} for tokens, segments in rows],
            "label": int(example["label"][0]),
        }

    def offered(self, record: Record) -> list[str]:
        """The options of a record, as they are written."""
        found = [record.get(name) for name in self._options]
        listed = found[0] if len(found) == 1 else found
        if not isinstance(listed, list) or len(listed) < 2 or not all(isinstance(option, str) for option in listed):
            raise UserError(f"the options ({', '.join(self._options)}) are no list of two texts or more")
        return listed

    def texts(self, record: Record, place: str) -> list[str]:
        begin = readers.text_field(record, self._begin, place) + " " if self._begin else ""
        return [*super().texts(record, place), *(begin + option for option in self.offered(record))]

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        text, *options = encoded
        rows = [self.framed([text, option]) for option in options]
        told = self.right(record, self.offered(record)) if self.asked else 0
        return {
            "tokens": np.concatenate([row["tokens"] for row in rows]),
            "token_type_ids": np.concatenate([row["token_type_ids"] for row in rows]),
            "lengths": np.array([len(row["tokens"]) for row in rows]),
            "label": np.array([told]),
        }

    def right(self, record: Record, options: list[str]) -> int:
        """The place of the right option."""
        value = self.without_decimals(record.get(self._label))
        if isinstance(value, str) and value in options:
            return options.index(value)
        place = int(str(value)) if str(value).isdecimal() else -1
        if not 0 <= place < len(options):
            raise UserError(f"the label {value!r} is neither one of the {len(options)} options nor the place of one")
        return place


class TaggedSentences(Records):
    """Sentences with a tag for each word: {"tokens", "tags"}, a tag's number at the first token of its word, IGNORE elsewhere.

    classes: the names of the tags, as of `Labelled`. The words are joined by blanks and framed by [CLS] and [SEP] where the
    tokenizer has these; a word of which no token is left is not asked. Text files are read as CoNLL's columns. Names may be
    marked in any scheme of `firth.data.tags`, and those that begin with I are read as beginning with B.
    keep: remember the words and tags as they are written.
    """

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "tags": np.int32, "words": np.int32}
    reader: ClassVar[tables.Reader | None] = staticmethod(tables.sentences)

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, fields: TagFields = TagFields(), *,
        classes: Sequence[str] = (), asked: bool = True, keep: bool = False,
    ) -> None:  # fmt: skip
        self._words, self._tags = fields.words_field, fields.tags_field
        self._known, self._unknown, self.asked = ClassNumbering(classes), "", asked
        self.written: list[tuple[list[str], list[str]]] | None = [] if keep else None
        super().__init__(paths, tokenizer, length, names=fields.column_names)
        check_known_classes("tag", "tag", self._unknown, self._tally["unknown"], self._first, classes)
        self.classes, self._number = self._known.names, self._known.final
        if asked and not classes:
            check_scheme(self.classes)

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        tags = self._columns["tags"].some(indices)
        return counted(self.classes, self._number[tags[tags != IGNORE]]) if self.asked else {}

    @property
    def notes(self) -> Sequence[str]:
        return [*super().notes, *empty("tag", self.paths, self.class_counts(np.arange(len(self))))]

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        asked = example["tags"] != IGNORE
        tags = np.full(len(asked), IGNORE)
        tags[asked] = self._number[example["tags"][asked]] if self.asked else 0
        return {"tokens": example["tokens"], "tags": tags}

    def group(self, record: Record) -> str:
        return " ".join(record[self._words])

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        words = record.get(self._words)
        names = record.get(self._tags) if self.asked else words
        if not isinstance(words, list) or not isinstance(names, list) or len(words) != len(names):
            raise UserError(f"a tagged sentence needs as many {self._words!r} as {self._tags!r}, in two lists")
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"the field {self._words!r} holds words that are no text")
        names = self._named(names) if self.asked else []
        numbers = self._numbers(names) if self.asked else np.zeros(len(words), np.int64)
        if self.written is not None:
            self.written.append((words, names))
        tokens, spans = self.tokenizer.spans(" ".join(words))
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        word = ends.searchsorted(spans[:, 1])  # a token may begin with the blank before its word, never with one behind
        first = np.flatnonzero(np.diff(word, prepend=-1))
        tags = np.full(len(tokens), IGNORE)
        tags[first] = numbers[word[first]]
        vocab = self.tokenizer.vocab
        if "cls" in vocab.roles and "sep" in vocab.roles:
            tokens = vocab.add_special_tokens(self.fit(tokens, self.length - 2))
            tags = np.concatenate(([IGNORE], tags[: self.length - 2], [IGNORE]))
        tokens, tags = self.fit(tokens, self.length), tags[: self.length]
        asked = int((tags != IGNORE).sum())
        return {"tokens": tokens, "tags": tags, "words": word[first][:asked]} if asked else None

    def words(self, index: int) -> np.ndarray:
        """Which word of its sentence each tag that is asked belongs to."""
        return self._columns["words"][index]

    def _named(self, tags: list[Any]) -> list[str]:
        """A sentence's tags by their names, where they are numbers of the classes that are told."""
        if all(isinstance(tag, str) for tag in tags):
            return tags
        bad = next(tag for tag in tags if not isinstance(tag, str))
        if self._known.open:
            raise UserError(
                f"the field {self._tags!r} holds {bad!r}, and names of tags are wanted: write them, or say what the numbers "
                "mean by objective.class_names=[O, B-..., I-...]"
            )
        numbers = [self._known.number(tag) if type(tag) is int else None for tag in tags]
        if None in numbers:
            raise UserError(
                f"the field {self._tags!r} holds {bad!r}, which is none of the {len(self._known.names)} tags"
            )
        return [self._known.names[number or 0] for number in numbers]

    def _numbers(self, names: list[str]) -> np.ndarray:
        """The numbers of a sentence's tags; those that are unknown are noted."""
        told = to_bio2(names) if has_spans(names) else names
        if told != names:
            self.note("begun")
        numbers = [self._known.number(name) for name in told]
        for name in (name for name, number in zip(told, numbers, strict=True) if number is None):
            self._unknown = self._unknown or name
            self.note("unknown")
        return np.array([number or 0 for number in numbers], np.int64)


def check_known_classes(
    what: str, of: str, name: str, count: int, first: Mapping[str, str], classes: Sequence[str]
) -> None:
    """Raise a UserError if a name is none of the classes: it names the first, and says how many more there are."""
    if count:
        more = f", nor {'is that' if count == 2 else 'are those'} of {count - 1:,} more {of}{'s' if count > 2 else ''}"
        raise UserError(
            f"{first['unknown']}: the {what} {name} is none of the classes ({', '.join(classes)}){more if count > 1 else ''}; "
            "mend or remove it, or train with objective.class_names that name it"
        )


def counted(classes: Sequence[str], labels: np.ndarray) -> Mapping[str, int]:
    """How many labels of each class there are."""
    return dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))


def empty(what: str, paths: Sequence[str], found: Mapping[str, int]) -> list[str]:
    """A sentence on the classes of which there is nothing; none if there is something of each."""
    none = [repr(name) for name, n in found.items() if not n]
    noun = {"class": "classes", "tag": "tags"}[what] if len(none) > 1 else what
    return [f"no record of {', '.join(paths)} has the {noun} {', '.join(none)}"] if none else []
