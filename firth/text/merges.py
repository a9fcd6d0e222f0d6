"""The merges of a BPE or WordPiece vocabulary in the order they were learnt, and how often each pair stood in the text.

The engine keeps the order of the merges but not the count that was the reason for each. `count` finds it again, exactly,
by applying the merges one after another to the words they were learnt from; `firth tokenizer show` prints it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[str, str]


@dataclass(frozen=True)
class Merge:
    """A learnt piece: the two that were merged, and how often they stood side by side then (None: not counted)."""

    left: str
    right: str
    count: int | None = None


def spell(word: str, prefix: str = "", suffix: str = "") -> list[str]:
    """A word as the characters that merging begins with.

    >>> spell("low", suffix="</w>"), spell("low", prefix="##")
    (['l', 'o', 'w</w>'], ['l', '##o', '##w'])
    """
    last = len(word) - 1
    return [(prefix if i else "") + letter + (suffix if i == last else "") for i, letter in enumerate(word)]


def count(pairs: Iterable[Pair], words: Mapping[str, int], prefix: str = "", suffix: str = "") -> list[Merge]:
    """Apply the merges one after another to words (word -> how often) and count each just before it is applied.

    >>> [m.count for m in count([("l", "o"), ("lo", "w")], {"low": 3, "lo": 2, "slow": 1})]
    [6, 4]
    """
    order = list(pairs)
    rank = {pair: i for i, pair in enumerate(order)}
    total = [0] * len(order)
    for word, often in words.items():
        letters = spell(word, prefix, suffix)
        while len(letters) > 1:
            found = [rank.get(pair, len(order)) for pair in itertools.pairwise(letters)]
            first = min(found)
            if first == len(order):
                break
            total[first] += often * found.count(first)
            letters = _merged(letters, order[first], prefix)
    return [Merge(*pair, n) for pair, n in zip(order, total, strict=True)]


def _merged(letters: Sequence[str], pair: Pair, prefix: str) -> list[str]:
    whole = pair[0] + pair[1].removeprefix(prefix)
    merged: list[str] = []
    i = 0
    while i < len(letters):
        if tuple(letters[i : i + 2]) == pair:
            merged.append(whole)
            i += 2
        else:
            merged.append(letters[i])
            i += 1
    return merged
