"""Prompts without their completions, for encoder-decoders and for decoders.

Prompts without their completions, for generation with a text-to-text model: {"source", "target": eos alone}.

    {"prompt": "translate to French: otter"}        used as it is
    {"en": "otter"}                                 with the template "translate to French: {en}"
    {"messages": [...]}                             all messages before the last answer, if there is one

The source is that of `Seq2SeqRecords`, so a prompt is encoded as in training. Records without an answer are not left out.

Prompts for a decoder, with the right answer where there is one: {"source", "target"}.

    {"prompt": "Who paints the boat?", "completion": "The otter."}      and every other dialogue record
    {"en": "otter", "fr": "loutre"}                                     with the templates of the run's recipe

For a chat model the prompt is formatted by the tokenizer's chat template, up to the start of the assistant's turn. For any other
model it is plain text. A prompt is never truncated, because without its end it would be another question.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from firth.data.conversations import messages_of, prompt_of
from firth.data.records import NOTE_TEMPLATES, Record, Seq2SeqRecords, fill_templates, first_prompt
from firth.tokenizer import chat
from firth.tokenizer.chat import Message
from firth.tokenizer.tokenizer import Tokenizer
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


class TextPrompts(CompletionPrompts):
    """One example per record: the source is the prompt as the decoder reads it, the target the tokens of the right answer.

    Args:
        paths: Files, directories or globs.
        tokenizer: The tokenizer.
        length: Maximum number of positions of the model. Longer prompts are noted, since they leave no room for an answer.
        forms: Templates of prompt and completion (`firth.data.records.fill_templates`).
        dialogue: Whether to format the prompt with the chat template.
        begin: Tokens before a plain-text prompt.
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
    def note_templates(self) -> Mapping[str, str]:
        return NOTE_TEMPLATES | {
            "no_room": "prompt{s} left no room in {limit} tokens for an answer, so {they} {have} none"
        }

    def texts(self, record: Record, location: str) -> list[str]:
        before, answer = self._split_answer(record)
        return [answer] if self.dialogue else [answer, "\n\n".join(message["content"] for message in before)]

    def example(self, record: Record, encoded: list[np.ndarray]) -> Example | None:
        if self.dialogue:
            before, _ = self._split_answer(record)
            source, _ = chat.encode(self.tokenizer, before, open=True)
        else:
            source = np.concatenate((np.array(self.begin, np.int32), encoded[1]))
        if not len(source):
            raise UserError("the prompt is empty, and this tokenizer has no token for the beginning of a text")
        if len(source) > self.length:
            self.note("no_room")
        return {"source": source, "target": encoded[0]}

    def _split_answer(self, record: Record) -> tuple[list[Message], str]:
        """Return the messages before the last answer, and that answer."""
        if not self.answered:
            return self._before(record), ""
        *before, last = messages_of(fill_templates(record, self.forms))
        if last["role"] != "assistant" or not before:
            raise UserError("this record needs a prompt and an answer after it, and it has only one of them")
        return before, last["content"]
