"""What a model wrote: a `Completion`, and the `Answer` it is while it grows.

Two things make text harder than tokens. A character can be spread over several tokens, so the text of the first
tokens is not always the beginning of the text of all. And a stop string may begin in one token and end in another, so
the end of what is written may turn out not to be part of the answer. `Answer.settled` is the part that is sure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from firth.generate.sampling import Sampling
from firth.tokenizer.tokenizer import Tokenizer

Finish = Literal["stop", "length", "context"]
HALF = "\ufffd"
"""What a decoder writes for bytes that are not (yet) a character."""


@dataclass(frozen=True)
class Completion:
    """What a model wrote.

    tokens: (n,) int32, the stop token included. logprobs: (n,) float32, log p of each under the model itself
    (temperature 1, no filter). text: their text, without a stop string. finish: "stop" (a stop token or string),
    "length" (max_new) or "context" (no room left).
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    text: str
    finish: Finish


class IncrementalDecoder:
    """The end of a prompt, behind which a continuation is decoded: decoders trim the first space of a text.

    A character left unfinished at that end is completed by, and so belongs to, the continuation.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray) -> None:
        self.tokenizer = tokenizer
        self.tokens = [int(t) for t in prompt[-8:]]
        self.skip = len(tokenizer.decode(self.tokens).rstrip(HALF)) if self.tokens else 0

    def text(self, tokens: Sequence[int]) -> str:
        """The text that these tokens add to the prompt."""
        return self.tokenizer.decode([*self.tokens, *tokens])[self.skip :]


class StreamingOutput:
    """The answer of one row as it grows: its tokens, its text and whether it has ended."""

    def __init__(self, tokenizer: Tokenizer, before: np.ndarray, sampling: Sampling, stops: frozenset[int], room: int):
        self.stop, self.stops, self.room = sampling.stop_strings, stops, room
        self.limit = min(room, sampling.max_new_tokens)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Finish | None = None
        self.before = IncrementalDecoder(tokenizer, before)
        self.cut: int | None = None

    def append(self, token: int, logprob: float) -> None:
        """One more token."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.stop:
            text = self._decoded()
            found = [at for at in (text.find(s) for s in self.stop) if at >= 0]
            self.cut = min(found) if found else None
        if token in self.stops or self.cut is not None:
            self.finish = "stop"
        elif len(self.tokens) == self.limit:
            self.finish = "context" if self.limit == self.room else "length"

    def _decoded(self) -> str:
        return self.before.text(self.tokens)

    @property
    def text(self) -> str:
        """What is written so far, up to a stop string."""
        return self._decoded()[: self.cut]

    @property
    def final_text(self) -> str:
        """The part of the text that later tokens cannot change: no half character, no beginning of a stop string."""
        text = self.text
        if self.finish is not None:
            return text
        text = text.rstrip(HALF)
        held = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return text[: len(text) - held]

    def done(self) -> Completion:
        """The finished answer."""
        assert self.finish is not None
        tokens, logprobs = np.array(self.tokens, np.int32), np.array(self.logprobs, np.float32)
        return Completion(tokens, logprobs, self.text, self.finish)
