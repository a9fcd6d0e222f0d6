"""Several answers to one prompt in order of preference, for a reward model.

`docs/reference/data-formats.md` lists the record formats.

>>> prompt, answers, rank = ranking({"prompt": "Hi", "answers": ["No", "Hello", "Hey"], "ranks": [2, 1, 1]})
>>> [answer[0]["content"] for answer in answers], rank
(['No', 'Hello', 'Hey'], [1, 0, 0])
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from firth.data.conversations import comparison
from firth.data.dialogues import first_prompt
from firth.data.examples import BuildContext
from firth.data.records import Record, Records, RecordsConfig
from firth.fields import TokenCount
from firth.tokenizer import chat
from firth.tokenizer.chat import Message
from firth.types import DataStats, Example, UserError

LISTS = ("answers", "responses", "completions")
"""Fields that hold the answers."""

TEXTS = ("answer", "response", "text", "completion")
"""Fields of an answer object that may hold its text."""

RANKS, SCORES = ("rank", "ranks"), ("score", "overall_score", "scores")
"""Fields of a record or of an answer. The lowest rank and the highest score are the best."""


def ranking(record: Record) -> tuple[list[Message], list[list[Message]], list[int]]:
    """Return the prompt, the answers, and the rank of each answer from 0, the best; equal ranks are ties.

    Raises:
        UserError: The record is not a ranking, or a field is not supported.
    """
    name = next((name for name in LISTS if isinstance(record.get(name), list)), "")
    if not name or len(record[name]) < 2:
        raise UserError(
            "a ranking needs a prompt and a list of at least two `answers`, the best first or with `ranks` or `scores`; "
            f"this record has {', '.join(record) or 'nothing'}"
        )
    listed: list[Any] = record[name]
    rest = {key: value for key, value in record.items() if key not in (name, *RANKS, *SCORES)}
    values = [_text(answer) for answer in listed]
    prompt: list[Message] = []
    answers: list[list[Message]] = []
    for value in values[1:]:
        prompt, first, other = comparison(rest | {"chosen": values[0], "rejected": value})
        answers = [*(answers or [first]), other]
    return prompt, answers, _order(record, listed)


def _text(answer: Any) -> Any:
    """Return the text of an answer in the list: the answer itself, or one of its fields."""
    if not isinstance(answer, Mapping) or "role" in answer or "from" in answer:
        return answer
    name = next((name for name in TEXTS if name in answer), "")
    if not name:
        raise UserError(
            f"an answer of a ranking has none of the fields {', '.join(TEXTS)}: its fields are {', '.join(answer)}"
        )
    return answer[name]


def _order(record: Record, listed: Sequence[Any]) -> list[int]:
    """Return ranks from 0, by the ranks or scores of the record or of its answers, else by the order of the answers."""
    for names, sign in ((RANKS, 1.0), (SCORES, -1.0)):
        for name in names:
            numbers = record.get(name)
            if numbers is None and any(isinstance(answer, Mapping) and name in answer for answer in listed):
                numbers = [answer.get(name) if isinstance(answer, Mapping) else None for answer in listed]
            if numbers is None:
                continue
            if not isinstance(numbers, list) or len(numbers) != len(listed) or not all(map(_finite, numbers)):
                raise UserError(f"`{name}` of a ranking needs one number for each of its {len(listed)} answers")
            return [int(rank) for rank in np.unique(sign * np.array(numbers, np.float64), return_inverse=True)[1]]
    return list(range(len(listed)))


def _finite(number: Any) -> bool:
    return isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)


@dataclass(frozen=True)
class RankingsConfig(RecordsConfig):
    """Records with a prompt and several answers in order of preference: {"answers": K rows of tokens, "masks": K, "rank": (K,)}.

    The masks are True on the answers and their stop tokens only. A ranking is left out as unanswered if `max_length` leaves no
    room for one of its answers, or if all answers are tied.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"answers", "masks", "rank"})
    columns: ClassVar[Mapping[str, type]] = {
        "tokens": np.int32, "mask": np.bool_, "lengths": np.int64, "rank": np.int64,
    }  # fmt: skip

    max_length: TokenCount = 256

    def group(self, record: Record) -> str:
        prompt, answers, _ = ranking(record)
        return first_prompt([*prompt, *answers[0]])

    def tokenizer_texts_of(self, record: Record) -> list[str]:
        prompt, answers, _ = ranking(record)
        return [message["content"] for messages in (prompt, *answers) for message in messages]

    def example(self, record: Record, encoded: list[np.ndarray], records: Records) -> Example | None:
        prompt, answers, rank = ranking(record)
        prompt_length = len(chat.encode(records.tokenizer, prompt)[0])
        rows, masks = [], []
        for answer in answers:
            tokens, mask = chat.encode(records.tokenizer, [*prompt, *answer])
            mask &= np.arange(len(tokens)) >= prompt_length
            rows.append(records.fit(tokens, self.max_length))
            masks.append(mask[: self.max_length])
        if not all(mask.any() for mask in masks) or len(set(rank)) < 2:
            return None
        return {
            "tokens": np.concatenate(rows), "mask": np.concatenate(masks), "rank": np.array(rank),
            "lengths": np.array([len(row) for row in rows]),
        }  # fmt: skip

    def to_example(self, arrays: Example, records: Records) -> Example:
        ends = np.cumsum(arrays["lengths"])[:-1]
        return {
            "answers": np.split(arrays["tokens"], ends), "masks": np.split(arrays["mask"], ends), "rank": arrays["rank"],
        }  # fmt: skip

    def stats(self, data: BuildContext, class_names: Sequence[str] = ()) -> DataStats:
        """Return the most answers of a ranking, which is the number of rows per example."""
        return DataStats(max_options=self.longest(data, "rank"))
