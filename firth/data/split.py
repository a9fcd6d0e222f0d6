"""Held-out documents, chosen by their names alone: the same on every machine, and adding documents moves none.

Validation text is whole documents, never lines: the lines of one play know each other.

>>> plays = [Document("hamlet", "To be"), Document("macbeth", "Out, out"), Document("othello", "Put out")]
>>> [d.name for d in split(plays, ["macbeth"], held_out=True)]
['macbeth']
>>> [d.name for d in split(plays, ["macbeth"], held_out=False)]
['hamlet', 'othello']
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator

from firth.text.read import Document
from firth.types import UserError


def split(documents: Iterable[Document], share: float | Collection[str], *, held_out: bool) -> Iterator[Document]:
    """The documents that are held out, or the others. share: a fraction of the documents, or the names themselves."""
    if isinstance(share, (int, float)):
        if not 0 <= share < 1:
            raise UserError(f"the held-out share of the documents is {share}: use a number from 0 up to, not with, 1")
        return (d for d in documents if (place(d.name) < share) == held_out)
    return (d for d in documents if (d.name in share) == held_out)


def place(name: str) -> float:
    """Where a name falls in [0, 1): evenly, by hash."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=6).digest()) / 2**48


def enough(share: float, names: Iterable[str]) -> float:
    """The least share from `share` on that holds out at least one of the documents; 0 if there is but one document.

    >>> enough(0.5, ["a", "b", "c", "d"]), enough(0.05, ["only"])
    (0.5, 0.0)
    """
    if not share:
        return 0.0
    lowest, n = 1.0, 0
    for name in names:
        lowest, n = min(lowest, place(name)), n + 1
    return 0.0 if n < 2 else max(share, lowest + 2**-48)
