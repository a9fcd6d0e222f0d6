"""Text that every part of firth can hold: Unicode without halves of characters.

Python strings and JSON may hold lone surrogates ("\\ud83d" without its other half); UTF-8 and the tokenizers library
cannot. They are read as U+FFFD, the sign for what could not be read; two halves that meet become the character.

>>> whole("a\\ud83d b \\ud83d\\ude00") == "a\\ufffd b \\U0001f600"
True
"""

from __future__ import annotations

import re

SURROGATE = re.compile("[\ud800-\udfff]")


def whole(text: str) -> str:
    """The text with lone surrogates replaced by U+FFFD; the same object where there are none."""
    if text.isascii() or SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
