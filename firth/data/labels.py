"""Labels of records: numbers of class names, and entity tags of words.

Map class names to numbers, for given class names or for names collected from the data.

>>> found, given = ClassNumbering(()), ClassNumbering(("bad", "good"))
>>> [found.number(label) for label in ("good", "bad", "good")], found.names
([0, 1, 0], ('bad', 'good'))
>>> [given.number(label) for label in ("good", 0, "odd", 2)]
[1, 0, None, None]

Collected names are numbered in the order in which they occur. `final` maps these numbers to the final ones, which follow the
sorted names (numbers by value) and so do not depend on the order of the file.

Entity tags of words: BIO (IOB2), IOB1, IO, IOE, BIOES, BILOU, BMES and BMEWO (Ramshaw & Marcus 1995; conlleval's reading rules).

>>> names(["B-PER", "I-PER", "O", "I-ORG", "B-ORG"]), names(["B-PER", "L-PER", "U-ORG", "O"])
([('PER', 0, 2), ('ORG', 3, 4), ('ORG', 4, 5)], [('PER', 0, 2), ('ORG', 2, 3)])
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import numpy as np

from firth.types import UserError


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
        return in_order(self._known) if self.open else self._given

    @property
    def final(self) -> np.ndarray:
        """Map from the number in order of occurrence to the final number: (classes,) int64."""
        index = {name: i for i, name in enumerate(self.names)}
        return np.array([index[name] for name in self._known], np.int64)


def in_order(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names of classes in the order of their numbers, where none is given: whole numbers by value, then names.

    >>> in_order({"b", "10", "9", "a"})
    ('9', '10', 'a', 'b')
    """
    return tuple(sorted(names, key=_natural))


def _is_number(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def _natural(name: str) -> tuple[bool, int, str]:
    """Sort key: whole numbers by value, then names alphabetically."""
    number = _is_number(name)
    return (not number, int(name) if number else 0, name)


MARK = re.compile(r"O|[BIESLUMW]-.+|[BIESLUMW]")
UNSUPPORTED_MARK = re.compile(r"O|[BIESLUMW]_.+|.+[-_][BIESLUMW]")
"""Marks with another separator or after the type, which are rejected."""

BIOES_MARK = {"L": "E", "U": "S", "W": "S", "M": "I"}
"""Marks of BILOU, BMES and BMEWO -> those of BIOES: the last, the only, and a middle word of an entity."""


def has_spans(tags: Sequence[str]) -> bool:
    """Return whether the tags mark entities, and are not parts of speech.

    >>> has_spans(["O", "B-PER"]), has_spans(["U-PER", "O"]), has_spans(["NN", "IN"]), has_spans(["S", "M", "L"])
    (True, True, False, False)
    """
    letter_tags = {tag for tag in tags if tag in BIOES_MARK}
    return all(MARK.fullmatch(tag) for tag in tags) and (not letter_tags or bool({"B", "I"} & set(tags)))


def check_scheme(classes: Sequence[str]) -> None:
    """Raise UserError for tags that mark entities in an unsupported format: they would be scored as plain classes.

    >>> check_scheme(["O", "PER-B", "PER-I"])
    Traceback (most recent call last):
    firth.types.UserError: the tags O, PER-B, PER-I mark entities in an unsupported format: write them as B-PER, I-PER
    """
    if has_spans(classes) or "O" not in classes:
        return
    if len(classes) > 1 and all(UNSUPPORTED_MARK.fullmatch(tag) for tag in classes):
        listed = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
        raise UserError(f"the tags {listed} mark entities in an unsupported format: write them as B-PER, I-PER")
    if any(tag.startswith("B-") for tag in classes):
        other = next(tag for tag in classes if not MARK.fullmatch(tag))
        raise UserError(
            f"the tag {other!r} marks no entity, while others do (B-...): write O for a word outside of entities, or B- or I- "
            "and the type"
        )


def names(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """Return (type, first word, end) of every entity, by conlleval's rules.

    An entity begins at B or S, where the type changes, and after O, E or S. So all schemes are read with one rule, and misplaced
    marks are tolerated.
    """
    found: list[tuple[str, int, int]] = []
    before, kind_before, start = "O", "", -1
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        mark = BIOES_MARK.get(mark, mark)
        begins = mark != "O" and (mark in "BS" or before in "OES" or kind != kind_before)
        if start >= 0 and (mark == "O" or begins):
            found.append((kind_before, start, i))
            start = -1
        if begins:
            start = i
        before, kind_before = mark, kind
    return found


def to_bio2(tags: Sequence[str]) -> list[str]:
    """Convert tags so that no entity begins with I (IOB1 has B only between adjacent entities of one type, IO and IOE never).

    >>> to_bio2(["I-PER", "I-PER", "B-PER", "O", "I-ORG"])
    ['B-PER', 'I-PER', 'B-PER', 'O', 'B-ORG']
    """
    starts = {start: kind for kind, start, _ in names(tags)}
    return [f"B-{starts[i]}" if i in starts and tag.startswith("I-") else tag for i, tag in enumerate(tags)]
