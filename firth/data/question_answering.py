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
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from firth.corpora import readers
from firth.data import attention_fields
from firth.data.records import OMITTED, ArrayColumn, Record, Records
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.types import Example, UserError


@dataclass(frozen=True)
class QuestionWindow:
    """The original text of a question.

    Args:
        context: The passage.
        right: Texts of the right answers; empty: the question has no answer.
    """

    context: str
    right: tuple[str, ...]


class QuestionRecords(Records):
    """Windows of questions: {"tokens", "token_type_ids", "start", "end"}; `record_ids` has the question of each.

    Args:
        paths: Files, directories or globs.
        tokenizer: The tokenizer.
        length: Maximum number of tokens of a window.
        stride: Tokens from one window to the next.
        question: Maximum number of tokens of a question; a longer one is truncated.
        context: Name of the field with the passage.
        labeled: Whether the records have answers.
        keep: Whether to keep questions whose answers are not at the given character. They have no labels, but are answered and
            compared by their text.
    """

    columns: ClassVar[dict[str, type]] = {
        "tokens": np.int32, "token_type_ids": np.uint8, "answer_span": np.int32, "offsets": np.int32,
    }  # fmt: skip

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: Tokenizer,
        length: int,
        *,
        stride: int = 128,
        question: int = 64,
        context: str = "context",
        labeled: bool = True,
        keep: bool = False,
    ) -> None:
        self.stride, self.question, self._context, self.labeled = stride, question, context, labeled
        self.keep = keep
        self.unanswerable = self.questions = 0
        self._contexts, self._right_answers, self._contexts_of = (
            ArrayColumn(np.uint8),
            ArrayColumn(np.uint8),
            array("q"),
        )
        self._num_passages = 0
        self._latest: tuple[str, tuple[np.ndarray, np.ndarray]] = ("", (np.zeros(0), np.zeros((0, 2))))
        if length < question + 8:
            raise UserError(
                f"examples.max_length={length} leaves no room for a passage after a question of {question} tokens"
            )
        super().__init__(paths, tokenizer, length)
        self._contexts.close()
        self._right_answers.close()

    @property
    def note_templates(self) -> Mapping[str, str]:
        if not self.keep:
            return super().note_templates
        kept = "answer{s} {are} not in {their} passage at the given character, and {are} compared by {their} text"
        return {**super().note_templates, "misplaced": kept}

    def question_of(self, number: int) -> QuestionWindow:
        """Return the original text of a record's question, by its number from 0."""
        context, right = self._contexts[self._contexts_of[number]], self._right_answers[number]
        return QuestionWindow(context.tobytes().decode(), tuple(json.loads(right.tobytes())))

    def metadata(self, index: int) -> Mapping[str, Any]:
        """Return the question of a window, and the characters of its tokens in the passage."""
        return {"question": self.question_of(self._record_ids[index]), "offsets": self.offsets(index)}

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        start, end = example["answer_span"].tolist()
        return {"tokens": example["tokens"], "token_type_ids": example["token_type_ids"], "start": start, "end": end}

    @property
    def limits(self) -> Mapping[str, int]:
        return {"long_questions": self.question}

    def offsets(self, index: int) -> np.ndarray:
        """Return the characters of the word of each token of a window in the passage: (n, 2), -1 outside of the passage."""
        return self._columns["offsets"][index].reshape(-1, 2)

    def group(self, record: Record) -> str:
        return str(record[self._context])

    def texts(self, record: Record, location: str) -> list[str]:
        return [readers.text_field(record, "question", location).strip()]

    def examples(self, record: Record, encoded: list[np.ndarray]) -> Sequence[Example]:
        context = replace_lone_surrogates(readers.text_field(record, self._context, self._location))
        context = (
            self._latest[0] if context == self._latest[0] else context
        )  # one object for all questions of a passage
        given = answers_of(record) if self.labeled else []
        found = [(text, start) for text, start in given if context.startswith(text, start)]
        for _ in range(len(given) - len(found)):
            self.note("misplaced")
        if self.labeled and record.get("answers", given) is None:
            self.note("lost")
            given, lost = [], True
        else:
            lost = False
        if context != self._latest[0] or not self._num_passages:  # a passage has several questions, one after the other
            tokens, spans = self.tokenizer.spans(context)
            self._latest = (context, (tokens, trim_whitespace(spans, context)))
            self._num_passages += 1
            self._contexts.append(np.frombuffer(context.encode(), np.uint8))
        right = json.dumps(list(dict.fromkeys(text for text, _ in given))).encode()
        self._right_answers.append(np.frombuffer(right, np.uint8))
        self._contexts_of.append(self._num_passages - 1)
        self.questions += 1
        if lost:
            return OMITTED
        if given and not found and not self.keep:
            return []
        if self.labeled and not given:
            self.unanswerable += 1
            if not self.keep:
                self.note("unanswerable")
        tokens, spans = self._latest[1]
        question_tokens = self.fit(encoded[0], self.question, "long_questions")
        first, last = _tokens(spans, found[0]) if found else (-1, -1)
        bounds = self._window_bounds(len(question_tokens), len(tokens))
        return [self._window(question_tokens, tokens[a:b], spans[a:b], first - a, last - a) for a, b in bounds]

    def _window_bounds(self, num_question_tokens: int, n: int) -> list[tuple[int, int]]:
        """Return the windows of a passage of n tokens, which together cover it."""
        room = self.length - num_question_tokens - 3
        step = max(1, min(self.stride, room // 2))
        starts = range(0, max(1, n - room + step), step)
        return [(a, min(a + room, n)) for a in starts]

    def _window(
        self, question_tokens: np.ndarray, tokens: np.ndarray, spans: np.ndarray, first: int, last: int
    ) -> Example:
        window = attention_fields.pair(question_tokens, tokens, self.tokenizer.vocab)
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
