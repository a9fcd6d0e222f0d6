"""Prompts that a decoder goes on from, with the right answer where there is one: {"source", "target"}.

    {"prompt": "Who paints the boat?", "completion": "The otter."}      and every other record of a dialogue
    {"en": "otter", "fr": "loutre"}                                     with the forms of the run's recipe

To a model that was trained on dialogues the prompt is written by the tokenizer's chat template, the assistant's turn begun. To
any other it is running text. It is never cut: without its end it would be another question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from firth.data.completion_prompts import CompletionPrompts
from firth.data.conversations import messages_of
from firth.data.records import REMARKS, Record, fill_templates
from firth.tokenizer import chat
from firth.tokenizer.chat import Message
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import Example, UserError


class TextPrompts(CompletionPrompts):
    """An example for every record, its source as a decoder reads it and its target the tokens of the right answer.

    Args:
        length: The context of the model. Longer prompts are noted, since they leave no room for an answer.
        forms: How prompt and answer are made of a record's fields (`firth.data.records.fill_templates`).
        dialogue: Whether the prompt is written by the chat template.
        begin: Tokens before a prompt that is running text.
        answered: Whether the records have answers; else the target is empty.
    """

    def __init__(
        self,
        paths: Sequence[str],
        tokenizer: Tokenizer,
        length: int,
        *,
        forms: tuple[str, str] = ("", ""),
        dialogue: bool = False,
        begin: Sequence[int] = (),
        answered: bool = True,
    ) -> None:
        self.dialogue, self.begin, self.answered = dialogue, begin, answered
        super().__init__(paths, tokenizer, length, forms=forms)

    @property
    def said(self) -> Mapping[str, str]:
        return REMARKS | {"no_room": "prompt{s} left no room in {limit} tokens for an answer, so {they} {have} none"}

    def texts(self, record: Record, place: str) -> list[str]:
        before, answer = self._parted(record)
        return [answer] if self.dialogue else [answer, "\n\n".join(message["content"] for message in before)]

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        if self.dialogue:
            before, _ = self._parted(record)
            source, _ = chat.encode(self.tokenizer, before, open=True)
        else:
            source = np.concatenate((np.array(self.begin, np.int32), encoded[1]))
        if not len(source):
            raise UserError("the prompt is empty, and this tokenizer has no token that begins a text")
        if len(source) > self.length:
            self.note("no_room")
        return {"source": source, "target": encoded[0]}

    def _parted(self, record: Record) -> tuple[list[Message], str]:
        """The messages before the last answer, and that answer."""
        if not self.answered:
            return self._before(record), ""
        *before, last = messages_of(fill_templates(record, self.forms))
        if last["role"] != "assistant" or not before:
            raise UserError("a prompt and an answer behind it are needed, and this record has only one of them")
        return before, last["content"]
