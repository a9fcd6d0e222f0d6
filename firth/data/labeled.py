"""Examples from labeled records: a class, a number, a tag per word, or the right one of several options.

    {"text": "a fine film", "label": "good"}                                LabeledConfig           {"tokens", "label"}
    {"text": "a man sings", "other": "a man is singing", "label": 4.6}      ScoredConfig            {"tokens", "token_type_ids",
                                                                                                     "score"}
    {"text": "She opens", "options": ["the door", "the sea"], "label": 0}   MultipleChoiceConfig    {"options", "label"}
    {"tokens": ["EU", "rejects"], "tags": ["B-ORG", "O"]}                   TaggedConfig            {"tokens", "tags"}

All of them read JSONL, Parquet and tables (`firth.corpora.tables`); the recipe names the fields, and `column_names` the columns of a
table without a header. Texts are encoded as [CLS] text [SEP] or [CLS] text [SEP] other [SEP], for a decoder with its own special
tokens. For prediction, records need no labels.

    firth train classification init_from=runs/bert data=mine.csv examples.text_field=review examples.label_field=stars
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from firth.corpora import readers, tables
from firth.corpora.input_files import ReadStats
from firth.data import attention_fields
from firth.data.examples import BuildContext, held_out
from firth.data.labels import check_scheme, has_spans, to_bio2
from firth.data.records import OMITTED, Record, Records, RecordsConfig
from firth.data.source import Source, UnlabeledSource
from firth.types import IGNORE, DataStats, Example, UserError


@dataclass(frozen=True)
class NamedFieldsConfig(RecordsConfig):
    """Base class of records whose texts are in fields that the recipe names.

    Attributes:
        text_reader: Function that reads a text file as records; None: text files are not supported.
    """

    text_reader: ClassVar[tables.Reader | None] = None

    @property
    def max_tokens(self) -> int:
        return self.max_length

    @property
    def read_fields(self) -> tuple[str, ...]:
        """The fields of a record that hold a text or a list of texts."""
        raise NotImplementedError(type(self).__name__)

    @property
    def table_columns(self) -> tuple[str, ...]:
        """The column names of a table without a header."""
        return ()

    @property
    def tokenizer_settings(self) -> tuple[Any, ...]:
        return (self.read_fields, self.table_columns)

    def read(self, paths: Sequence[str], counts: ReadStats, labeled: bool = True) -> Iterator[tuple[str, Record]]:
        return readers.records(paths, counts=counts, columns=self.table_columns, text=type(self).text_reader)

    def tokenizer_texts_of(self, record: Record) -> list[str]:
        values = ((field, record.get(field)) for field in self.read_fields)
        return [
            " ".join(map(str, value)) if isinstance(value, list) else readers.text_field(record, field)
            for field, value in values
        ]

    def group(self, record: Record) -> str:
        return str(record[self.read_fields[0]])


@dataclass(frozen=True)
class TextsConfig(NamedFieldsConfig):
    """Base class of texts or pairs of texts with labels. If a pair is too long, the longer text is truncated."""

    columns: ClassVar[Mapping[str, type]] = {"tokens": np.int32, "token_type_ids": np.uint8, "label": np.int32}

    @property
    def encoded_fields(self) -> tuple[str, ...]:
        """The fields that hold the text or the pair of texts."""
        return self.read_fields

    def texts(self, record: Record, labeled: bool = True) -> list[str]:
        return [readers.text_field(record, field) for field in self.encoded_fields]

    def examples(self, record: Record, encoded: list[np.ndarray], records: Records) -> Sequence[Example]:
        for _ in range(sum(not record[field].strip() for field in self.encoded_fields)):
            records.note("blank")
        return super().examples(record, encoded, records)

    def example(self, record: Record, encoded: list[np.ndarray], records: Records) -> Example | None:
        labels = np.array(self.labels(record, records)) if records.labeled else np.zeros(1)
        return self.with_special_tokens(encoded, records) | {"label": labels}

    def labels(self, record: Record, records: Records) -> Sequence[float]:
        """Return the labels of a record."""
        raise NotImplementedError(type(self).__name__)

    def with_special_tokens(self, encoded: Sequence[np.ndarray], records: Records) -> Example:
        """Add special tokens to one text or two: {"tokens", "token_type_ids"}."""
        vocab = records.tokenizer.vocab
        if len(encoded) == 2:
            room = self.max_length - 3
            first, second = encoded
            if len(first) + len(second) > room:
                records.note("cut")
            first = first[: max(room - len(second), room - room // 2)]
            return attention_fields.pair(first, second[: room - len(first)], vocab)
        if "cls" in vocab.roles and "sep" in vocab.roles:
            tokens = vocab.add_special_tokens(records.fit(encoded[0], self.max_length - 2))
        else:
            tokens = np.append(records.fit(encoded[0], self.max_length - 1), vocab.eos)
        return {"tokens": tokens, "token_type_ids": np.zeros(len(tokens), np.uint8)}


@dataclass(frozen=True)
class LabeledTextsConfig(TextsConfig):
    """Base class of texts or pairs of texts with one label.

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

    @property
    def fields(self) -> frozenset[str]:
        return self.base_fields | {"token_type_ids"} if self.text_pair_field else self.base_fields

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.text_field, self.text_pair_field) if self.text_pair_field else (self.text_field,)

    @property
    def table_columns(self) -> tuple[str, ...]:
        return self.column_names

    def examples(self, record: Record, encoded: list[np.ndarray], records: Records) -> Sequence[Example]:
        missing = self.missing_labels if records.labeled else ()
        if missing and str(record.get(self.label_field)).strip() in missing:
            records.note("unlabeled")
            return OMITTED
        return super().examples(record, encoded, records)

    def labels(self, record: Record, records: Records) -> Sequence[float]:
        if self.label_field not in record:
            raise UserError(
                f"there is no field {self.label_field!r} for the label; {readers.nearest(self.label_field, record)}"
            )
        return [self.number(record[self.label_field], records)]

    def number(self, value: Any, records: Records) -> float:
        """Return a label as a number."""
        raise NotImplementedError(type(self).__name__)

    def to_example(self, arrays: Example, records: Records) -> Example:
        return {name: array for name, array in arrays.items() if name != "token_type_ids" or self.text_pair_field}


@dataclass(frozen=True)
class LabeledConfig(LabeledTextsConfig):
    """Records with a class label, in the field `label_field`: {"tokens", "label"}, and "token_type_ids" of a pair.

    A record's label is the name of a class or its number.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "label"})
    class_column: ClassVar[str] = "label"

    def read(self, paths: Sequence[str], counts: ReadStats, labeled: bool = True) -> Iterator[tuple[str, Record]]:
        """Yield the records; without labels, those of plain text files have one text per line."""
        text = None if labeled else tables.lines
        return readers.records(paths, counts=counts, columns=self.table_columns, text=text)

    def number(self, value: Any, records: Records) -> int:
        return class_number(value, records)

    def to_example(self, arrays: Example, records: Records) -> Example:
        example = super().to_example(arrays, records)
        label = example.pop("label")[0]
        return {"label": label} | example

    def unlabeled(self, paths: Sequence[str], data: BuildContext) -> Source:
        """Return unlabeled texts with the same fields."""
        return UnlabeledSource(Records(self, paths, data.tokenizer, purpose="predict"))

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return the class names of the records, and the training counts of each class."""
        parts = self.training_records(data, class_names)  # records are held out path by path
        counts = [list(found.class_counts(np.flatnonzero(~held_out(found, part))).values()) for part, found in parts]
        return DataStats(class_names=parts[0][1].classes, class_counts=tuple(np.sum(counts, 0).tolist()))


def class_number(value: Any, records: Records) -> int:
    """Return the number of a label, as it is stored."""
    value = without_decimals(value, records)
    name = value.strip() if isinstance(value, str) else json.dumps(value)
    if not isinstance(value, (str, int)):
        advice = "use the recipe `regression` for numbers" if isinstance(value, float) else "write one"
        raise UserError(f"the label is {name} and must be a name or a whole number: {advice}, or remove the record")
    if not name:
        raise UserError("the label is empty and must be a name or a whole number: write one, or remove the record")
    if isinstance(value, str) and name != value:
        records.note("trimmed")
    return records.class_number(value if type(value) is int else name)


def without_decimals(value: Any, records: Records) -> Any:
    """Return an integral float label such as 1.0 as an int, and note it; any other label as it is."""
    if not isinstance(value, float) or not value.is_integer():
        return value
    records.note("decimal")
    return int(value)


@dataclass(frozen=True)
class ScoredConfig(LabeledTextsConfig):
    """Records with a number, in the field `label_field`: {"tokens", "score"}, and "token_type_ids" of a pair."""

    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "score"})
    columns: ClassVar[Mapping[str, type]] = {"tokens": np.int32, "token_type_ids": np.uint8, "label": np.float64}

    def number(self, value: Any, records: Records) -> float:
        try:
            found = float(value)
        except (TypeError, ValueError):
            found = math.nan
        if not math.isfinite(found):
            raise UserError(f"the field {self.label_field!r} is {value!r} and must be a number")
        return found

    def to_example(self, arrays: Example, records: Records) -> Example:
        example = super().to_example(arrays, records)
        return {"score": float(example.pop("label")[0])} | example

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return the mean and standard deviation that standardize the numbers."""
        scores = np.concatenate([found.column("label").whole for _, found in self.training_records(data)])
        return DataStats(mean=float(scores.mean()), std=float(scores.std()) or 1.0)


@dataclass(frozen=True)
class MultipleChoiceConfig(TextsConfig):
    """Records with several options, of which one is correct.

    An example is {"options": rows of {"tokens", "token_type_ids"}, "label": index of the right one}.

    Args:
        max_length: The most tokens of question and option.
        text_field: The question.
        label_field: The index of the right option, or the option itself.
        option_fields: The list of options, or one field per option.
        option_prefix_field: A text that every option begins with (SWAG's sent2).
        column_names: All columns, for a table without a header.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"options", "label"})
    columns: ClassVar[Mapping[str, type]] = {
        "tokens": np.int32, "token_type_ids": np.uint8, "lengths": np.int32, "label": np.int32,
    }  # fmt: skip

    text_field: str = "text"
    label_field: str = "label"
    option_fields: tuple[str, ...] = ("options",)
    option_prefix_field: str = ""
    column_names: tuple[str, ...] = ()

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.text_field, *self.option_fields)

    @property
    def encoded_fields(self) -> tuple[str, ...]:
        return (self.text_field,)

    @property
    def table_columns(self) -> tuple[str, ...]:
        return self.column_names

    def options_of(self, record: Record) -> list[str]:
        """Return the options of a record as written."""
        found = [record.get(name) for name in self.option_fields]
        options = found[0] if len(found) == 1 else found
        if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) for option in options):
            raise UserError(f"the options ({', '.join(self.option_fields)}) must be a list of two texts or more")
        return options

    def texts(self, record: Record, labeled: bool = True) -> list[str]:
        prefix = readers.text_field(record, self.option_prefix_field) + " " if self.option_prefix_field else ""
        return [*super().texts(record, labeled), *(prefix + option for option in self.options_of(record))]

    def example(self, record: Record, encoded: list[np.ndarray], records: Records) -> Example | None:
        text, *options = encoded
        rows = [self.with_special_tokens([text, option], records) for option in options]
        label = self.right_index(record, self.options_of(record), records) if records.labeled else 0
        return {
            "tokens": np.concatenate([row["tokens"] for row in rows]),
            "token_type_ids": np.concatenate([row["token_type_ids"] for row in rows]),
            "lengths": np.array([len(row["tokens"]) for row in rows]),
            "label": np.array([label]),
        }

    def right_index(self, record: Record, options: list[str], records: Records) -> int:
        """Return the index of the right option."""
        value = without_decimals(record.get(self.label_field), records)
        if isinstance(value, str) and value in options:
            return options.index(value)
        option_index = int(str(value)) if str(value).isdecimal() else -1
        if not 0 <= option_index < len(options):
            raise UserError(f"the label {value!r} is neither one of the {len(options)} options nor the index of one")
        return option_index

    def to_example(self, arrays: Example, records: Records) -> Example:
        cuts = np.cumsum(arrays["lengths"])[:-1]
        rows = zip(np.split(arrays["tokens"], cuts), np.split(arrays["token_type_ids"], cuts), strict=True)
        return {
            "options": [{"tokens": tokens, "token_type_ids": token_types} for tokens, token_types in rows],
            "label": int(arrays["label"][0]),
        }

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return the most options of a record, which is the number of rows per example."""
        return DataStats(max_options=self.longest(data, "lengths"))


@dataclass(frozen=True)
class TaggedConfig(NamedFieldsConfig):
    """Records of words with one tag each: {"tokens", "tags"}, a tag's number at the first token of its word and IGNORE elsewhere.

    The words are joined by spaces and enclosed in [CLS] and [SEP] where the tokenizer has them. A word that is truncated has no
    label. Text files are read as CoNLL columns. Entities may be tagged in any scheme of `firth.data.labels`; those that begin with I
    are read as beginning with B.

    Args:
        max_length: The most tokens of a sentence.
        words_field: The list of words.
        tags_field: The list of tags.
        column_names: The columns of a CoNLL file, two of which are the above.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "tags"})
    columns: ClassVar[Mapping[str, type]] = {"tokens": np.int32, "tags": np.int32, "words": np.int32}
    class_column: ClassVar[str] = "tags"
    text_reader: ClassVar[tables.Reader | None] = staticmethod(tables.sentences)

    words_field: str = "tokens"
    tags_field: str = "tags"
    column_names: tuple[str, ...] = ()

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.words_field,)

    @property
    def table_columns(self) -> tuple[str, ...]:
        return self.column_names

    def group(self, record: Record) -> str:
        return " ".join(record[self.words_field])

    def check_classes(self, names: Sequence[str]) -> None:
        check_scheme(names)

    def example(self, record: Record, encoded: list[np.ndarray], records: Records) -> Example | None:
        words = record.get(self.words_field)
        names = record.get(self.tags_field) if records.labeled else words
        if not isinstance(words, list) or not isinstance(names, list) or len(words) != len(names):
            raise UserError(
                f"a tagged sentence needs lists {self.words_field!r} and {self.tags_field!r} of the same length"
            )
        if not all(isinstance(word, str) for word in words):
            raise UserError(f"the field {self.words_field!r} holds words that are not text")
        names = self._tag_names(names, records) if records.labeled else []
        numbers = _tag_numbers(names, records) if records.labeled else np.zeros(len(words), np.int64)
        if records.purpose != "train":
            records.keep_text("written", json.dumps([words, names]))
        tokens, spans = records.tokenizer.spans(" ".join(words))
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        word = ends.searchsorted(spans[:, 1])  # a token may begin with the space before its word, never end with one
        first = np.flatnonzero(np.diff(word, prepend=-1))
        tags = np.full(len(tokens), IGNORE)
        tags[first] = numbers[word[first]]
        vocab = records.tokenizer.vocab
        if "cls" in vocab.roles and "sep" in vocab.roles:
            tokens = vocab.add_special_tokens(records.fit(tokens, self.max_length - 2))
            tags = np.concatenate(([IGNORE], tags[: self.max_length - 2], [IGNORE]))
        tokens, tags = records.fit(tokens, self.max_length), tags[: self.max_length]
        num_labels = int((tags != IGNORE).sum())
        return {"tokens": tokens, "tags": tags, "words": word[first][:num_labels]} if num_labels else None

    def to_example(self, arrays: Example, records: Records) -> Example:
        return {"tokens": arrays["tokens"], "tags": arrays["tags"]}

    def _tag_names(self, tags: list[Any], records: Records) -> list[str]:
        """Return a sentence's tags as names, where they may be numbers of given classes."""
        if all(isinstance(tag, str) for tag in tags):
            return tags
        bad, known = next(tag for tag in tags if not isinstance(tag, str)), records.known_classes
        if not known:
            raise UserError(
                f"the field {self.tags_field!r} holds {bad!r} instead of the name of a tag: write names, or name the numbers with "
                "objective.class_names=[O, B-..., I-...]"
            )
        if not all(type(tag) is int and records.is_class(tag) for tag in tags):
            raise UserError(f"the field {self.tags_field!r} holds {bad!r}, which is not one of the {len(known)} tags")
        return [known[records.class_number(tag)] for tag in tags]


def _tag_numbers(names: list[str], records: Records) -> np.ndarray:
    """Return the numbers of a sentence's tags, and note unknown ones."""
    converted = to_bio2(names) if has_spans(names) else names
    if converted != names:
        records.note("begun")
    return np.array([records.class_number(name) for name in converted], np.int64)


def written(records: Records, number: int) -> tuple[list[str], list[str]]:
    """Return the words and the tags of a sentence as written, by the number of its record from 0."""
    words, tags = json.loads(records.text_of("written", number))
    return words, tags
