"""How well a general compressor does on a text: a measure of how hard the text is, without a model."""

from __future__ import annotations

import bz2

import numpy as np

from firth.data.token_store import TokenStore
from firth.tokenizer.tokenizer import Tokenizer

SAMPLE_TOKENS, PIECES = 250_000, 16
"""Tokens that are compressed, and the number of stretches of text that they are from."""


def compressed_bits(store: TokenStore, tokenizer: Tokenizer) -> float:
    """Return the bits per byte of a sample of a text under bzip2.

    A small text compresses worse than a large one, so two texts are comparable only from about half of SAMPLE_TOKENS.
    """
    total = len(store.tokens)
    piece = max(1, min(SAMPLE_TOKENS, total) // PIECES)
    starts = np.linspace(0, total - piece, PIECES).astype(int)
    text = "\n".join(tokenizer.decode(np.asarray(store.tokens[s : s + piece])) for s in starts).encode()
    return 8 * len(bz2.compress(text, 9)) / len(text)
