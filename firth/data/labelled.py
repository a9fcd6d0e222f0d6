"""Examples from records that have a label: a class, a number, a tag for each word, the right one of several options.

    {"text": "a fine film", "label": "good"}                                Labelled    {"tokens", "label"}
    {"text": "a man sings", "other": "a man is singing", "label": 4.6}      Scored      {"tokens", "segments", "score"}
    {"text": "She opens", "options": ["the door", "the sea"], "label": 0}   Chosen      {"options", "label"}
    {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}                   Tagged      {"tokens", "tags"}

All of them read JSONL, Parquet and tables (`firth.text.tables`), and are framed as [CLS] text [SEP] or [CLS] text [SEP]
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

from firth.data import layout
from firth.data.records import Record, Records
from firth.data.tags import begun, marked
from firth.text import read, tables
from firth.text.tokenizer import Tokenizer
from firth.types import IGNORE, Example, UserError


@dataclass(frozen=True)
class Fields:
    """What the fields of the records are called. columns: names of all of them, for a table without a head."""

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Self:
        """As a run's recipe calls them; the usual names where it says nothing."""
        return cls(*(told.get(field.name, field.default) for field in dataclasses.fields(cls)))


@dataclass(frozen=True)
class TextFields(Fields):
    """text: of the text; label: of what is told of it; pair: of a second text, if there is one."""

    text: str = "text"
    label: str = "label"
    pair: str = ""
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptionFields(Fields):
    """options: of their list, or a field for each. begin: of a text that every option begins with (SWAG's sent2). label: of
    the right option's place, or of the option itself."""

    text: str = "text"
    label: str = "label"
    options: tuple[str, ...] = ("options",)
    begin: str = ""
    columns: tuple[str, ...] = ()


@dataclass(frozen=True)
class TagFields(Fields):
    """words, tags: of their lists, or two of CoNLL's `columns`."""

    words: str = "tokens"
    tags: str = "tags"
    columns: tuple[str, ...] = ()


class Texts(Records):
    """Texts, or pairs of them, with something to be told of each. Of two texts that are too long together, the longer one
    is cut."""

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "segments": np.uint8, "label": np.int32}

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, fields: TextFields = TextFields(), *,
        asked: bool = True,
    ) -> None:  # fmt: skip
        self._fields, self._label = [fields.text, fields.pair] if fields.pair else [fields.text], fields.label
        self.asked = asked
        super().__init__(paths, tokenizer, length, names=fields.columns)

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        return {name: field for name, field in example.items() if name != "segments" or len(self._fields) > 1}

    def texts(self, record: Record, place: str) -> list[str]:
        return [read.text_field(record, field, place) for field in self._fields]

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        told = np.array(self.labels(record)) if self.asked else np.zeros(1)
        return self.framed(encoded) | {"label": told}

    def framed(self, encoded: Sequence[np.ndarray]) -> Example:
        """One text or two as a model reads them: {"tokens", "segments"}."""
        vocab = self.tokenizer.vocab
        if len(encoded) == 2:
            room = self.length - 3
            first, second = encoded
            if len(first) + len(second) > room:
                self.note("cut")
            first = first[: max(room - len(second), room - room // 2)]
            return layout.pair(first, second[: room - len(first)], vocab)
        if "cls" in vocab.roles and "sep" in vocab.roles:
            tokens = vocab.frame(self.fit(encoded[0], self.length - 2))
        else:
            tokens = np.append(self.fit(encoded[0], self.length - 1), vocab.eos)
        return {"tokens": tokens, "segments": np.zeros(len(tokens), np.uint8)}

    def labels(self, record: Record) -> Sequence[float]:
        """What a record says is to be told: one number here."""
        if self._label not in record:
            raise UserError(f"there is no field {self._label!r} for the label; it has {', '.join(record) or 'none'}")
        return [self.number(record[self._label])]

    def number(self, value: Any) -> float:
        """A label as a number."""
        raise NotImplementedError(type(self).__name__)


class Labelled(Texts):
    """Texts with a class: {"tokens", "label"}, and "segments" of a pair.

    classes: their names, in the order that the labels count; those found in the records if empty. A record's label is a
    class's name or its number. Labels that are none of the classes are counted, and then a UserError names the first.
    """

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, fields: TextFields = TextFields(), *,
        classes: Sequence[str] = (), asked: bool = True,
    ) -> None:  # fmt: skip
        self._known = {name: i for i, name in enumerate(classes)}
        self._open = not classes
        self._unknown = ""
        super().__init__(paths, tokenizer, length, fields, asked=asked)
        if self._unknown:
            more = self._tally["unknown"] - 1
            raise UserError(
                f"{self._first['unknown']}: the label {self._unknown} is none of the classes ({', '.join(classes)})"
                + (f", nor are those of {more:,} more records" if more else "")
            )
        # Names found on the way are numbered in the order of the alphabet (numbers by size), whatever the file's order.
        found = sorted(self._known, key=_natural) if self._open else list(classes)
        self.classes = tuple(found)
        self._number = np.array([found.index(name) for name in self._known])

    @property
    def per_class(self) -> tuple[int, ...]:
        """How many labels of each class there are."""
        found = np.bincount(self._number[self._columns["label"].whole], minlength=len(self.classes))
        return tuple(found.tolist())

    @property
    def remarks(self) -> Sequence[str]:
        empty = [name for name, n in zip(self.classes, self.per_class, strict=True) if not n] if self.asked else []
        return [*super().remarks, *(f"no record of {', '.join(self.paths)} has the class {name!r}" for name in empty)]

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        label = example.pop("label")[0]
        return {"label": self._number[label] if self.asked else label} | example

    def number(self, value: Any) -> int:
        """The number of a label, as it stands in the columns (names found on the way are numbered as they come)."""
        name = value if isinstance(value, str) else json.dumps(value)
        if name not in self._known:
            if type(value) is int and not self._open and 0 <= value < len(self._known):
                return value
            if not name or not isinstance(value, (str, int)):
                raise UserError(f"the label is {name or 'empty'}, and a name or a whole number is wanted")
            if not self._open:
                self._unknown = self._unknown or name
                self.note("unknown")
                return 0
            self._known[name] = len(self._known)
        return self._known[name]


class Untold(Labelled):
    """Texts whose class nobody told: {"tokens", "label": IGNORE}. Plain text has one a line."""

    reader: ClassVar[tables.Reader | None] = staticmethod(tables.lines)

    @property
    def counts(self) -> Mapping[str, int]:
        return {"unlabelled" if name == "examples" else name: n for name, n in super().counts.items()}

    def __getitem__(self, index: int) -> Example:
        return super().__getitem__(index) | {"label": np.int64(IGNORE)}


class Scored(Texts):
    """Texts with a number: {"tokens", "score"}, and "segments" of a pair."""

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "segments": np.uint8, "label": np.float64}

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


class Chosen(Texts):
    """Questions with options, one of them right: {"options": rows of {"tokens", "segments"}, "label": its place}.

    A record's label is an option's place from 0, or the option itself.
    """

    columns: ClassVar[dict[str, type]] = {
        "tokens": np.int32, "segments": np.uint8, "lengths": np.int32, "label": np.int32,
    }  # fmt: skip

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, fields: OptionFields = OptionFields(), *,
        asked: bool = True,
    ) -> None:  # fmt: skip
        self._options, self._begin = fields.options, fields.begin
        texts = TextFields(fields.text, fields.label, columns=fields.columns)
        super().__init__(paths, tokenizer, length, texts, asked=asked)
        self.most = max(len(self._columns["lengths"][i]) for i in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        example = Records.__getitem__(self, index)
        cuts = np.cumsum(example["lengths"])[:-1]
        rows = zip(np.split(example["tokens"], cuts), np.split(example["segments"], cuts), strict=True)
        return {
            "options": [{"tokens": tokens, "segments": segments} for tokens, segments in rows],
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
        begin = read.text_field(record, self._begin, place) + " " if self._begin else ""
        return [*super().texts(record, place), *(begin + option for option in self.offered(record))]

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        text, *options = encoded
        rows = [self.framed([text, option]) for option in options]
        told = self.right(record, self.offered(record)) if self.asked else 0
        return {
            "tokens": np.concatenate([row["tokens"] for row in rows]),
            "segments": np.concatenate([row["segments"] for row in rows]),
            "lengths": np.array([len(row["tokens"]) for row in rows]),
            "label": np.array([told]),
        }

    def right(self, record: Record, options: list[str]) -> int:
        """The place of the right option."""
        value = record.get(self._label)
        if isinstance(value, str) and value in options:
            return options.index(value)
        place = int(str(value)) if str(value).isdecimal() else -1
        if not 0 <= place < len(options):
            raise UserError(f"the label {value!r} is neither one of the {len(options)} options nor the place of one")
        return place


class Tagged(Records):
    """Sentences with a tag for each word: {"tokens", "tags"}, a tag's number at the first token of its word, IGNORE elsewhere.

    classes: the names of the tags, as of `Labelled`. The words are joined by blanks and framed by [CLS] and [SEP] where the
    tokenizer has these; a word of which no token is left is not asked. Text files are read as CoNLL's columns, and IOB1 as
    BIO. keep: remember the words and tags as they are written.
    """

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "tags": np.int32, "words": np.int32}
    reader: ClassVar[tables.Reader | None] = staticmethod(tables.sentences)

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, fields: TagFields = TagFields(), *,
        classes: Sequence[str] = (), asked: bool = True, keep: bool = False,
    ) -> None:  # fmt: skip
        self._words, self._tags = fields.words, fields.tags
        self._known = {name: i for i, name in enumerate(classes)}
        self._open, self.asked = not classes, asked
        self.written: list[tuple[list[str], list[str]]] | None = [] if keep else None
        super().__init__(paths, tokenizer, length, names=fields.columns)
        found = sorted(self._known) if self._open else list(classes)
        self.classes = tuple(found)
        self._number = np.array([found.index(name) for name in self._known], np.int64)

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        asked = example["tags"] != IGNORE
        tags = np.full(len(asked), IGNORE)
        tags[asked] = self._number[example["tags"][asked]] if self.asked else 0
        return {"tokens": example["tokens"], "tags": tags}

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        words = record.get(self._words)
        names = record.get(self._tags) if self.asked else words
        if not isinstance(words, list) or not isinstance(names, list) or len(words) != len(names):
            raise UserError(f"a tagged sentence needs as many {self._words!r} as {self._tags!r}, in two lists")
        numbers = self._numbers(names) if self.asked else np.zeros(len(words), np.int64)
        if self.written is not None:
            self.written.append((words, names if self.asked else []))
        tokens, spans = self.tokenizer.spans(" ".join(words))
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        word = ends.searchsorted(spans[:, 1])  # a token may begin with the blank before its word, never with one behind
        first = np.flatnonzero(np.diff(word, prepend=-1))
        tags = np.full(len(tokens), IGNORE)
        tags[first] = numbers[word[first]]
        vocab = self.tokenizer.vocab
        if "cls" in vocab.roles and "sep" in vocab.roles:
            tokens = vocab.frame(self.fit(tokens, self.length - 2))
            tags = np.concatenate(([IGNORE], tags[: self.length - 2], [IGNORE]))
        tokens, tags = self.fit(tokens, self.length), tags[: self.length]
        asked = int((tags != IGNORE).sum())
        return {"tokens": tokens, "tags": tags, "words": word[first][:asked]} if asked else None

    def words(self, index: int) -> np.ndarray:
        """Which word of its sentence each tag that is asked belongs to."""
        return self._columns["words"][index]

    def _numbers(self, names: list[str]) -> np.ndarray:
        """The numbers of a sentence's tags; UserError with the first that is unknown."""
        told = begun(names) if marked(names) else names
        if told != names:
            self.note("begun")
        for name in told:
            if name not in self._known and not self._open:
                raise UserError(f"the tag {name!r} is none of the {len(self._known)} known ones")
            self._known.setdefault(name, len(self._known))
        return np.array([self._known[name] for name in told], np.int64)


def _natural(name: str) -> tuple[bool, int, str]:
    """Whole numbers by size, then names by alphabet."""
    number = name.removeprefix("-").isdecimal()
    return (not number, int(name) if number else 0, name)
