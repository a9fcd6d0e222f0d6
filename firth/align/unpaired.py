"""Answers that are labeled desirable or undesirable, without a pair, for KTO.

`docs/reference/data-formats.md` lists the record formats.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from firth.align.precompute import with_ref_logprobs
from firth.data.conversations import unpaired
from firth.data.dialogues import first_prompt
from firth.data.examples import BuildContext, DatasetSplits
from firth.data.records import Record, Records, RecordsConfig
from firth.data.source import Source, WrappedSource
from firth.fields import TokenCount
from firth.objectives.objective import Objective
from firth.objectives.preferences import KTO, build_mismatched
from firth.tokenizer import chat
from firth.types import Example


@dataclass(frozen=True)
class UnpairedPreferencesConfig(RecordsConfig):
    """Records with a prompt, an answer, and a label that says whether it is desirable, for KTO.

    Stored are {"tokens", "mask", "desirable" (1,)}, the mask True on the last answer and its stop token only. Each is shown with the
    answer to another prompt (`MismatchedAnswers`), and with the log-probabilities of both under the reference model (`init_from`). A
    record is left out as unanswered if `max_length` leaves no room for its answer.
    """

    base_fields: ClassVar[frozenset[str]] = KTO.inputs
    required_fields: ClassVar[frozenset[str]] = frozenset({"desirable"})
    columns: ClassVar[Mapping[str, type]] = {"tokens": np.int32, "mask": np.bool_, "desirable": np.bool_}

    max_length: TokenCount = 256

    def group(self, record: Record) -> str:
        prompt, answer, _ = unpaired(record)
        return first_prompt([*prompt, *answer])

    def tokenizer_texts_of(self, record: Record) -> list[str]:
        prompt, answer, _ = unpaired(record)
        return [message["content"] for message in (*prompt, *answer)]

    def example(self, record: Record, encoded: list[np.ndarray], records: Records) -> Example | None:
        prompt, answer, desirable = unpaired(record)
        tokens, mask = chat.encode(records.tokenizer, [*prompt, *answer])
        mask &= np.arange(len(tokens)) >= len(chat.encode(records.tokenizer, prompt)[0])
        tokens, mask = records.fit(tokens, self.max_length), mask[: self.max_length]
        return {"tokens": tokens, "mask": mask, "desirable": np.array([desirable])} if mask.any() else None

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        plain = super().build(data, objective)
        held = MismatchedAnswers(plain.validation, self.max_length) if plain.validation is not None else None
        paired = replace(plain, train=MismatchedAnswers(plain.train, self.max_length), validation=held)
        return with_ref_logprobs(paired, data, build_mismatched)


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
