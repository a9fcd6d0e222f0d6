"""Prompts without their completions, for generation with a text-to-text model: {"source", "target": eos alone}.

    {"prompt": "translate to French: otter"}        used as it is
    {"en": "otter"}                                 with the template "translate to French: {en}"
    {"messages": [...]}                             all messages before the last answer, if there is one

The source is that of `Seq2SeqRecords`, so a prompt is encoded as in training. Records without an answer are not left out.
"""

from __future__ import annotations

import numpy as np

from firth.data.conversations import prompt_of
from firth.data.records import Record, Seq2SeqRecords, fill_templates, first_prompt
from firth.tokenizer.chat import Message
from firth.types import Example, UserError


class CompletionPrompts(Seq2SeqRecords):
    """Text-to-text records of which only the source is used. Every record gives one example."""

    def group(self, record: Record) -> str:
        return first_prompt(self._before(record))

    def texts(self, record: Record, location: str) -> list[str]:
        return ["\n\n".join(message["content"] for message in self._before(record))]

    def _before(self, record: Record) -> list[Message]:
        """Return the messages before the last answer."""
        prompt, _ = self.forms
        before = prompt_of({"prompt": fill_templates(record, (prompt, prompt))["prompt"]} if prompt else record)
        if not before:
            raise UserError("a text-to-text record needs a prompt, and this record has none")
        return before

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        eos = self.tokenizer.vocab.eos
        return {"source": np.append(self.fit(encoded[0], self.length - 1), eos), "target": np.array([eos])}
