"""Choice of held-out documents and records, for every data format.

Two rules. Examples that share a prompt, and examples of the same content, are held out together or not at all: an answer to a
prompt that was trained on measures memorization. And the choice is a pure function of names (documents) or contents (records),
so it is the same on every machine, in every order, and for every run that reads the same prompts.

Validation text is whole documents, never lines, because the lines of one document are not independent.

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
from firth.tokenizer.vocab import replace_lone_surrogates
from firth.types import UserError

MIN_RECORDS = 20
"""Number of records below which none is held out."""


def split(documents: Iterable[Document], share: float | Collection[str], *, held_out: bool) -> Iterator[Document]:
    """Return the documents that are held out, or the others.

    Args:
        documents: All documents.
        share: Fraction of the documents to hold out, or their names.
        held_out: Which of the two to return.

    Raises:
        UserError: The fraction is not in [0, 1).
    """
    if isinstance(share, (int, float)):
        if not 0 <= share < 1:
            raise UserError(f"the held-out share of the documents is {share}: use a number from 0 to below 1")
        return (d for d in documents if (place(d.name) < share) == held_out)
    return (d for d in documents if (d.name in share) == held_out)


def place(name: str) -> float:
    """Map a name to [0, 1) by its hash, uniformly."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8", "replace"), digest_size=6).digest()) / 2**48


def min_share(share: float, names: Iterable[str]) -> float:
    """Return the smallest fraction, at least `share`, that holds out one document or more; 0 for a single document.

    >>> min_share(0.5, ["a", "b", "c", "d"]), min_share(0.05, ["only"])
    (0.5, 0.0)
    """
    if not share:
        return 0.0
    lowest, n = 1.0, 0
    for name in names:
        lowest, n = min(lowest, place(name)), n + 1
    return 0.0 if n < 2 else max(share, lowest + 2**-48)


def content_key(text: str) -> int:
    """Hash a text to 64 bits, ignoring differences in white space. Two of ten million texts collide with a probability of 3e-6.

    >>> content_key("to be  or\\nnot") == content_key("to be or not") != content_key("to be")
    True
    """
    return int.from_bytes(
        hashlib.blake2b(" ".join(replace_lone_surrogates(text).split()).encode(), digest_size=8).digest()
    )


def held_out_keys(keys: np.ndarray, share: float, records: int) -> np.ndarray:
    """Return which examples of records are held out.

    Args:
        keys: `content_key` of the prompt of each example, (n,) uint64.
        share: Fraction of the prompts to hold out.
        records: Number of records.

    Returns:
        (n,) bool; all False for fewer than MIN_RECORDS records, and where the fraction would take all of them.
    """
    held = keys / 2.0**64 < share
    return held if records >= MIN_RECORDS and not held.all() else np.zeros(len(keys), bool)


@dataclass(frozen=True)
class HeldOut:
    """Held-out documents.

    Attributes:
        names: Their names.
        keys: The `content_key` of each.
        documents: Number of all documents.
        duplicates: Number of documents that repeat an earlier one.
        first: Name of the first duplicate, "" without any.
        contents: The `content_key` of every document, (documents,).
    """

    names: frozenset[str] = frozenset()
    keys: frozenset[int] = frozenset()
    documents: int = 0
    duplicates: int = 0
    first: str = ""
    contents: np.ndarray = field(default_factory=lambda: np.zeros(0, np.uint64), compare=False, repr=False)


def hold_out(documents: Iterable[Document], share: float) -> HeldOut:
    """Choose the documents to hold out: those of one name or of one content together, by the alphabetically first name.

    Args:
        documents: All documents; they are read once and not kept.
        share: Fraction of the documents; of two groups or more, at least one is held out.

    Returns:
        The choice, which `split` and the tokenizer follow.

    Raises:
        UserError: The fraction is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise UserError(f"the held-out share of the documents is {share}: use a number from 0 to below 1")
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
    first_name: dict[int, str] = {}
    for number, name in zip(group.tolist(), names, strict=True):
        first_name[number] = min(name, first_name.get(number, name))
    threshold = min_share(share, first_name.values())
    chosen = {number for number, name in first_name.items() if place(name) < threshold}
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
    """Number the connected groups of rows: rows that share any of their keys are in one group, directly or through others.

    >>> groups(np.array([1, 1, 2, 3]), np.array([7, 8, 8, 9])).tolist()
    [0, 0, 0, 3]
    """
    group = np.arange(len(keys[0]))
    columns = [np.unique(key, return_inverse=True)[1] for key in keys]
    while True:
        before = group
        for column in columns:
            lowest_group = np.full(len(group), len(group))
            np.minimum.at(lowest_group, column, group)
            group = lowest_group[column]
        if np.array_equal(group, before):
            return group
