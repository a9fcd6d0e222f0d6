"""Prompts of text to text without their answers, for a model to write these: {"source", "target": its end alone}.

    {"prompt": "translate to French: otter"}        as they stand
    {"en": "otter"}                                 with the form "translate to French: {en}"
    {"messages": [...]}                             all before the last answer, if there is one

Of `Prompted` all but the answer: what a model was trained to read is read alike. A record without an answer is none here.
"""

from __future__ import annotations

import numpy as np

from firth.data.conversations import prompt_of
from firth.data.records import Prompted, Record, formed
from firth.types import Example, UserError


class Unanswered(Prompted):
    """Text to text of which only the source is read; an example for every record."""

    def texts(self, record: Record, place: str) -> list[str]:
        prompt, _ = self.forms
        if prompt:
            record = {"prompt": formed(record, (prompt, prompt))["prompt"]}
        before = prompt_of(record)
        if not before:
            raise UserError("text to text needs a prompt, and there is none")
        return ["\n\n".join(message["content"] for message in before)]

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        eos = self.tokenizer.vocab.eos
        return {"source": np.append(self.fit(encoded[0], self.length - 1), eos), "target": np.array([eos])}
