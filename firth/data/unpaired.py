"""Answers that are labeled desirable or undesirable, without a pair, for KTO.

`docs/reference/data-formats.md` lists the record formats.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from firth.data.conversations import unpaired
from firth.data.records import Record, Records, first_prompt
from firth.data.source import Source, WrappedSource
from firth.tokenizer import chat
from firth.types import Example


class UnpairedPreferenceRecords(Records):
    """A prompt and an answer with its label: {"tokens", "mask", "desirable" (1,)}.

    The mask is True on the last answer and its stop token only. A record is left out as unanswered if `length` leaves no room
    for its answer.
    """

    columns: ClassVar[dict[str, type]] = {"tokens": np.int32, "mask": np.bool_, "desirable": np.bool_}

    def group(self, record: Record) -> str:
        prompt, answer, _ = unpaired(record)
        return first_prompt([*prompt, *answer])

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        prompt, answer, desirable = unpaired(record)
        tokens, mask = chat.encode(self.tokenizer, [*prompt, *answer])
        mask &= np.arange(len(tokens)) >= len(chat.encode(self.tokenizer, prompt)[0])
        tokens, mask = self.fit(tokens, self.length), mask[: self.length]
        return {"tokens": tokens, "mask": mask, "desirable": np.array([desirable])} if mask.any() else None


class MismatchedAnswers(WrappedSource):
    """A source that adds to each example the answer to another prompt, after its own: "mismatched_tokens", "mismatched_mask".

    The log-ratios of these rows estimate the KL of KTO. Each answer is the mismatched one of one example. It is the answer to
    another prompt for all examples, unless one prompt has more than half of them.

    Args:
        source: Examples with "tokens" and "mask".
        length: Maximum number of tokens of a row; a longer one is truncated at the end.
    """

    def __init__(self, source: Source, length: int) -> None:
        super().__init__(source)
        self.length = length
        # In the order of their prompts, an answer that is as far away as the largest group is large has another prompt.
        order = np.argsort(source.group_ids, kind="stable")
        largest = int(np.unique(source.group_ids, return_counts=True)[1].max())
        self._partner = np.empty_like(order)
        self._partner[order] = np.roll(order, -max(1, min(largest, len(order) // 2)))

    def __getitem__(self, index: int) -> Example:
        own, other = self.source[index], self.source[int(self._partner[index])]
        prompt = own["tokens"][: np.flatnonzero(own["mask"])[0]]
        at = np.flatnonzero(other["mask"])[0]
        tokens = np.concatenate((prompt, other["tokens"][at:]))[: self.length]
        mask = np.concatenate((np.zeros(len(prompt), bool), other["mask"][at:]))[: self.length]
        return own | {"mismatched_tokens": tokens, "mismatched_mask": mask}
