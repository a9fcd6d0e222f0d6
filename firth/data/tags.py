"""Names in a sentence, marked word by word: BIO and its kin (Ramshaw & Marcus 1995; conlleval's rules for reading them).

>>> names(["B-PER", "I-PER", "O", "I-ORG", "B-ORG"])
[('PER', 0, 2), ('ORG', 3, 4), ('ORG', 4, 5)]
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MARK = re.compile(r"O|[BIES]-.+|[BIES]")


def marked(tags: Sequence[str]) -> bool:
    """Whether these are marks of names at all, and not parts of speech.

    >>> marked(["O", "B-PER"]), marked(["NN", "IN"])
    (True, False)
    """
    return all(MARK.fullmatch(tag) for tag in tags)


def names(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first word, behind the last word) of every name, as conlleval reads them: a name begins at B or S, where the
    kind changes, and behind O, E or S; so IOB1, BIO and IOBES are read alike, and a mark that is out of place is forgiven.
    """
    found: list[tuple[str, int, int]] = []
    before, kind_before, start = "O", "", -1
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        begins = mark != "O" and (mark in "BS" or before in "OES" or kind != kind_before)
        if start >= 0 and (mark == "O" or begins):
            found.append((kind_before, start, i))
            start = -1
        if begins:
            start = i
        before, kind_before = mark, kind
    return found


def begun(tags: Sequence[str]) -> list[str]:
    """Tags in which every name begins with B (IOB1 has B only where two names of one kind touch).

    >>> begun(["I-PER", "I-PER", "B-PER", "O", "I-ORG"])
    ['B-PER', 'I-PER', 'B-PER', 'O', 'B-ORG']
    """
    starts = {start: kind for kind, start, _ in names(tags)}
    return [f"B-{starts[i]}" if i in starts and tag.startswith("I-") else tag for i, tag in enumerate(tags)]
