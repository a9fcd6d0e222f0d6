"""The classes that labels name: those that are told, or those that are found on the way.

>>> found, told = ClassNumbering(()), ClassNumbering(("bad", "good"))
>>> [found.number(label) for label in ("good", "bad", "good")], found.names
([0, 1, 0], ('bad', 'good'))
>>> [told.number(label) for label in ("good", 0, "odd", 2)]
[1, 0, None, None]

Names found on the way are numbered as they come, and `final` gives the numbers they have in the end: in the order of the
alphabet (numbers by size), whatever the file's order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ClassNumbering:
    """told: the names, in the order that labels count; empty: all that come are taken in."""

    def __init__(self, told: Sequence[str]) -> None:
        self.open = not told
        self._told = tuple(told)
        self._known = {name: i for i, name in enumerate(told)}
        self._numbered = any(_is_number(name) for name in told)

    def number(self, label: str | int) -> int | None:
        """The number of a name, as it came; None if it is none of those told. A whole number is a place among those told,
        unless some of them are numbers themselves: then 0 may be a class that was never met."""
        name = label if isinstance(label, str) else str(label)
        if name in self._known:
            return self._known[name]
        if self.open:
            return self._known.setdefault(name, len(self._known))
        place = isinstance(label, int) and not self._numbered and 0 <= label < len(self._known)
        return int(label) if place else None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them, in the order of their final numbers."""
        return tuple(sorted(self._known, key=_natural)) if self.open else self._told

    @property
    def final(self) -> np.ndarray:
        """Number as it came -> number in the end."""
        place = {name: i for i, name in enumerate(self.names)}
        return np.array([place[name] for name in self._known], np.int64)


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _natural(name: str) -> tuple[bool, int, str]:
    """Whole numbers by size, then names by alphabet."""
    number = _is_number(name)
    return (not number, int(name) if number else 0, name)
