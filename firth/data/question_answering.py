"""Extractive questions about a passage (SQuAD 1.1 and 2.0; Rajpurkar 2016, 2018).

    {"context": "... written by Anne Lee in 1901.", "question": "Who wrote it?", "answers": [{"text": "Anne Lee", "start": 15}]}
    [CLS] who wrote it ? [SEP] ... written by anne lee in 1901 . [SEP]                  start, end: indices of tokens

A passage that is too long is split into windows that start `stride` tokens from each other (BERT's run_squad) and overlap by at
least half. In a window without the whole answer, and for a question without an answer, start and end are -1. An answer that is
not in the passage at the given character is dropped, counted and reported, and so is a question of SQuAD 1.1 whose answers are
missing. Questions without an answer are reported, because a model learns from them that there may be none.

The original questions are kept in a temporary file, because SQuAD's metrics are computed on whole questions and their text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from firth.corpora import readers
from firth.corpora.input_files import ReadStats
from firth.data import attention_fields
from firth.data.examples import BuildContext
from firth.data.labeled import NamedFieldsConfig
from firth.data.records import OMITTED, Purpose, Record, Records
from firth.fields import TokenCount
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import Vocab, replace_lone_surrogates
from firth.types import DataStats, Example, UserError


@dataclass(frozen=True)
class QuestionText:
    """The original text of a question.

    Args:
        context: The passage.
        right: Texts of the right answers; empty: the question has no answer.
    """

    context: str
    right: tuple[str, ...]


@dataclass(frozen=True)
class QuestionsConfig(NamedFieldsConfig):
    """Questions about a passage, answered by a span of it (extractive question answering), in windows of the passage.

    An example is {"tokens", "token_type_ids", "start", "end"}; `Records.record_ids` has the question of each. Without validation
    files, whole passages are held out. In evaluation, questions whose answers are not at the given character are kept: they have no
    labels, but are answered and compared by their text.

    Args:
        max_length: The most tokens of a window with the question.
        doc_stride: Tokens from one window of a long passage to the next.
        max_question_length: The most tokens of a question; a longer one is truncated.
        context_field: The field of the passage.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "token_type_ids", "start", "end"})
    columns: ClassVar[Mapping[str, type]] = {
        "tokens": np.int32, "token_type_ids": np.uint8, "answer_span": np.int32, "offsets": np.int32,
    }  # fmt: skip

    max_length: TokenCount = 384
    doc_stride: TokenCount = 128
    max_question_length: TokenCount = 64
    context_field: str = "context"

    @property
    def read_fields(self) -> tuple[str, ...]:
        return (self.context_field, "question")

    @property
    def limits(self) -> Mapping[str, int]:
        return {"long_questions": self.max_question_length}

    def note_templates(self, purpose: Purpose) -> Mapping[str, str]:
        if purpose == "train":
            return {}
        kept = "answer{s} {are} not in {their} passage at the given character, and {are} compared by {their} text"
        return {"misplaced": kept}

    def read(self, paths: Sequence[str], counts: ReadStats, labeled: bool = True) -> Iterator[tuple[str, Record]]:
        if self.max_length < self.max_question_length + 8:
            raise UserError(
                f"examples.max_length={self.max_length} leaves no room for a passage after a question of {self.max_question_length} tokens"
            )
        return super().read(paths, counts, labeled)

    def texts(self, record: Record, labeled: bool = True) -> list[str]:
        return [readers.text_field(record, "question").strip()]

    def examples(self, record: Record, encoded: list[np.ndarray], records: Records) -> Sequence[Example]:
        context = replace_lone_surrogates(readers.text_field(record, self.context_field))
        given = answers_of(record) if records.labeled else []
        found = [(text, start) for text, start in given if context.startswith(text, start)]
        for _ in range(len(given) - len(found)):
            records.note("misplaced")
        lost = records.labeled and record.get("answers", given) is None
        records.keep_text("context", context)
        records.keep_text("right", json.dumps([] if lost else list(dict.fromkeys(text for text, _ in given))))
        if lost:
            records.note("lost")
            return OMITTED
        if given and not found and records.purpose == "train":
            return []
        if not given and records.purpose == "train":
            records.note("unanswerable")
        tokens, spans = records.for_text(context, lambda: _passage(context, records.tokenizer))
        question_tokens = records.fit(encoded[0], self.max_question_length, "long_questions")
        first, last = _tokens(spans, found[0]) if found else (-1, -1)
        vocab = records.tokenizer.vocab
        return [
            _window(question_tokens, tokens[a:b], spans[a:b], first - a, last - a, vocab)
            for a, b in self._window_bounds(len(question_tokens), len(tokens))
        ]

    def _window_bounds(self, num_question_tokens: int, n: int) -> list[tuple[int, int]]:
        """Return the windows of a passage of n tokens, which together cover it."""
        room = self.max_length - num_question_tokens - 3
        step = max(1, min(self.doc_stride, room // 2))
        starts = range(0, max(1, n - room + step), step)
        return [(a, min(a + room, n)) for a in starts]

    def to_example(self, arrays: Example, records: Records) -> Example:
        start, end = arrays["answer_span"].tolist()
        return {"tokens": arrays["tokens"], "token_type_ids": arrays["token_type_ids"], "start": start, "end": end}

    def metadata(self, index: int, records: Records) -> Mapping[str, Any]:
        """Return the question of a window, and the characters of its tokens in the passage."""
        return {"question": question_of(records, records.record_of(index)), "offsets": offsets_of(records, index)}

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return whether a question may be unanswerable, from the training records."""
        return DataStats(has_unanswerable=any(has_unanswerable(found) for _, found in self.training_records(data)))


def _passage(context: str, tokenizer: Tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens of a passage and the characters of each, without white space."""
    tokens, spans = tokenizer.spans(context)
    return tokens, trim_whitespace(spans, context)


def question_of(records: Records, number: int) -> QuestionText:
    """Return the original text of a question, by the number of its record from 0."""
    return QuestionText(records.text_of("context", number), tuple(json.loads(records.text_of("right", number))))


def offsets_of(records: Records, index: int) -> np.ndarray:
    """Return the characters of the word of each token of a window in the passage: (n, 2), -1 outside of the passage."""
    return records.column("offsets")[index].reshape(-1, 2)


def has_unanswerable(records: Records) -> bool:
    """Return whether a question with labels has no answer."""
    numbers = np.unique(records.record_ids).tolist()
    return records.labeled and any(records.text_of("right", number) == "[]" for number in numbers)


def _window(
    question_tokens: np.ndarray, tokens: np.ndarray, spans: np.ndarray, first: int, last: int, vocab: Vocab
) -> Example:
    window = attention_fields.pair(question_tokens, tokens, vocab)
    before = len(question_tokens) + 2
    inside = first >= 0 and last < len(tokens)
    answer_span = (first + before, last + before) if inside else (-1, -1)
    offsets = np.full((len(window["tokens"]), 2), -1)
    offsets[before : before + len(tokens)] = spans
    return window | {"answer_span": np.array(answer_span), "offsets": offsets.ravel()}


def trim_whitespace(spans: np.ndarray, text: str) -> np.ndarray:
    """Trim white space from the spans of tokens: byte-level and SentencePiece tokens include the space before their word.

    Args:
        spans: Characters of the tokens, (n, 2), in the order of the text.
        text: The text.

    Returns:
        (n, 2) characters without white space at either end; a token of white space alone becomes empty, at its end.

    >>> trim_whitespace(np.array([[0, 2], [2, 8], [8, 9]]), "an otter ").tolist()
    [[0, 2], [3, 8], [9, 9]]
    """
    is_blank = np.array([character.isspace() for character in text] + [False])
    index = np.arange(len(is_blank))
    following = np.minimum.accumulate(np.where(is_blank, len(text), index)[::-1])[::-1]
    before = np.maximum.accumulate(np.concatenate(([0], np.where(is_blank[:-1], 0, index[1:]))))
    starts = np.minimum(following[spans[:, 0]], spans[:, 1])
    return np.stack((starts, np.maximum(before[spans[:, 1]], starts)), 1)


def _tokens(spans: np.ndarray, answer: tuple[str, int]) -> tuple[int, int]:
    """Return the first and the last token that overlap an answer."""
    text, start = answer
    last = int(np.searchsorted(spans[:, 0], start + len(text), "left")) - 1
    return int(np.searchsorted(spans[:, 1], start, "right")), last


def answers_of(record: Record) -> list[tuple[str, int]]:
    """Return (text, character) of each answer, in SQuAD's format or that of a data set's columns; [] without answers.

    >>> answers_of({"answers": {"text": ["Anne"], "answer_start": [3]}})
    [('Anne', 3)]
    """
    given: Any = record.get("answers") or []
    if isinstance(given, dict):
        texts, starts = given.get("text"), given.get("answer_start", given.get("start"))
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise UserError("the field 'answers' needs as many 'text' as 'answer_start', in two lists")
        given = [{"text": text, "start": start} for text, start in zip(texts, starts, strict=True)]
    found = []
    for answer in given if isinstance(given, list) else [given]:
        start = answer.get("start", answer.get("answer_start")) if isinstance(answer, dict) else None
        if type(start) is not int or not isinstance(answer.get("text"), str):
            raise UserError(
                f"an answer needs a 'text' and the character where it starts, and this answer is {answer!r:.60}"
            )
        if answer["text"]:
            found.append((replace_lone_surrogates(answer["text"]), start))
    return found
