"""The text and the bytes of single tokens, and their places in a text."""

from __future__ import annotations

import codecs
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np

from firth.tokenizer.tokenizer import Tokenizer


class TokenTexts:
    """Text of tokens.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.vocab = tokenizer, tokenizer.vocab

    def bytes_of(self, id: int) -> bytes:
        """Return the UTF-8 bytes of a token, with the space before it; they may be a part of a character."""
        if self.vocab.spelling is not None and not self.vocab.special[id]:
            return self.vocab.spelling[id]
        token: str | None = self.tokenizer.engine.id_to_token(id)
        return (token or "").encode()

    def text(self, id: int) -> str:
        """Return the text of a token; U+FFFD where it is a part of a character."""
        return self.bytes_of(id).decode("utf-8", "replace")

    def offsets(self, ids: Iterable[int], start: int = 0) -> list[int]:
        """Return where each token starts, in characters from the first, which starts at `start`.

        A token within a character starts where the character does.
        """
        offsets = Offsets(self, start)
        return [offsets.next(id) for id in ids]

    def joined(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of tokens one after another, with special tokens, so that `offsets` are places in it."""
        if self.vocab.spelling is None:
            return self.tokenizer.decode(ids)
        return b"".join(self.bytes_of(int(id)) for id in ids).decode("utf-8", "replace")

    @cached_property
    def longest(self) -> int:
        """The most characters of a token, no fewer than those of any text that is one token."""
        return max(len(self.bytes_of(id)) for id in range(self.vocab.size))

    def prompt_offsets(self, text: str | None, ids: Sequence[int] | np.ndarray) -> list[int]:
        """Return where each token of a prompt starts in its text; `text` is None for a prompt of token ids."""
        if text is None:
            return self.offsets(int(i) for i in ids)
        _, spans = self.tokenizer.spans(text)
        return [int(start) for start, _ in spans]


class Offsets:
    """Where each next token of a text starts, in characters.

    Args:
        texts: The tokens.
        start: Where the first one starts.
    """

    def __init__(self, texts: TokenTexts, start: int = 0) -> None:
        self.texts, self.length = texts, start
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def next(self, id: int) -> int:
        """Return where a token starts that follows those so far; within a character, where the character does."""
        start = self.length
        self.length += len(self.decoder.decode(self.texts.bytes_of(id)))
        return start
