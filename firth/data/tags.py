"""Entity tags of words: BIO (IOB2), IOB1, IO, IOE, BIOES, BILOU, BMES and BMEWO (Ramshaw & Marcus 1995; conlleval's reading rules).

>>> names(["B-PER", "I-PER", "O", "I-ORG", "B-ORG"]), names(["B-PER", "L-PER", "U-ORG", "O"])
([('PER', 0, 2), ('ORG', 3, 4), ('ORG', 4, 5)], [('PER', 0, 2), ('ORG', 2, 3)])
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from firth.types import UserError

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
