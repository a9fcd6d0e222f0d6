"""Prompts of text to text without their answers, for a model to write these: {"source", "target": its end alone}.

    {"prompt": "translate to French: otter"}        as they stand
    {"en": "otter"}                                 with the form "translate to French: {en}"
    {"messages": [...]}                             all before the last answer, if there is one

Of `Prompted` all but the answer: what a model was trained to read is read alike. A record without an answer is none here.
"""

from __future__ import annotations

import numpy as np

from firth.data.conversations import prompt_of
from firth.data.records import Record, Seq2SeqRecords, fill_templates, first_prompt
from firth.tokenizer.chat import Message
from firth.types import Example, UserError


class CompletionPrompts(Seq2SeqRecords):
    """Text to text of which only the source is read; an example for every record."""

    def group(self, record: Record) -> str:
        return first_prompt(self._before(record))

    def texts(self, record: Record, place: str) -> list[str]:
        return ["\n\n".join(message["content"] for message in self._before(record))]

    def _before(self, record: Record) -> list[Message]:
        """The messages before the last answer."""
        prompt, _ = self.forms
        before = prompt_of({"prompt": fill_templates(record, (prompt, prompt))["prompt"]} if prompt else record)
        if not before:
            raise UserError("text to text needs a prompt, and there is none")
        return before

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        eos = self.tokenizer.vocab.eos
        return {"source": np.append(self.fit(encoded[0], self.length - 1), eos), "target": np.array([eos])}
