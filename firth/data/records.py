"""Examples from records, JSONL or Parquet: labelled texts, dialogues, prompts with answers, preferences.

Every record is read and encoded once, when the source is made, into a memory-mapped temporary file: an epoch costs no
encoding, memory stays small, and what was cut or left out is known before the first step (`counts`):

    cut          was longer than `length`: the beginning is kept
    unanswered   nothing to learn from was left after that: left out. Where that is all of them, UserError

Any of the usual shapes will do: {"text", "label"}; {"messages"}; {"prompt", "completion"}; Alpaca's and ShareGPT's;
{"prompt", "chosen", "rejected"} with strings or messages. A record of another shape is an error with file and line.
"""

from __future__ import annotations

import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice, takewhile
from typing import Any, ClassVar

import numpy as np

from firth.data import layout
from firth.data.source import Source
from firth.text import chat, read
from firth.text.tokenizer import Tokenizer
from firth.types import IGNORE, Example, UserError

Record = dict[str, Any]
AT_ONCE = 1024
"""Records whose texts are encoded together."""


class Column:
    """Arrays of varied length, one behind the other in a temporary file that vanishes with the process."""

    def __init__(self, dtype: type) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the column
        self._dtype = np.dtype(dtype)
        self._ends = array("q", [0])
        self._values: np.ndarray = np.zeros(0, dtype)

    def append(self, values: np.ndarray) -> None:
        self._file.write(values.astype(self._dtype, copy=False).tobytes())
        self._ends.append(self._ends[-1] + len(values))

    def close(self) -> None:
        """From now on it is read."""
        self._file.flush()
        if self._ends[-1]:
            self._values = np.memmap(self._file, self._dtype, "r").view(np.ndarray)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._values[self._ends[index] : self._ends[index + 1]]


class Records(Source):
    """What the sources of records share: one pass over the files, and the columns that it fills.

    length: most tokens of a row; from a longer one the beginning is kept.
    """

    columns: ClassVar[dict[str, type]] = {}
    """Field of an example -> the type in which it is kept."""

    def __init__(self, paths: Sequence[str], tokenizer: Tokenizer, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length
        self._columns = {name: Column(dtype) for name, dtype in self.columns.items()}
        self._size = 0
        self._tally: Counter[str] = Counter()
        reading = read.Counts()
        records = read.records(paths, counts=reading)
        while some := list(islice(records, AT_ONCE)):
            self._add(some)
        for column in self._columns.values():
            column.close()
        self._tally.update(reading.rows())
        if not self._size:
            raise UserError(f"{', '.join(paths)}: there is no record to learn from, of {dict(self.counts)}")

    @property
    def counts(self) -> Mapping[str, int]:
        return {"examples": self._size, **{name: n for name, n in self._tally.items() if n}}

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        return {name: column[index] for name, column in self._columns.items()}

    def _add(self, records: list[tuple[str, Record]]) -> None:
        self._tally["records"] += len(records)
        texts = []
        for place, record in records:
            with _told(place):
                texts.append(self.texts(record, place))
        encoded = iter(self.tokenizer.encode_batch([text for some in texts for text in some]))
        for (place, record), some in zip(records, texts, strict=True):
            with _told(place):
                example = self.example(record, list(islice(encoded, len(some))))
            if example is None:
                self._tally["unanswered"] += 1
                continue
            for name, column in self._columns.items():
                column.append(example[name])
            self._size += 1

    def texts(self, record: Record, place: str) -> list[str]:
        """The texts of a record that are encoded by themselves; place is its file and line."""
        return []

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        """The columns of a record, from it and its encoded texts; None if there is nothing to learn from it."""
        raise NotImplementedError(type(self).__name__)

    def fit(self, tokens: np.ndarray, room: int) -> np.ndarray:
        """The beginning, if there is more than there is room for."""
        self._tally["cut"] += len(tokens) > room
        return tokens[:room]


class Labelled(Records):
    """Texts with a class: {"tokens", "label"}, framed by [CLS] and [SEP] (ended by eos where there is no [CLS]).

    text, label: fields of the records. pair: the field of a second text, if there is one; then "segments" too, and of
    two texts that are too long together, the longer one is cut. classes: their names, in the order that the labels
    count; those found in the records if empty. A record's label is a class's name or its number.
    """

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "segments": np.uint8, "label": np.int32}

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: Tokenizer,
        length: int,
        *,
        text: str = "text",
        label: str = "label",
        pair: str = "",
        classes: Sequence[str] = (),
    ) -> None:
        self._fields, self._label = [text, pair] if pair else [text], label
        self._known = {name: i for i, name in enumerate(classes)}
        self._open = not classes
        super().__init__(paths, tokenizer, length)
        # Names found on the way are numbered in the order of the alphabet (numbers by size), whatever the file's order.
        names = sorted(self._known, key=_natural) if self._open else list(classes)
        self.classes = tuple(names)
        self._number = np.array([names.index(name) for name in self._known])

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        label = {"label": self._number[example.pop("label")[0]]}
        return label | (example if len(self._fields) > 1 else {"tokens": example["tokens"]})

    def texts(self, record: Record, place: str) -> list[str]:
        return [read.text_field(record, field, place) for field in self._fields]

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        vocab, label = self.tokenizer.vocab, np.array(self.labels(record))
        if len(encoded) == 2:
            room = self.length - 3
            first, second = encoded
            self._tally["cut"] += len(first) + len(second) > room
            first = first[: max(room - len(second), room - room // 2)]
            return layout.pair(first, second[: room - len(first)], vocab) | {"label": label}
        if "cls" in vocab.roles and "sep" in vocab.roles:
            tokens = vocab.frame(self.fit(encoded[0], self.length - 2))
        else:
            tokens = np.append(self.fit(encoded[0], self.length - 1), vocab.eos)
        return {"tokens": tokens, "segments": np.zeros(0), "label": label}

    def labels(self, record: Record) -> Sequence[int]:
        """The numbers of a record's labels: one here."""
        if self._label not in record:
            raise UserError(f"there is no field {self._label!r} for the class; it has {', '.join(record) or 'none'}")
        return [self.number(record[self._label])]

    def number(self, value: Any) -> int:
        """The number of a label, as it stands in the columns (names found on the way are numbered as they come)."""
        name = value if isinstance(value, str) else json.dumps(value)
        if name not in self._known:
            if type(value) is int and not self._open and 0 <= value < len(self._known):
                return value
            if not self._open or not isinstance(value, (str, int)):
                classes = ", ".join(self._known) if not self._open else "names or whole numbers"
                raise UserError(f"the label {name} is none of the classes ({classes})")
            self._known[name] = len(self._known)
        return self._known[name]


class Tagged(Records):
    """Sentences with a tag for each word: {"tokens", "tags"}, a tag's number at the first token of its word, IGNORE elsewhere.

    words, tags: the fields that list them. classes: the names of the tags, as of `Labelled`. The words are joined by
    blanks and framed by [CLS] and [SEP] where the tokenizer has these; a word of which no token is left is not asked.
    """

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "tags": np.int32}

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: Tokenizer,
        length: int,
        *,
        words: str = "tokens",
        tags: str = "tags",
        classes: Sequence[str] = (),
    ) -> None:
        self._words, self._tags = words, tags
        self._known = {name: i for i, name in enumerate(classes)}
        self._open = not classes
        super().__init__(paths, tokenizer, length)
        names = sorted(self._known) if self._open else list(classes)
        self.classes = tuple(names)
        self._number = np.array([names.index(name) for name in self._known])

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        asked = example["tags"] != IGNORE
        tags = np.full(len(asked), IGNORE)
        tags[asked] = self._number[example["tags"][asked]]
        return {"tokens": example["tokens"], "tags": tags}

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        words, names = record.get(self._words), record.get(self._tags)
        if not isinstance(words, list) or not isinstance(names, list) or len(words) != len(names):
            raise UserError(f"a tagged sentence needs as many {self._words!r} as {self._tags!r}, in two lists")
        for name in names:
            if name not in self._known and not self._open:
                raise UserError(f"the tag {name!r} is none of the {len(self._known)} known ones")
            self._known.setdefault(name, len(self._known))
        tokens, spans = self.tokenizer.spans(" ".join(words))
        ends = np.cumsum([len(word) + 1 for word in words]) - 1
        word = ends.searchsorted(spans[:, 1])  # a token may begin with the blank before its word, never with one behind
        first = np.flatnonzero(np.diff(word, prepend=-1))
        tags = np.full(len(tokens), IGNORE)
        tags[first] = np.array([self._known[name] for name in names], np.int64)[word[first]]
        vocab = self.tokenizer.vocab
        if "cls" in vocab.roles and "sep" in vocab.roles:
            tokens = vocab.frame(self.fit(tokens, self.length - 2))
            tags = np.concatenate(([IGNORE], tags[: self.length - 2], [IGNORE]))
        return (
            {"tokens": self.fit(tokens, self.length), "tags": tags[: self.length]} if (tags != IGNORE).any() else None
        )


class Dialogues(Records):
    """Dialogues to be learnt from: {"tokens", "mask"}, the mask True on what the assistant says and its stop tokens."""

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "mask": np.bool_}

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        tokens, mask = chat.encode(self.tokenizer, chat.messages_of(record))
        tokens, mask = self.fit(tokens, self.length), mask[: self.length]
        # The first token cannot be asked: nothing stands before it.
        return {"tokens": tokens, "mask": mask} if mask[1:].any() else None


class Prompted(Records):
    """Text to text: {"source", "target"}, both ended by eos; the target is the last answer, the source all before it.

    `length` bounds the source, `answer` the target (as `length`, if 0). A target that is cut has no eos.
    """

    columns: ClassVar[dict[str, type]] = {"source": np.int32, "target": np.int32}

    def __init__(self, paths: Sequence[str], tokenizer: Tokenizer, length: int, *, answer: int = 0) -> None:
        self.answer = answer or length
        super().__init__(paths, tokenizer, length)

    def texts(self, record: Record, place: str) -> list[str]:
        *before, last = chat.messages_of(record)
        if last["role"] != "assistant" or not before:
            raise UserError("text to text needs a prompt and an answer behind it")
        return ["\n\n".join(message["content"] for message in before), last["content"]]

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        source, target = encoded
        eos = self.tokenizer.vocab.eos
        if not len(target):
            return None
        return {
            "source": np.append(self.fit(source, self.length - 1), eos),
            "target": self.fit(np.append(target, eos), self.answer),
        }


class Preferences(Records):
    """Two answers to one prompt, one of them preferred: {"chosen_tokens", "chosen_mask", "rejected_tokens", ...}.

    The masks are True on the answers and their stop tokens alone, not on what an assistant said in the prompt. A pair
    of which either answer has no place within `length`, or whose answers do not differ, is left out as unanswered.
    """

    columns: ClassVar[dict[str, type]] = {
        "chosen_tokens": np.int32, "chosen_mask": np.bool_, "rejected_tokens": np.int32, "rejected_mask": np.bool_,
    }  # fmt: skip

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        prompt, *answers = comparison(record)
        asked = len(chat.encode(self.tokenizer, prompt)[0])
        found: Example = {}
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            tokens, mask = chat.encode(self.tokenizer, [*prompt, *answer])
            mask &= np.arange(len(tokens)) >= asked
            found |= {f"{side}_tokens": self.fit(tokens, self.length), f"{side}_mask": mask[: self.length]}
        answered = found["chosen_mask"].any() and found["rejected_mask"].any()
        differ = not np.array_equal(found["chosen_tokens"], found["rejected_tokens"])
        return found if answered and differ else None


def comparison(record: Record) -> tuple[list[chat.Message], list[chat.Message], list[chat.Message]]:
    """(prompt, chosen, rejected) as messages. Without a `prompt`, it is the turns that both dialogues begin with.

    >>> hello = {"role": "user", "content": "hello"}
    >>> good, bad = ({"role": "assistant", "content": c} for c in ("hi", "go away"))
    >>> comparison({"chosen": [hello, good], "rejected": [hello, bad]}) == ([hello], [good], [bad])
    True
    """
    missing = [name for name in ("chosen", "rejected") if name not in record]
    if missing:
        raise UserError(f"a preference needs `chosen` and `rejected`; this record has {', '.join(record) or 'nothing'}")
    chosen, rejected = chat.answer_of(record["chosen"]), chat.answer_of(record["rejected"])
    if "prompt" in record:
        return chat.prompt_of(record["prompt"]), chosen, rejected
    same = sum(1 for _ in takewhile(lambda two: two[0] == two[1], zip(chosen, rejected, strict=False)))
    if not same:
        raise UserError("a preference needs a `prompt`, or two dialogues that begin with the same turns")
    return chosen[:same], chosen[same:], rejected[same:]


def prompts(paths: Sequence[str], tokenizer: Tokenizer, length: int) -> tuple[list[np.ndarray], Mapping[str, int]]:
    """What there is to answer in the records, and the counts: dialogues up to their last answer, with its turn begun.

    A prompt of more than `length` tokens is left out: without its end it would ask something else.
    """
    counts = read.Counts()
    found, tally = [], Counter[str]()
    for place, record in read.records(paths, counts=counts):
        with _told(place):
            if "prompt" in record:
                messages = chat.prompt_of(record["prompt"])
            else:
                messages = chat.messages_of(record)
                messages = messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages
            tokens, _ = chat.encode(tokenizer, messages, open=True)
        tally["records"] += 1
        if messages and len(tokens) <= length:
            found.append(tokens)
        else:
            tally["too_long" if messages else "unanswered"] += 1
    if not found:
        raise UserError(f"{', '.join(paths)}: there is no prompt of at most {length} tokens, of {dict(tally)}")
    return found, {"examples": len(found), **tally, **counts.rows()}


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Put file and line in front of a mistake found in a record."""
    try:
        yield
    except UserError as mistake:
        raise UserError(str(mistake) if str(mistake).startswith(place) else f"{place}: {mistake}") from None


def _natural(name: str) -> tuple[bool, int, str]:
    """Whole numbers by size, then names by alphabet."""
    number = name.removeprefix("-").isdecimal()
    return (not number, int(name) if number else 0, name)
