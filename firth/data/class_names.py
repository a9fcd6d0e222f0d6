"""Map class names to numbers, for given class names or for names collected from the data.

>>> found, given = ClassNumbering(()), ClassNumbering(("bad", "good"))
>>> [found.number(label) for label in ("good", "bad", "good")], found.names
([0, 1, 0], ('bad', 'good'))
>>> [given.number(label) for label in ("good", 0, "odd", 2)]
[1, 0, None, None]

Collected names are numbered in the order in which they occur. `final` maps these numbers to the final ones, which follow the
sorted names (numbers by value) and so do not depend on the order of the file.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ClassNumbering:
    """Numbering of class names.

    Args:
        names: The class names, in the order of their numbers. Empty: names are collected from the labels.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.open = not names
        self._given = tuple(names)
        self._known = {name: i for i, name in enumerate(names)}
        self._has_numeric_names = any(_is_number(name) for name in names)

    def number(self, label: str | int) -> int | None:
        """Return the number of a label, or None if it is not one of the given names.

        A whole number is an index into the given names, unless some of these are numbers themselves: then 0 may be a class that
        does not occur.
        """
        name = label if isinstance(label, str) else str(label)
        if name in self._known:
            return self._known[name]
        if self.open:
            return self._known.setdefault(name, len(self._known))
        is_index = isinstance(label, int) and not self._has_numeric_names and 0 <= label < len(self._known)
        return int(label) if is_index else None

    @property
    def names(self) -> tuple[str, ...]:
        """All class names, in the order of their final numbers."""
        return tuple(sorted(self._known, key=_natural)) if self.open else self._given

    @property
    def final(self) -> np.ndarray:
        """Map from the number in order of occurrence to the final number: (classes,) int64."""
        index = {name: i for i, name in enumerate(self.names)}
        return np.array([index[name] for name in self._known], np.int64)


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _natural(name: str) -> tuple[bool, int, str]:
    """Sort key: whole numbers by value, then names alphabetically."""
    number = _is_number(name)
    return (not number, int(name) if number else 0, name)
