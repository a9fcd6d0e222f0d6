"""Examples from records, and the text templates that are filled with their fields.

Text templates that are filled with a record's fields: `translate to French: {en}`.

A field is its name between braces and nothing else; doubled braces are literal braces. Python's own formatting can do
more (`{en:>999999999}` allocates a gigabyte, `{en.__class__}` accesses Python objects), which no prompt needs.

Examples from records in JSONL, Parquet or tables: dialogues, prompts with answers, preferences.

Labeled records are in `firth.data.labeled`, questions about a passage in `firth.data.question_answering`.

Every record is read and encoded once, when the source is created, into a memory-mapped temporary file. An epoch then costs no
encoding, memory use stays small, and truncated and omitted records are known before the first step (`counts`):

    cut               longer than `length`: truncated at the end
    unanswered        no label is left after that: omitted. If that is true of all records, UserError
    mismatched        a row of a table with too many or too few cells: omitted
    unnamed_columns   a column of a table has no name: read as `Unnamed: 2`, the name that pandas gives it
    bad_utf8          a line was not UTF-8: read with U+FFFD in it
    blank             a text was empty: read as it is
    duplicates        the same content as an earlier record: read as it is, in the same split as that one

The first of each is reported with its file and line (`notes`).

`docs/reference/data-formats.md` lists the formats of dialogues, prompts and preferences (`firth.data.conversations`). Any other
format is an error with file and line.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from firth.corpora import readers, tables
from firth.corpora.input_files import ReadStats
from firth.data.conversations import comparison, messages_of, prompt_of
from firth.data.source import Source
from firth.data.split import content_key
from firth.tokenizer import chat
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import Example, UserError

FIELD_OR_BRACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def field_names(template: str) -> list[str]:
    """Return the names of the fields in a template, sorted, each once.

    >>> field_names("{b}, {a} and {b}: {{c}}")
    ['a', 'b']
    """
    return sorted({found[1] for found in FIELD_OR_BRACE.finditer(template) if found[1]})


def fill_template(template: str, record: Mapping[str, Any]) -> str:
    """Return the template with field names replaced by a record's values.

    Raises:
        UserError: A brace is unpaired, or a name is not a field of the record.

    >>> fill_template("in French: {en} {{x}}", {"en": "otter"})
    'in French: otter {x}'
    """

    def value(found: re.Match[str]) -> str:
        if found[0] in ("{{", "}}"):
            return found[0][0]
        if found[1] is None:
            raise UserError(
                f"the template {template!r} has an unpaired brace {found[0]!r}: double it for a literal brace"
            )
        if found[1] not in record:
            raise UserError(
                f"the template {template!r} does not fit this record: {found[0]} is not a field name; the fields are "
                f"{', '.join(record) or 'none'}: write one of these names between braces, and nothing else"
            )
        return str(record[found[1]])

    return FIELD_OR_BRACE.sub(value, template)


Record = dict[str, Any]
OMITTED: Sequence[Example] = []
"""Result of `Records.examples` for a record that gives no example for a reason that has been noted; compared by identity."""

RECORDS_PER_BATCH = 1024
"""Records whose texts are encoded together."""

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


class Records(Source):
    """Base class of the sources of records: one pass over the files fills the columns.

    Args:
        paths: Files, directories or globs.
        tokenizer: The tokenizer.
        length: Maximum number of tokens of a row; a longer one is truncated at the end.
        names: Column names, for tables without a header.

    Raises:
        UserError: A record is malformed, or no record can be used.
    """

    columns: ClassVar[dict[str, type]] = {}
    """Field of an example -> the type in which it is stored."""

    reader: ClassVar[tables.Reader | None] = None
    """Function that reads a text file as records; None: text files are not supported."""

    def __init__(self, paths: Sequence[str], tokenizer: Tokenizer, length: int, *, names: Sequence[str] = ()) -> None:
        self.tokenizer, self.length, self.paths = tokenizer, length, paths
        self._columns = {name: ArrayColumn(dtype) for name, dtype in self.columns.items()}
        self._size = 0
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._location = ""
        self._record_ids = array("q")
        self._groups = array("Q")
        self._contents: set[int] = set()
        read_stats = ReadStats()
        records = readers.records(paths, counts=read_stats, columns=names, text=type(self).reader)
        while chunk := list(islice(records, RECORDS_PER_BATCH)):
            self._add(chunk)
        for column in self._columns.values():
            column.close()
        self._contents.clear()
        self._counts.update(read_stats.rows())
        self._first |= read_stats.at
        if not self._size:
            left = ", ".join(f"{n:,} {name}" for name, n in self._counts.items() if n and name != "files")
            raise UserError(f"{', '.join(paths)}: no record can be used{f' ({left})' if left else ''}")

    @property
    def counts(self) -> Mapping[str, int]:
        return {"examples": self._size, **{name: n for name, n in self._counts.items() if n}}

    @property
    def notes(self) -> Sequence[str]:
        return [
            describe_note(kind, self._counts[kind], location, self.limits.get(kind, self.length), self.note_templates)
            for kind, location in self._first.items()
        ]

    @property
    def limits(self) -> Mapping[str, int]:
        """Kind of truncation -> maximum number of tokens, where that is not `length`."""
        return {}

    @property
    def note_templates(self) -> Mapping[str, str]:
        """Kind of note -> end of the sentence that reports it."""
        return NOTE_TEMPLATES

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

    def note(self, kind: str) -> None:
        """Count a note about the record being read, and keep the place of the first."""
        self._counts[kind] += 1
        self._first.setdefault(kind, self._location)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> Example:
        return {name: column[index] for name, column in self._columns.items()}

    def _add(self, records: list[tuple[str, Record]]) -> None:
        texts, before = [], self._counts["records"]
        self._counts["records"] += len(records)
        for location, record in records:
            with _with_location(location):
                texts.append(self.texts(record, location))
        encoded = iter(self.tokenizer.encode_batch([text for record_texts in texts for text in record_texts]))
        for number, ((location, record), record_texts) in enumerate(zip(records, texts, strict=True), before):
            self._location = location
            with _with_location(location):
                examples = self.examples(record, list(islice(encoded, len(record_texts))))
            if examples is OMITTED:
                continue
            if not examples:
                self.note("unanswered")
            else:
                group = content_key(self.group(record))
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
                self._record_ids.append(number)
            self._size += len(examples)

    def group(self, record: Record) -> str:
        """Return the text that records of one group share, the prompt: a group is held out together, or not at all.

        A record without a prompt returns its whole content.
        """
        raise NotImplementedError(type(self).__name__)

    def texts(self, record: Record, location: str) -> list[str]:
        """Return the texts of a record that are encoded separately; location is its file and line."""
        return []

    def examples(self, record: Record, encoded: list[np.ndarray]) -> Sequence[Example]:
        """Return the examples of a record: one or none, several for records that are read in windows.

        Returns OMITTED where the reason for having none has been noted.
        """
        found = self.example(record, encoded)
        return [] if found is None else [found]

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        """Return the columns of a record, from the record and its encoded texts; None if it has no labels."""
        raise NotImplementedError(type(self).__name__)

    def fit(self, tokens: np.ndarray, room: int, kind: str = "cut") -> np.ndarray:
        """Truncate tokens to `room`, and note that as `kind`."""
        if len(tokens) > room:
            self.note(kind)
        return tokens[:room]


class DialogueRecords(Records):
    """Dialogues for supervised fine-tuning: {"tokens", "mask"}, the mask True on the assistant's text and its stop tokens.

    Args:
        paths: Files, directories or globs.
        tokenizer: The tokenizer.
        length: Maximum number of tokens.
        forms: Templates of prompt and completion (`fill_templates`).
    """

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
        # The first token cannot be a label, because no token is before it.
        return {"tokens": tokens, "mask": mask} if mask[1:].any() else None


class Seq2SeqRecords(Records):
    """Text-to-text records: {"source", "target"}, both ending with eos.

    The target is the last answer, the source everything before it. A truncated target has no eos.

    Args:
        paths: Files, directories or globs.
        tokenizer: The tokenizer.
        length: Maximum number of source tokens.
        answer: Maximum number of target tokens; 0: `length`.
        forms: Templates of prompt and completion (`fill_templates`).
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

    def texts(self, record: Record, location: str) -> list[str]:
        *before, last = messages_of(fill_templates(record, self.forms))
        if last["role"] != "assistant" or not before:
            raise UserError("a text-to-text record needs a prompt and an answer after it")
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
    """Yield the group of each dialogue (`Records.group`) and the texts of its messages, to train a tokenizer on."""
    for location, record in readers.records(paths):
        with _with_location(location):
            messages = messages_of(fill_templates(record, forms))
        yield first_prompt(messages), [message["content"] for message in messages]


def first_prompt(messages: Sequence[chat.Message]) -> str:
    """Return the turns before the first answer to a user, as one text; the whole dialogue if nothing is answered.

    Dialogues that continue the same beginning share it, and so do the answers of a preference.

    >>> hello, hi = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}
    >>> first_prompt([hello, hi]) == first_prompt([hello, hi, hello]) == first_prompt([hello])
    True
    """
    users = [i for i, message in enumerate(messages) if message["role"] not in ("system", "assistant")]
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and users and i > users[0]]
    end = answers[0] if answers else len(messages)
    return json.dumps([[message["role"], message["content"]] for message in messages[:end]])


def fill_templates(record: Record, forms: tuple[str, str]) -> Record:
    """Return a record with a prompt and a completion made from its fields; the record itself without templates.

    >>> fill_templates({"en": "otter", "fr": "loutre"}, ("in French: {en}", "{fr}"))
    {'prompt': 'in French: otter', 'completion': 'loutre'}
    """
    if not any(forms):
        return record
    prompt, answer = forms
    if not prompt or not answer:
        raise UserError("examples.prompt_template and examples.completion_template must be set together")
    return {"prompt": fill_template(prompt, record), "completion": fill_template(answer, record)}


class PreferenceRecords(Records):
    """Two answers to one prompt, one of them preferred: {"chosen_tokens", "chosen_mask", "rejected_tokens", ..., "margin" (1,)}.

    "margin" is the number of that name in the record, by which the chosen answer is better, or NaN. The masks are True on the
    answers and their stop tokens only, not on assistant turns in the prompt. A pair is left out as unanswered if `length`
    leaves no room for one of its answers, or if the answers are equal.
    """

    columns: ClassVar[dict[str, type]] = {
        "chosen_tokens": np.int32, "chosen_mask": np.bool_, "rejected_tokens": np.int32, "rejected_mask": np.bool_,
        "margin": np.float32,
    }  # fmt: skip

    def group(self, record: Record) -> str:
        prompt, chosen, _ = comparison(record)
        return first_prompt([*prompt, *chosen])

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        prompt, *answers = comparison(record)
        prompt_length = len(chat.encode(self.tokenizer, prompt)[0])
        output: Example = {"margin": np.array([_margin(record)])}
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            tokens, mask = chat.encode(self.tokenizer, [*prompt, *answer])
            mask &= np.arange(len(tokens)) >= prompt_length
            output |= {f"{side}_tokens": self.fit(tokens, self.length), f"{side}_mask": mask[: self.length]}
        answered = output["chosen_mask"].any() and output["rejected_mask"].any()
        differ = not np.array_equal(output["chosen_tokens"], output["rejected_tokens"])
        return output if answered and differ else None


def _margin(record: Record) -> float:
    """Return the `margin` of a preference; NaN where it has none."""
    margin = record.get("margin")
    if margin in (None, ""):
        return math.nan
    try:
        found = float(margin)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise UserError(f"the `margin` of a preference must be a number, not {margin!r:.60}")
    return found


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt, and what a reward function may need to know of it.

    Args:
        tokens: The dialogue up to its last answer, followed by the start of the assistant's turn: (n,).
        fields: The fields of its record; "prompt" is the text of the dialogue, without the chat template.
        location: File and line of the record.
    """

    tokens: np.ndarray
    fields: Record
    location: str


def prompts(
    paths: Sequence[str], tokenizer: Tokenizer, length: int
) -> tuple[list[Prompt], np.ndarray, Mapping[str, int]]:
    """Read prompts.

    A prompt of more than `length` tokens is left out, because without its end it would be another question.

    Returns:
        The prompts; the `content_key` of each, (n,) uint64, which is that of a dialogue or a preference with
        this prompt, so a prompt held out in one stage is held out in the next; and the counts of `records`, `too_long` and
        `unanswered`.

    Raises:
        UserError: There is no prompt.
    """
    found, keys, counts = [], array("Q"), Counter[str]()
    for location, record in readers.records(paths):
        with _with_location(location):
            messages = prompt_of(record)
            tokens, _ = chat.encode(tokenizer, messages, open=True)
        counts["records"] += 1
        if messages and len(tokens) <= length:
            text = "\n\n".join(message["content"] for message in messages)
            found.append(Prompt(tokens, {**record, "prompt": text}, location))
            keys.append(content_key(first_prompt(messages)))
        else:
            counts["too_long" if messages else "unanswered"] += 1
    if not found:
        raise UserError(
            f"{', '.join(paths)}: there is no prompt of at most {length} tokens; the counts are {dict(counts)}"
        )
    return found, np.array(keys, np.uint64), counts


@contextmanager
def _with_location(location: str) -> Iterator[None]:
    """Prefix errors with the file and line of the record."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(location) else f"{location}: {error}") from None
