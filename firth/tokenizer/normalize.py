"""Replace lone surrogates, which UTF-8 and the tokenizers library cannot represent.

Python strings and JSON may contain them ("\\ud83d" without its other half). They become U+FFFD, the replacement
character; a high surrogate followed by a low one becomes the character.

>>> replace_lone_surrogates("a\\ud83d b \\ud83d\\ude00") == "a\\ufffd b \\U0001f600"
True
"""

from __future__ import annotations

import re

SURROGATE = re.compile("[\ud800-\udfff]")


def replace_lone_surrogates(text: str) -> str:
    """Return the text with lone surrogates replaced by U+FFFD; the same object if there are none."""
    if text.isascii() or SURROGATE.search(text) is None:
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
