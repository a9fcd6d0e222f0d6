"""Which documents and records are held out, decided here for every shape of data.

Two rules. Examples that share a prompt, and examples of the same content, are held out together or not at all: an answer to a
prompt that was trained on measures memory. And the decision is a pure function of names (documents) or contents (records), so
it is the same on every machine, in every order, and for every run that reads the same prompts.

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
from dataclasses import dataclass, field

import numpy as np

from firth.corpora.readers import Document
from firth.tokenizer.normalize import replace_lone_surrogates
from firth.types import UserError

MIN_RECORDS = 20
"""Records: of fewer, none is held out."""


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


def content_key(text: str) -> int:
    """Hash a text to 64 bits, white space collapsed. Two of ten million texts collide with a probability of 3e-6.

    >>> content_key("to be  or\\nnot") == content_key("to be or not") != content_key("to be")
    True
    """
    return int.from_bytes(hashlib.blake2b(" ".join(replace_lone_surrogates(text).split()).encode(), digest_size=8).digest())


def held_out_keys(keys: np.ndarray, share: float, records: int) -> np.ndarray:
    """Which examples of records are held out.

    Args:
        keys: `content_key` of the prompt of each example, (n,) uint64.
        share: the fraction of the prompts to hold out.
        records: how many records the examples are of.

    Returns:
        (n,) bool; all False for fewer than MIN_RECORDS records, and where the share would take all of them.
    """
    held = keys / 2.0**64 < share
    return held if records >= MIN_RECORDS and not held.all() else np.zeros(len(keys), bool)


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents.

    Attributes:
        names: their names.
        keys: the `content_key` of each.
        documents: how many documents there are in all.
        duplicates: how many of them repeat an earlier one.
        first: the name of the first that does, "" where none does.
        contents: the `content_key` of every document, (documents,).
    """

    names: frozenset[str] = frozenset()
    keys: frozenset[int] = frozenset()
    documents: int = 0
    duplicates: int = 0
    first: str = ""
    contents: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64), compare=False, repr=False)


def hold_out(documents: Iterable[Document], share: float) -> HeldOut:
    """Choose documents: those of one name or of one content together, by the first of their names in the alphabet.

    Args:
        documents: all of them; they are read once and not kept.
        share: the fraction of the documents; at least one group is held out of two or more.

    Returns:
        The choice, which `split` and the tokenizer follow.

    Raises:
        UserError: the share is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise UserError(f"the held-out share of the documents is {share}: use a number from 0 up to, not with, 1")
    names: list[str] = []
    contents: list[int] = []
    seen: set[int] = set()
    first = ""
    for document in documents:
        key = content_key(document.text)
        first = first or (document.name if key in seen else "")
        seen.add(key)
        names.append(document.name)
        contents.append(key)
    if not names:
        return HeldOut()
    group = groups(np.unique(names, return_inverse=True)[1], np.array(contents, np.uint64))
    spokesman: dict[int, str] = {}
    for number, name in zip(group.tolist(), names, strict=True):
        spokesman[number] = min(name, spokesman.get(number, name))
    least = enough(share, spokesman.values())
    chosen = {number for number, name in spokesman.items() if place(name) < least}
    held = [i for i, number in enumerate(group.tolist()) if number in chosen]
    return HeldOut(
        frozenset(names[i] for i in held),
        frozenset(contents[i] for i in held),
        len(names),
        len(names) - len(seen),
        first,
        np.array(contents, np.uint64),
    )


def groups(*keys: np.ndarray) -> np.ndarray:
    """Number the groups of rows: rows that share any of their keys are of one group, directly or through others.

    >>> groups(np.array([1, 1, 2, 3]), np.array([7, 8, 8, 9])).tolist()
    [0, 0, 0, 3]
    """
    group = np.arange(len(keys[0]))
    columns = [np.unique(key, return_inverse=True)[1] for key in keys]
    while True:
        before = group
        for column in columns:
            least = np.full(len(group), len(group))
            np.minimum.at(least, column, group)
            group = least[column]
        if np.array_equal(group, before):
            return group
