"""Questions about a passage, answered by a span of it (SQuAD 1.1 and 2.0; Rajpurkar 2016, 2018).

    {"context": "... written by Anne Lee in 1901.", "question": "Who wrote it?", "answers": [{"text": "Anne Lee", "start": 15}]}
    [CLS] who wrote it ? [SEP] ... written by anne lee in 1901 . [SEP]                  start, end: places of tokens

A passage that does not fit is read in windows, `stride` tokens from one to the next (BERT's run_squad), and at least half of
each again in the next; in a window without the whole answer, and for a question without one, start and end are -1. An
answer that does not stand in the passage where the record says is left out, counted and named, and so is a question of
SQuAD 1.1 whose answers are lost; so are questions without any answer, from which a model learns to say that there is none.

The questions are kept as they were written, in a temporary file: SQuAD's measures are of whole questions and of their text.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from firth.corpora import readers
from firth.data import layout
from firth.data.records import LEFT_OUT, Column, Record, Records
from firth.tokenizer.normalize import replace_lone_surrogates
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import Example, UserError


@dataclass(frozen=True)
class QuestionWindow:
    """A question as it was written: what an answer is cut from, and the texts that are right (none: it has no answer)."""

    context: str
    right: tuple[str, ...]


class QuestionRecords(Records):
    """Windows: {"tokens", "token_type_ids", "start", "end"}; `owners` says which question each is of.

    question: its most tokens; a longer one is cut. keep: read questions whose answers are not where they are said to be, too:
    they are not learnt from, but answered and compared by their text.
    """

    columns: ClassVar[dict[str, type]] = {
        "tokens": np.int32, "token_type_ids": np.uint8, "place": np.int32, "offsets": np.int32,
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
        asked: bool = True,
        keep: bool = False,
    ) -> None:
        self.stride, self.question, self._context, self.asked = stride, question, context, asked
        self.keep = keep
        self.unanswerable = self.questions = 0
        self._contexts, self._rights, self._contexts_of = Column(np.uint8), Column(np.uint8), array("q")
        self._passage = 0
        self._passages = array("q")
        self._latest: tuple[str, tuple[np.ndarray, np.ndarray]] = ("", (np.zeros(0), np.zeros((0, 2))))
        if length < question + 8:
            raise UserError(
                f"examples.max_length={length} leaves no room for a passage behind a question of {question} tokens"
            )
        super().__init__(paths, tokenizer, length)
        self._contexts.close()
        self._rights.close()

    @property
    def said(self) -> Mapping[str, str]:
        if not self.keep:
            return super().said
        kept = (
            "answer{s} {do} not stand in {their} passage where {they} {are} said to, and {are} compared by {their} text"
        )
        return {**super().said, "misplaced": kept}

    def asked_of(self, number: int) -> QuestionWindow:
        """The question of a record, from 0, as it was written."""
        context, right = self._contexts[self._contexts_of[number]], self._rights[number]
        return QuestionWindow(context.tobytes().decode(), tuple(json.loads(right.tobytes())))

    def metadata(self, index: int) -> Mapping[str, Any]:
        """The question of a window, and where its tokens stand in the passage."""
        return {"asked": self.asked_of(self._owners[index]), "offsets": self.offsets(index)}

    def __getitem__(self, index: int) -> Example:
        example = super().__getitem__(index)
        start, end = example["place"].tolist()
        return {"tokens": example["tokens"], "token_type_ids": example["token_type_ids"], "start": start, "end": end}

    @property
    def limits(self) -> Mapping[str, int]:
        return {"long_questions": self.question}

    def offsets(self, index: int) -> np.ndarray:
        """Where in the passage the word of each token of a window is: (n, 2) characters, -1 for what is not of the passage."""
        return self._columns["offsets"][index].reshape(-1, 2)

    def group(self, record: Record) -> str:
        return str(record[self._context])

    def texts(self, record: Record, place: str) -> list[str]:
        return [readers.text_field(record, "question", place).strip()]

    def examples(self, record: Record, encoded: list[np.ndarray]) -> Sequence[Example]:
        context = replace_lone_surrogates(readers.text_field(record, self._context, self._place))
        context = (
            self._latest[0] if context == self._latest[0] else context
        )  # one object for all questions of a passage
        given = answers_of(record) if self.asked else []
        there = [(text, start) for text, start in given if context.startswith(text, start)]
        for _ in range(len(given) - len(there)):
            self.note("misplaced")
        if self.asked and record.get("answers", given) is None:
            self.note("lost")
            given, lost = [], True
        else:
            lost = False
        if context != self._latest[0] or not self._passage:  # a passage has several questions, one after the other
            tokens, spans = self.tokenizer.spans(context)
            self._latest = (context, (tokens, without_blanks(spans, context)))
            self._passage += 1
            self._contexts.append(np.frombuffer(context.encode(), np.uint8))
        right = json.dumps(list(dict.fromkeys(text for text, _ in given))).encode()
        self._rights.append(np.frombuffer(right, np.uint8))
        self._contexts_of.append(self._passage - 1)
        self.questions += 1
        if lost:
            return LEFT_OUT
        if given and not there and not self.keep:
            return []
        if self.asked and not given:
            self.unanswerable += 1
            if not self.keep:
                self.note("unanswerable")
        tokens, spans = self._latest[1]
        asked = self.fit(encoded[0], self.question, "long_questions")
        first, last = _tokens(spans, there[0]) if there else (-1, -1)
        cuts = self._cuts(len(asked), len(tokens))
        self._passages.extend([self._passage] * len(cuts))
        return [self._window(asked, tokens[a:b], spans[a:b], first - a, last - a) for a, b in cuts]

    def _cuts(self, asked: int, n: int) -> list[tuple[int, int]]:
        """The windows of a passage of n tokens: together they hold all of it."""
        room = self.length - asked - 3
        step = max(1, min(self.stride, room // 2))
        starts = range(0, max(1, n - room + step), step)
        return [(a, min(a + room, n)) for a in starts]

    def _window(self, asked: np.ndarray, tokens: np.ndarray, spans: np.ndarray, first: int, last: int) -> Example:
        shown = layout.pair(asked, tokens, self.tokenizer.vocab)
        before = len(asked) + 2
        inside = first >= 0 and last < len(tokens)
        place = (first + before, last + before) if inside else (-1, -1)
        offsets = np.full((len(shown["tokens"]), 2), -1)
        offsets[before : before + len(tokens)] = spans
        return shown | {"place": np.array(place), "offsets": offsets.ravel()}


def without_blanks(spans: np.ndarray, text: str) -> np.ndarray:
    """Return where the words of tokens are in a text: byte-level tokens and SentencePiece's begin with the blank before theirs.

    Args:
        spans: (n, 2) characters, in the order of the text.
        text: The text.

    Returns:
        (n, 2) characters without white space at either end; a token of white space alone is empty, and at its own end.

    >>> without_blanks(np.array([[0, 2], [2, 8], [8, 9]]), "an otter ").tolist()
    [[0, 2], [3, 8], [9, 9]]
    """
    blank = np.array([character.isspace() for character in text] + [False])
    place = np.arange(len(blank))
    following = np.minimum.accumulate(np.where(blank, len(text), place)[::-1])[::-1]
    before = np.maximum.accumulate(np.concatenate(([0], np.where(blank[:-1], 0, place[1:]))))
    starts = np.minimum(following[spans[:, 0]], spans[:, 1])
    return np.stack((starts, np.maximum(before[spans[:, 1]], starts)), 1)


def _tokens(spans: np.ndarray, answer: tuple[str, int]) -> tuple[int, int]:
    """The first and the last token of an answer: those that reach into it."""
    text, start = answer
    last = int(np.searchsorted(spans[:, 0], start + len(text), "left")) - 1
    return int(np.searchsorted(spans[:, 1], start, "right")), last


def answers_of(record: Record) -> list[tuple[str, int]]:
    """(text, character) of each answer: as SQuAD has them, or as a data set's columns have; none where there is none.

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
    for one in given if isinstance(given, list) else [given]:
        start = one.get("start", one.get("answer_start")) if isinstance(one, dict) else None
        if type(start) is not int or not isinstance(one.get("text"), str):
            raise UserError(f"an answer needs a 'text' and the character it starts at, and this is {one!r:.60}")
        if one["text"]:
            found.append((replace_lone_surrogates(one["text"]), start))
    return found
