"""Names in a sentence, marked word by word: BIO (IOB2), IOB1, IO, IOE, BIOES, BILOU, BMES and BMEWO (Ramshaw & Marcus 1995;
conlleval's rules for reading them).

>>> names(["B-PER", "I-PER", "O", "I-ORG", "B-ORG"]), names(["B-PER", "L-PER", "U-ORG", "O"])
([('PER', 0, 2), ('ORG', 3, 4), ('ORG', 4, 5)], [('PER', 0, 2), ('ORG', 2, 3)])
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from firth.types import UserError

MARK = re.compile(r"O|[BIESLUMW]-.+|[BIESLUMW]")
OTHER_FORM = re.compile(r"O|[BIESLUMW]_.+|.+[-_][BIESLUMW]")
"""Marks that are joined by another sign, or follow the kind: they are rejected."""

ALIKE = {"L": "E", "U": "S", "W": "S", "M": "I"}
"""Marks of BILOU, BMES and BMEWO -> those of BIOES: the last, the only, and a middle word of a name."""


def has_spans(tags: Sequence[str]) -> bool:
    """Whether these are marks of names at all, and not parts of speech.

    >>> has_spans(["O", "B-PER"]), has_spans(["U-PER", "O"]), has_spans(["NN", "IN"]), has_spans(["S", "M", "L"])
    (True, True, False, False)
    """
    letters = {tag for tag in tags if tag in ALIKE}
    return all(MARK.fullmatch(tag) for tag in tags) and (not letters or bool({"B", "I"} & set(tags)))


def check_scheme(classes: Sequence[str]) -> None:
    """Raise a UserError for tags that mark names in a form that is not read: they would be scored as mere classes.

    >>> check_scheme(["O", "PER-B", "PER-I"])
    Traceback (most recent call last):
    firth.types.UserError: the tags O, PER-B, PER-I mark names in a form that is not read: write them as B-PER, I-PER
    """
    if has_spans(classes) or "O" not in classes:
        return
    if len(classes) > 1 and all(OTHER_FORM.fullmatch(tag) for tag in classes):
        listed = ", ".join(classes[:4]) + (", ..." if len(classes) > 4 else "")
        raise UserError(f"the tags {listed} mark names in a form that is not read: write them as B-PER, I-PER")
    if any(tag.startswith("B-") for tag in classes):
        other = next(tag for tag in classes if not MARK.fullmatch(tag))
        raise UserError(
            f"the tag {other!r} marks no name, while others do (B-...): write O for a word outside of names, or B- or I- and the kind"
        )


def names(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """(kind, first word, behind the last word) of every name, as conlleval reads them: a name begins at B or S, where the
    kind changes, and behind O, E or S; so all schemes are read alike, and a mark that is out of place is forgiven.
    """
    found: list[tuple[str, int, int]] = []
    before, kind_before, start = "O", "", -1
    for i, tag in enumerate([*tags, "O"]):
        mark, _, kind = tag.partition("-")
        mark = ALIKE.get(mark, mark)
        begins = mark != "O" and (mark in "BS" or before in "OES" or kind != kind_before)
        if start >= 0 and (mark == "O" or begins):
            found.append((kind_before, start, i))
            start = -1
        if begins:
            start = i
        before, kind_before = mark, kind
    return found


def to_bio2(tags: Sequence[str]) -> list[str]:
    """Tags in which no name begins with I (IOB1 has B only where two names of one kind touch, IO and IOE never).

    >>> to_bio2(["I-PER", "I-PER", "B-PER", "O", "I-ORG"])
    ['B-PER', 'I-PER', 'B-PER', 'O', 'B-ORG']
    """
    starts = {start: kind for kind, start, _ in names(tags)}
    return [f"B-{starts[i]}" if i in starts and tag.startswith("I-") else tag for i, tag in enumerate(tags)]
