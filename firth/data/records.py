"""Examples from records, of JSONL, Parquet or tables: dialogues, prompts with answers, preferences; those that have a label
are in `firth.data.labeled`, questions about a passage in `firth.data.question_answering`.

Every record is read and encoded once, when the source is made, into a memory-mapped temporary file: an epoch costs no
encoding, memory stays small, and what was cut or left out is known before the first step (`counts`):

    cut          was longer than `length`: the beginning is kept
    unanswered   nothing to learn from was left after that: left out. Where that is all of them, UserError
    mismatched   a row of a table with too many or too few cells: left out
    nameless     a column of a table has no name: read as `Unnamed: 2`, as pandas calls it
    bad_utf8     a line was not UTF-8: read with U+FFFD in it
    blank        a text was empty: read as it is
    duplicates   the same content as an earlier record: read as it is, and held out with that one, or not at all

The first of each is named, with its file and line (`remarks`).

`docs/reference/data-formats.md` has the shapes of dialogues, prompts and preferences (`firth.data.conversations`). A record of another
shape is an error with file and line.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from firth.corpora import readers, tables
from firth.corpora.read_stats import ReadStats
from firth.data.conversations import comparison, messages_of, prompt_of
from firth.data.source import Source
from firth.data.split import content_key
from firth.data.templates import fill_template
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import Example, UserError

Record = dict[str, Any]
LEFT_OUT: Sequence[Example] = []
"""Of a record that gives no example for a reason that is noted: this very list."""

AT_ONCE = 1024
"""Records whose texts are encoded together."""

REMARKS = {
    "unanswered": "record{s} had nothing to learn from and {were} left out",
    "mismatched": "row{s} had another number of cells than {their} head and {were} left out",
    "nameless": "column{s} {have} no name and {are} called 'Unnamed: ' and {their} place from 0",
    "misplaced": "answer{s} {do} not stand in {their} passage where {they} {are} said to, and {were} left out",
    "begun": "tag{s} went on with a name that had not begun (IOB1, IO), and {were} read as its beginning",
    "bad_utf8": "line{s} {were} not UTF-8 and {have} U+FFFD in place of what could not be read",
    "nul": "NUL character{s} {were} removed",
    "too_long": "record{s} {were} longer than 4 MB and {were} left out",
    "blank": "text{s} {were} empty and {were} read as {they} {are}",
    "trimmed": "label{s} had white space around {them}, which was dropped",
    "decimal": "label{s} {were} written as a decimal number (1.0) and {were} read as a whole one",
    "unlabelled": "record{s} {have} no label and {were} left out",
    "unanswerable": "question{s} {have} no answer, so the model may say that there is none",
    "duplicates": "record{s} {have} the same content as an earlier one",
    "lost": "question{s} {have} no answer though every question of SQuAD 1.1 has one, and {were} left out",
    "cut": "text{s} {were} longer than {limit} tokens and lost {their} end",
    "long_questions": "question{s} {were} longer than {limit} tokens and lost {their} end",
    "long_answers": "answer{s} {were} longer than {limit} tokens and lost {their} end",
}
"""What is noted of records -> the end of a sentence that says how many."""

ONE = {"s": "", "were": "was", "do": "does", "their": "its", "they": "it", "them": "it", "are": "is", "have": "has"}
MANY = {"s": "s"} | {word: word for word in ONE if word != "s"}


def notes_of(kind: str, count: int, place: str, limit: int = 0, remarks: Mapping[str, str] = REMARKS) -> str:
    """A whole sentence.

    >>> notes_of("mismatched", 1, "a.csv:3"), notes_of("cut", 2, "a.csv:7", 128)
    ... # doctest: +NORMALIZE_WHITESPACE
    ('1 row had another number of cells than its head and was left out; the first is a.csv:3',
     '2 texts were longer than 128 tokens and lost their end; the first is a.csv:7')
    """
    said = remarks[kind].format(limit=limit, **(ONE if count == 1 else MANY))
    return f"{count:,} {said}; the first is {place}"


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

    @property
    def whole(self) -> np.ndarray:
        """All arrays as one."""
        return self._values

    @property
    def lengths(self) -> np.ndarray:
        """Of each array: (n,)."""
        return np.diff(self._ends)

    def __getitem__(self, index: int) -> np.ndarray:
        return self._values[self._ends[index] : self._ends[index + 1]]

    def some(self, indices: np.ndarray) -> np.ndarray:
        """Some of the arrays as one."""
        ends, n = np.array(self._ends), self.lengths[indices]
        return self._values[np.repeat(ends[indices] - np.cumsum(n) + n, n) + np.arange(n.sum())]


class Records(Source):
    """What the sources of records share: one pass over the files, and the columns that it fills.

    length: most tokens of a row; from a longer one the beginning is kept. names: of the columns, of tables without a head.
    """

    columns: ClassVar[dict[str, type]] = {}
    """Field of an example -> the type in which it is kept."""

    reader: ClassVar[tables.Reader | None] = None
    """What reads a text file as records; None: nothing does."""

    def __init__(self, paths: Sequence[str], tokenizer: Tokenizer, length: int, *, names: Sequence[str] = ()) -> None:
        self.tokenizer, self.length, self.paths = tokenizer, length, paths
        self._columns = {name: Column(dtype) for name, dtype in self.columns.items()}
        self._size = 0
        self._tally: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._place = ""
        self._owners = array("q")
        self._groups = array("Q")
        self._contents: set[int] = set()
        reading = ReadStats()
        records = readers.records(paths, counts=reading, columns=names, text=type(self).reader)
        while some := list(islice(records, AT_ONCE)):
            self._add(some)
        for column in self._columns.values():
            column.close()
        self._contents.clear()
        self._tally.update(reading.rows())
        self._first |= reading.at
        if not self._size:
            left = ", ".join(f"{n:,} {name}" for name, n in self._tally.items() if n and name != "files")
            raise UserError(f"{', '.join(paths)}: there is no record that could be used{f' ({left})' if left else ''}")

    @property
    def counts(self) -> Mapping[str, int]:
        return {"examples": self._size, **{name: n for name, n in self._tally.items() if n}}

    @property
    def notes(self) -> Sequence[str]:
        return [
            notes_of(kind, self._tally[kind], place, self.limits.get(kind, self.length), self.said)
            for kind, place in self._first.items()
        ]

    @property
    def limits(self) -> Mapping[str, int]:
        """Kinds of cuts -> tokens, where that is not `length`."""
        return {}

    @property
    def said(self) -> Mapping[str, str]:
        """What is noted of records -> the end of a sentence that says how many."""
        return REMARKS

    @property
    def lengths(self) -> np.ndarray:
        """Numbers of each example in all its columns."""
        return np.sum([column.lengths for column in self._columns.values()], 0)

    @property
    def record_ids(self) -> np.ndarray:
        """Which record, from 0, each example is of: (n,)."""
        return np.array(self._owners)

    @property
    def group_ids(self) -> np.ndarray:
        return np.array(self._groups, np.uint64)

    def note(self, kind: str) -> None:
        """Count something of the record that is being read; the place of the first is kept."""
        self._tally[kind] += 1
        self._first.setdefault(kind, self._place)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        return {name: column[index] for name, column in self._columns.items()}

    def _add(self, records: list[tuple[str, Record]]) -> None:
        texts, before = [], self._tally["records"]
        self._tally["records"] += len(records)
        for place, record in records:
            with _told(place):
                texts.append(self.texts(record, place))
        encoded = iter(self.tokenizer.encode_batch([text for some in texts for text in some]))
        for number, ((place, record), some) in enumerate(zip(records, texts, strict=True), before):
            self._place = place
            with _told(place):
                examples = self.examples(record, list(islice(encoded, len(some))))
            if examples is LEFT_OUT:
                continue
            if not examples:
                self.note("unanswered")
            else:
                group = content_key(self.group(record))
                self._groups.extend([group] * len(examples))
                content = b"".join(example[name].tobytes() for example in examples for name in self._columns)
                content += group.to_bytes(8)  # of texts that are cut alike, the group has the rest
                key = int.from_bytes(hashlib.blake2b(content, digest_size=8).digest())
                if key in self._contents:
                    self.note("duplicates")
                self._contents.add(key)
            for example in examples:
                for name, column in self._columns.items():
                    column.append(example[name])
                self._owners.append(number)
            self._size += len(examples)

    def group(self, record: Record) -> str:
        """Return the text that records of one group share, its prompt: they are held out together, or not at all.

        Where a record has no prompt, it is its whole content.
        """
        raise NotImplementedError(type(self).__name__)

    def texts(self, record: Record, place: str) -> list[str]:
        """The texts of a record that are encoded by themselves; place is its file and line."""
        return []

    def examples(self, record: Record, encoded: list[np.ndarray]) -> Sequence[Example]:
        """What there is to learn from a record: one example or none, but of those that are read in several windows; LEFT_OUT
        where it is noted already why there is none."""
        found = self.example(record, encoded)
        return [] if found is None else [found]

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        """The columns of a record, from it and its encoded texts; None if there is nothing to learn from it."""
        raise NotImplementedError(type(self).__name__)

    def fit(self, tokens: np.ndarray, room: int, kind: str = "cut") -> np.ndarray:
        """The beginning, if there is more than there is room for; kind: of what is cut."""
        if len(tokens) > room:
            self.note(kind)
        return tokens[:room]


class DialogueRecords(Records):
    """Dialogues to be learnt from: {"tokens", "mask"}, the mask True on what the assistant says and its stop tokens."""

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "mask": np.bool_}

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, length: int, *, forms: tuple[str, str] = ("", "")
    ) -> None:
        self.forms = forms
        super().__init__(paths, tokenizer, length)

    def group(self, record: Record) -> str:
        return first_prompt(messages_of(fill_templates(record, self.forms)))

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        tokens, mask = chat.encode(self.tokenizer, messages_of(fill_templates(record, self.forms)))
        tokens, mask = self.fit(tokens, self.length), mask[: self.length]
        # The first token cannot be asked: nothing stands before it.
        return {"tokens": tokens, "mask": mask} if mask[1:].any() else None


class Seq2SeqRecords(Records):
    """Text to text: {"source", "target"}, both ended by eos; the target is the last answer, the source all before it.

    `length` bounds the source, `answer` the target (as `length`, if 0). A target that is cut has no eos. forms: of `formed`.
    """

    columns: ClassVar[dict[str, type]] = {"source": np.int32, "target": np.int32}

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: Tokenizer,
        length: int,
        *,
        answer: int = 0,
        forms: tuple[str, str] = ("", ""),
    ) -> None:
        self.answer, self.forms = answer or length, forms
        super().__init__(paths, tokenizer, length)

    def group(self, record: Record) -> str:
        return first_prompt(messages_of(fill_templates(record, self.forms)))

    def texts(self, record: Record, place: str) -> list[str]:
        *before, last = messages_of(fill_templates(record, self.forms))
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
            "target": self.fit(np.append(target, eos), self.answer, "long_answers"),
        }

    @property
    def limits(self) -> Mapping[str, int]:
        return {"long_answers": self.answer}


def dialogue_texts(paths: Sequence[str], forms: tuple[str, str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the group of each dialogue (`Records.group`) and its messages: what a tokenizer is trained on."""
    for place, record in readers.records(paths):
        with _told(place):
            messages = messages_of(fill_templates(record, forms))
        yield first_prompt(messages), [message["content"] for message in messages]


def first_prompt(messages: Sequence[chat.Message]) -> str:
    """Return the turns before the first answer to a user, as one text; the whole dialogue where nothing is answered.

    Dialogues that go on from one beginning share it, and so do the answers of a preference.

    >>> hello, hi = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
    >>> first_prompt([hello, hi]) == first_prompt([hello, hi, hello]) == first_prompt([hello])
    True
    """
    users = [i for i, message in enumerate(messages) if message["role"] not in ("system", "assistant")]
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and users and i > users[0]]
    end = answers[0] if answers else len(messages)
    return json.dumps([[message["role"], message["content"]] for message in messages[:end]])


def fill_templates(record: Record, forms: tuple[str, str]) -> Record:
    """A record as a prompt and an answer, made of its fields; as it is where no form is given.

    >>> fill_templates({"en": "otter", "fr": "loutre"}, ("in French: {en}", "{fr}"))
    {'prompt': 'in French: otter', 'completion': 'loutre'}
    """
    if not any(forms):
        return record
    prompt, answer = forms
    if not prompt or not answer:
        raise UserError(
            "examples.prompt_template and examples.completion_template go together: say how both are made of a record's fields"
        )
    return {"prompt": fill_template(prompt, record), "completion": fill_template(answer, record)}


class PreferenceRecords(Records):
    """Two answers to one prompt, one of them preferred: {"chosen_tokens", "chosen_mask", "rejected_tokens", ...}.

    The masks are True on the answers and their stop tokens alone, not on what an assistant said in the prompt. A pair
    of which either answer has no place within `length`, or whose answers do not differ, is left out as unanswered.
    """

    columns: ClassVar[dict[str, type]] = {
        "chosen_tokens": np.int32, "chosen_mask": np.bool_, "rejected_tokens": np.int32, "rejected_mask": np.bool_,
    }  # fmt: skip

    def group(self, record: Record) -> str:
        prompt, chosen, _ = comparison(record)
        return first_prompt([*prompt, *chosen])

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


def prompts(
    paths: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[list[np.ndarray], np.ndarray, Mapping[str, int]]:
    """Read what there is to answer in the records: dialogues up to their last answer, with its turn begun.

    A prompt of more than `length` tokens is left out: without its end it would ask something else.

    Returns:
        The tokens of each prompt; the `content_key` of each, (n,) uint64: the one that a dialogue or a preference with
        this prompt has, so that what one stage holds out is held out in the next; and how many `records` there were, of
        which `too_long` and `unanswered` were left out.

    Raises:
        UserError: there is none.
    """
    found, keys, tally = [], array("Q"), Counter[str]()
    for place, record in readers.records(paths):
        with _told(place):
            messages = prompt_of(record)
            tokens, _ = chat.encode(tokenizer, messages, open=True)
        tally["records"] += 1
        if messages and len(tokens) <= length:
            found.append(tokens)
            keys.append(content_key(first_prompt(messages)))
        else:
            tally["too_long" if messages else "unanswered"] += 1
    if not found:
        raise UserError(f"{', '.join(paths)}: there is no prompt of at most {length} tokens, of {dict(tally)}")
    return found, np.array(keys, np.uint64), tally


@contextmanager
def _told(place: str) -> Iterator[None]:
    """Put file and line in front of a mistake found in a record."""
    try:
        yield
    except UserError as mistake:
        raise UserError(str(mistake) if str(mistake).startswith(place) else f"{place}: {mistake}") from None
