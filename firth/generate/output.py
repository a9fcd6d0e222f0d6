"""The tokens and text of an answer, during decoding and afterwards.

`StreamingOutput` is the text of a row during decoding, and `Completion` the finished one. A character can span several
tokens, so the text of the first tokens is not always a prefix of the whole text. A stop string can start in one token and
end in another, so the last characters may turn out not to be part of the answer. `StreamingOutput.final_text` is the part
that later tokens cannot change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from firth.generate.sampling import Sampling
from firth.tokenizer.tokenizer import Tokenizer

Finish = Literal["stop", "length", "context"]
REPLACEMENT = "\ufffd"
"""The replacement character, which a tokenizer decodes incomplete UTF-8 to."""
WINDOW = 32
"""Tokens after which decoded text is kept: decoding all of a long answer again for each token would take longer than a step."""


@dataclass(frozen=True)
class Completion:
    """Generated tokens and text.

    Args:
        tokens: (n,) int32, including the stop token.
        logprobs: (n,) float32, the log-probability of each token under the model (temperature 1, no filter).
        text: The text, without the stop string.
        finish: "stop" (a stop token or string), "length" (max_new_tokens) or "context" (the context is full).
    """

    tokens: np.ndarray
    logprobs: np.ndarray
    text: str
    finish: Finish


class IncrementalDecoder:
    """Decodes a continuation together with the end of its prompt, since tokenizers trim the first space of a text.

    A character that is incomplete at the end of the prompt belongs to the continuation, which completes it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray) -> None:
        self.tokenizer = tokenizer
        self.tokens = [int(t) for t in prompt[-8:]]
        self.skip = len(tokenizer.decode(self.tokens).rstrip(REPLACEMENT)) if self.tokens else 0

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text that these tokens add to the prompt."""
        return self.tokenizer.decode([*self.tokens, *tokens])[self.skip :]


class StreamingOutput:
    """Tokens and text of one row during decoding, and whether it has finished.

    Args:
        tokenizer: Decodes the tokens.
        prompt: (n,) token ids that the answer continues.
        sampling: Holds the stop strings and the most new tokens.
        stops: Token ids that end the answer.
        room: Most tokens that fit into the context.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, sampling: Sampling, stops: frozenset[int], room: int):
        self.stop, self.stops, self.room = sampling.stop_strings, stops, room
        self.limit = min(room, sampling.max_new_tokens)
        self.tokens: list[int] = []
        self.logprobs: list[float] = []
        self.finish: Finish | None = None
        self.decoder = IncrementalDecoder(tokenizer, prompt)
        self.decoded, self.decoded_tokens = "", 0
        self.cut: int | None = None

    def append(self, token: int, logprob: float) -> None:
        """Add a token and update `finish`."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.stop:
            text = self._decoded()
            matches = [at for at in (text.find(s) for s in self.stop) if at >= 0]
            self.cut = min(matches) if matches else None
        if token in self.stops or self.cut is not None:
            self.finish = "stop"
        elif len(self.tokens) == self.limit:
            self.finish = "context" if self.limit == self.room else "length"

    def _decoded(self) -> str:
        pending = self.tokens[self.decoded_tokens :]
        text = self.decoded + self.decoder.text(pending)
        if len(pending) >= WINDOW and not text.endswith(REPLACEMENT):
            self.decoder = IncrementalDecoder(self.decoder.tokenizer, np.array(pending))
            self.decoded, self.decoded_tokens = text, len(self.tokens)
        return text

    @property
    def text(self) -> str:
        """The text so far, up to a stop string."""
        return self._decoded()[: self.cut]

    @property
    def final_text(self) -> str:
        """The text that later tokens cannot change: without an incomplete character or the start of a stop string."""
        text = self.text
        if self.finish is not None:
            return text
        text = text.rstrip(REPLACEMENT)
        overlap = max((n for s in self.stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        return text[: len(text) - overlap]

    def done(self) -> Completion:
        """Return the finished answer."""
        assert self.finish is not None
        tokens, logprobs = np.array(self.tokens, np.int32), np.array(self.logprobs, np.float32)
        return Completion(tokens, logprobs, self.text, self.finish)
