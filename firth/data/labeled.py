"""Examples from labeled records: a class, a number, a tag per word, or the right one of several options.

    {"text": "a fine film", "label": "good"}                                LabeledTexts            {"tokens", "label"}
    {"text": "a man sings", "other": "a man is singing", "label": 4.6}      ScoredTexts             {"tokens", "token_type_ids",
                                                                                                     "score"}
    {"text": "She opens", "options": ["the door", "the sea"], "label": 0}   MultipleChoiceRecords   {"options", "label"}
    {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}                   TaggedSentences         {"tokens", "tags"}

All of them read JSONL, Parquet and tables (`firth.corpora.tables`). Texts are encoded as [CLS] text [SEP] or [CLS] text [SEP]
other [SEP], for a decoder with its own special tokens. `labeled=False` reads records without labels, for prediction.
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
from firth.data import attention_fields
from firth.data.labels import ClassNumbering, check_scheme, has_spans, to_bio2
from firth.data.records import OMITTED, Record, Records
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import IGNORE, Example, UserError


@dataclass(frozen=True)
class RecordFields:
    """Base class of the names of record fields."""

    @classmethod
    def of(cls, examples: Mapping[str, Any]) -> Self:
        """Return the names in the examples section of a recipe, with defaults for missing ones."""
        return cls(*(examples.get(field.name, field.default) for field in dataclasses.fields(cls)))


@dataclass(frozen=True)
class TextFields(RecordFields):
    """Names of the fields of texts.

    Args:
        text_field: The text.
        label_field: The label.
        text_pair_field: The second text; empty: there is none.
        column_names: All columns, for a table without a header.
        missing_labels: Labels that mean that there is none ("-" in SNLI and MNLI, where the annotators disagree): such records
            are left out and counted.
    """

    text_field: str = "text"
    label_field: str = "label"
    text_pair_field: str = ""
    column_names: tuple[str, ...] = ()
    missing_labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class OptionFields(RecordFields):
    """Names of the fields of questions with options.

    Args:
        text_field: The question.
        label_field: The index of the right option, or the option itself.
        option_fields: The list of options, or one field per option.
        option_prefix_field: A text that every option begins with (SWAG's sent2).
        column_names: All columns, for a table without a header.
    """

    text_field: str = "text"
    label_field: str = "label"
    option_fields: tuple[str, ...] = ("options",)
    option_prefix_field: str = ""
    column_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class TagFields(RecordFields):
    """Names of the fields of tagged sentences.

    Args:
        words_field: The list of words.
        tags_field: The list of tags.
        column_names: The columns of a CoNLL file, two of which are the above.
    """

    words_field: str = "tokens"
    tags_field: str = "tags"
    column_names: tuple[str, ...] = ()


class TextRecords(Records):
    """Labeled texts or pairs of texts. If a pair is too long, the longer text is truncated.

    Args:
        paths: Files, directories or globs.
        tokenizer: The tokenizer.
        length: Maximum number of tokens.
        fields: Names of the fields.
        labeled: Whether the records have labels.
    """

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "token_type_ids": np.uint8, "label": np.int32}

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, fields: TextFields = TextFields(), *,
        labeled: bool = True,
    ) -> None:  # fmt: skip
        self._fields = [fields.text_field, fields.text_pair_field] if fields.text_pair_field else [fields.text_field]
        self._label = fields.label_field
        self.labeled, self._missing_labels = labeled, fields.missing_labels
        super().__init__(paths, tokenizer, length, names=fields.column_names)

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        return {name: field for name, field in example.items() if name != "token_type_ids" or len(self._fields) > 1}

    def group(self, record: Record) -> str:
        return str(record[self._fields[0]])

    def texts(self, record: Record, location: str) -> list[str]:
        return [readers.text_field(record, field, location) for field in self._fields]

    def examples(self, record: Record, encoded: list[np.ndarray]) -> Sequence[Example]:
        if self.labeled and self._missing_labels and str(record.get(self._label)).strip() in self._missing_labels:
            self.note("unlabeled")
            return OMITTED
        for _ in range(sum(not record[field].strip() for field in self._fields)):
            self.note("blank")
        return super().examples(record, encoded)

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        labels = np.array(self.labels(record)) if self.labeled else np.zeros(1)
        return self.with_special_tokens(encoded) | {"label": labels}

    def with_special_tokens(self, encoded: Sequence[np.ndarray]) -> Example:
        """Add special tokens to one text or two: {"tokens", "token_type_ids"}."""
        vocab = self.tokenizer.vocab
        if len(encoded) == 2:
            room = self.length - 3
            first, second = encoded
            if len(first) + len(second) > room:
                self.note("cut")
            first = first[: max(room - len(second), room - room // 2)]
            return attention_fields.pair(first, second[: room - len(first)], vocab)
        if "cls" in vocab.roles and "sep" in vocab.roles:
            tokens = vocab.add_special_tokens(self.fit(encoded[0], self.length - 2))
        else:
            tokens = np.append(self.fit(encoded[0], self.length - 1), vocab.eos)
        return {"tokens": tokens, "token_type_ids": np.zeros(len(tokens), np.uint8)}

    def labels(self, record: Record) -> Sequence[float]:
        """Return the labels of a record; here one number."""
        if self._label not in record:
            raise UserError(f"there is no field {self._label!r} for the label; {readers.nearest(self._label, record)}")
        return [self.number(record[self._label])]

    def without_decimals(self, value: Any) -> Any:
        """Return an integral float label such as 1.0 as an int, and note it; any other label as it is."""
        if not isinstance(value, float) or not value.is_integer():
            return value
        self.note("decimal")
        return int(value)

    def number(self, value: Any) -> float:
        """Return a label as a number."""
        raise NotImplementedError(type(self).__name__)


class LabeledTexts(TextRecords):
    """Texts with a class: {"tokens", "label"}, and "token_type_ids" of a pair.

    A record's label is the name of a class or its number.

    Args:
        paths: Files, directories or globs.
        tokenizer: The tokenizer.
        length: Maximum number of tokens.
        fields: Names of the fields.
        classes: Class names in the order of their numbers; empty: those found in the records.
        labeled: Whether the records have labels.

    Raises:
        UserError: A label is not one of the classes.
    """

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, fields: TextFields = TextFields(), *,
        classes: Sequence[str] = (), labeled: bool = True,
    ) -> None:  # fmt: skip
        self._known = ClassNumbering(classes)
        self._unknown = ""
        super().__init__(paths, tokenizer, length, fields, labeled=labeled)
        check_known_classes("label", "record", self._unknown, self._counts["unknown"], self._first, classes)
        self.classes, self._number = self._known.names, self._known.final

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        return count_per_class(self.classes, self._number[self._columns["label"].some(indices)]) if self.labeled else {}

    @property
    def notes(self) -> Sequence[str]:
        return [*super().notes, *empty_class_notes("class", self.paths, self.class_counts(np.arange(len(self))))]

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        label = example.pop("label")[0]
        return {"label": self._number[label] if self.labeled else label} | example

    def number(self, value: Any) -> int:
        """Return the number of a label, as stored in the columns (collected names are numbered in order of occurrence)."""
        value = self.without_decimals(value)
        name = value.strip() if isinstance(value, str) else json.dumps(value)
        if not isinstance(value, (str, int)):
            advice = "use the recipe `regression` for numbers" if isinstance(value, float) else "write one"
            raise UserError(f"the label is {name} and must be a name or a whole number: {advice}, or remove the record")
        if not name:
            raise UserError("the label is empty and must be a name or a whole number: write one, or remove the record")
        if isinstance(value, str) and name != value:
            self.note("trimmed")
        found = self._known.number(value if type(value) is int else name)
        if found is None:
            self._unknown = self._unknown or name
            self.note("unknown")
        return found or 0


class UnlabeledTexts(LabeledTexts):
    """Texts without a class: {"tokens", "label": IGNORE}. Plain text files have one text per line."""

    reader: ClassVar[tables.Reader | None] = staticmethod(tables.lines)

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        return {}

    @property
    def counts(self) -> Mapping[str, int]:
        return {"unlabeled" if name == "examples" else name: n for name, n in super().counts.items()}

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
        """All scores: (n,)."""
        return self._columns["label"].whole

    def number(self, value: Any) -> float:
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise UserError(f"the field {self._label!r} is {value!r} and must be a number")
        return found


class MultipleChoiceRecords(TextRecords):
    """Questions with options, one of them right: {"options": rows of {"tokens", "token_type_ids"}, "label": index of the right one}.

    A record's label is the index of an option from 0, or the option itself.

    Args:
        paths: Files, directories or globs.
        tokenizer: The tokenizer.
        length: Maximum number of tokens of question and option.
        fields: Names of the fields.
        labeled: Whether the records have labels.

    Attributes:
        most: Maximum number of options of a record.
    """

    columns: ClassVar[dict[str, type]] = {
        "tokens": np.int32, "token_type_ids": np.uint8, "lengths": np.int32, "label": np.int32,
    }  # fmt: skip

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, fields: OptionFields = OptionFields(), *,
        labeled: bool = True,
    ) -> None:  # fmt: skip
        self._options, self._option_prefix = fields.option_fields, fields.option_prefix_field
        texts = TextFields(fields.text_field, fields.label_field, column_names=fields.column_names)
        super().__init__(paths, tokenizer, length, texts, labeled=labeled)
        self.most = max(len(self._columns["lengths"][i]) for i in range(len(self)))

    def __getitem__(self, index: int) -> Example:
        example = Records.__getitem__(self, index)
        cuts = np.cumsum(example["lengths"])[:-1]
        rows = zip(np.split(example["tokens"], cuts), np.split(example["token_type_ids"], cuts), strict=True)
        return {
            "options": [{"tokens": tokens, "token_type_ids": token_types} for tokens, token_types in rows],
            "label": int(example["label"][0]),
        }

    def options_of(self, record: Record) -> list[str]:
        """Return the options of a record as written."""
        found = [record.get(name) for name in self._options]
        options = found[0] if len(found) == 1 else found
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) for option in options):
            raise UserError(f"the options ({', '.join(self._options)}) must be a list of two texts or more")
        return options

    def texts(self, record: Record, location: str) -> list[str]:
        prefix = readers.text_field(record, self._option_prefix, location) + " " if self._option_prefix else ""
        return [*super().texts(record, location), *(prefix + option for option in self.options_of(record))]

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        text, *options = encoded
        rows = [self.with_special_tokens([text, option]) for option in options]
        label = self.right_index(record, self.options_of(record)) if self.labeled else 0
        return {
            "tokens": np.concatenate([row["tokens"] for row in rows]),
            "token_type_ids": np.concatenate([row["token_type_ids"] for row in rows]),
            "lengths": np.array([len(row["tokens"]) for row in rows]),
            "label": np.array([label]),
        }

    def right_index(self, record: Record, options: list[str]) -> int:
        """Return the index of the right option."""
        value = self.without_decimals(record.get(self._label))
        if isinstance(value, str) and value in options:
            return options.index(value)
        option_index = int(str(value)) if str(value).isdecimal() else -1
        if not 0 <= option_index < len(options):
            raise UserError(f"the label {value!r} is neither one of the {len(options)} options nor the index of one")
        return option_index


class TaggedSentences(Records):
    """Sentences with a tag per word: {"tokens", "tags"}, with a tag's number at the first token of its word, IGNORE elsewhere.

    The words are joined by spaces and enclosed in [CLS] and [SEP] where the tokenizer has them. A word that is truncated has no
    label. Text files are read as CoNLL columns. Entities may be tagged in any scheme of `firth.data.labels`; those that begin with I
    are read as beginning with B.

    Args:
        paths: Files, directories or globs.
        tokenizer: The tokenizer.
        length: Maximum number of tokens.
        fields: Names of the fields.
        classes: Names of the tags in the order of their numbers; empty: those found in the records.
        labeled: Whether the records have tags.
        keep: Whether to keep the words and tags as written.

    Raises:
        UserError: A tag is not one of the classes, or the scheme is not supported.
    """

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "tags": np.int32, "words": np.int32}
    reader: ClassVar[tables.Reader | None] = staticmethod(tables.sentences)

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, fields: TagFields = TagFields(), *,
        classes: Sequence[str] = (), labeled: bool = True, keep: bool = False,
    ) -> None:  # fmt: skip
        self._words_field, self._tags_field = fields.words_field, fields.tags_field
        self._known, self._unknown, self.labeled = ClassNumbering(classes), "", labeled
        self.written: list[tuple[list[str], list[str]]] | None = [] if keep else None
        super().__init__(paths, tokenizer, length, names=fields.column_names)
        check_known_classes("tag", "tag", self._unknown, self._counts["unknown"], self._first, classes)
        self.classes, self._number = self._known.names, self._known.final
        if labeled and not classes:
            check_scheme(self.classes)

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        tags = self._columns["tags"].some(indices)
        return count_per_class(self.classes, self._number[tags[tags != IGNORE]]) if self.labeled else {}

    @property
    def notes(self) -> Sequence[str]:
        return [*super().notes, *empty_class_notes("tag", self.paths, self.class_counts(np.arange(len(self))))]

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        has_label = example["tags"] != IGNORE
        tags = np.full(len(has_label), IGNORE)
        tags[has_label] = self._number[example["tags"][has_label]] if self.labeled else 0
        return {"tokens": example["tokens"], "tags": tags}

    def group(self, record: Record) -> str:
        return " ".join(record[self._words_field])

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        words = record.get(self._words_field)
        names = record.get(self._tags_field) if self.labeled else words
        if not isinstance(words, list) or not isinstance(names, list) or len(words) != len(names):
            raise UserError(
                f"a tagged sentence needs lists {self._words_field!r} and {self._tags_field!r} of the same length"
            )
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"the field {self._words_field!r} holds words that are not text")
        names = self._tag_names(names) if self.labeled else []
        numbers = self._tag_numbers(names) if self.labeled else np.zeros(len(words), np.int64)
        if self.written is not None:
            self.written.append((words, names))
        tokens, spans = self.tokenizer.spans(" ".join(words))
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        word = ends.searchsorted(spans[:, 1])  # a token may begin with the space before its word, never end with one
        first = np.flatnonzero(np.diff(word, prepend=-1))
        tags = np.full(len(tokens), IGNORE)
        tags[first] = numbers[word[first]]
        vocab = self.tokenizer.vocab
        if "cls" in vocab.roles and "sep" in vocab.roles:
            tokens = vocab.add_special_tokens(self.fit(tokens, self.length - 2))
            tags = np.concatenate(([IGNORE], tags[: self.length - 2], [IGNORE]))
        tokens, tags = self.fit(tokens, self.length), tags[: self.length]
        num_labels = int((tags != IGNORE).sum())
        return {"tokens": tokens, "tags": tags, "words": word[first][:num_labels]} if num_labels else None

    def words(self, index: int) -> np.ndarray:
        """Return the index of the word of each labeled token, within its sentence."""
        return self._columns["words"][index]

    def _tag_names(self, tags: list[Any]) -> list[str]:
        """Return a sentence's tags as names, where they may be numbers of given classes."""
        if all(isinstance(tag, str) for tag in tags):
            return tags
        bad = next(tag for tag in tags if not isinstance(tag, str))
        if self._known.open:
            raise UserError(
                f"the field {self._tags_field!r} holds {bad!r} instead of the name of a tag: write names, or name the numbers with "
                "objective.class_names=[O, B-..., I-...]"
            )
        numbers = [self._known.number(tag) if type(tag) is int else None for tag in tags]
        if None in numbers:
            raise UserError(
                f"the field {self._tags_field!r} holds {bad!r}, which is not one of the {len(self._known.names)} tags"
            )
        return [self._known.names[number or 0] for number in numbers]

    def _tag_numbers(self, names: list[str]) -> np.ndarray:
        """Return the numbers of a sentence's tags, and note unknown ones."""
        converted = to_bio2(names) if has_spans(names) else names
        if converted != names:
            self.note("begun")
        numbers = [self._known.number(name) for name in converted]
        for name in (name for name, number in zip(converted, numbers, strict=True) if number is None):
            self._unknown = self._unknown or name
            self.note("unknown")
        return np.array([number or 0 for number in numbers], np.int64)


def check_known_classes(
    what: str, of: str, name: str, count: int, first: Mapping[str, str], classes: Sequence[str]
) -> None:
    """Raise UserError for labels that are not one of the classes: it names the first and counts the others."""
    if count:
        rest = count - 1
        others = f"; {rest:,} more {of}{'s have' if rest > 1 else ' has'} the same problem" if rest else ""
        raise UserError(
            f"{first['unknown']}: the {what} {name} is none of the classes ({', '.join(classes)}){others}; correct or remove it, "
            "or add it to objective.class_names"
        )


def count_per_class(classes: Sequence[str], labels: np.ndarray) -> Mapping[str, int]:
    """Return the number of labels of each class."""
    return dict(zip(classes, np.bincount(labels, minlength=len(classes)).tolist(), strict=True))


def empty_class_notes(what: str, paths: Sequence[str], found: Mapping[str, int]) -> list[str]:
    """Return a sentence on the classes without a record, [] if there are none."""
    empty_names = [repr(name) for name, n in found.items() if not n]
    plural = {"class": "classes", "tag": "tags"}[what] if len(empty_names) > 1 else what
    return [f"no record of {', '.join(paths)} has the {plural} {', '.join(empty_names)}"] if empty_names else []
