"""Learn the merges of a BPE or WordPiece vocabulary from word counts (Sennrich 2016).

The most frequent pair of neighboring symbols becomes one symbol, repeatedly. Of equally frequent pairs the one with the
smaller ids comes first. These are the rules of the tokenizers library's trainer, and its merges; but its trainer takes
texts and splits them itself, and this one takes words that are counted already. It also returns how often each pair
occurred when it was merged (`firth tokenizer show` prints it).

All words are in one array of symbols. A merge is a few array operations on the positions of its pair.

>>> ids, learned = learn({"low": 3, "lo": 2, "slow": 1}, ["l", "o", "s", "w"], size=6)
>>> [(m.left, m.right, m.count) for m in learned], ids["low"]
([('l', 'o', 6), ('lo', 'w', 4)], 5)
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

GAP, GONE = -1, -2
"""Symbols between two words, and of a symbol that was merged into the one before it."""

STEP = 8
"""Only pairs within this factor of the most frequent ones are kept sorted; the others are sorted when they are needed."""


@dataclass(frozen=True)
class Merge:
    """A learned merge.

    Args:
        left: First piece.
        right: Second piece.
        count: How often they were neighbors when they were merged; None: unknown.
    """

    left: str
    right: str
    count: int | None = None


def spell(word: str, prefix: str = "", suffix: str = "") -> list[str]:
    """Return the characters of a word, the symbols that merging starts from.

    >>> spell("low", suffix="</w>"), spell("low", prefix="##")
    (['l', 'o', 'w</w>'], ['l', '##o', '##w'])
    """
    last = len(word) - 1
    return [(prefix if i else "") + letter + (suffix if i == last else "") for i, letter in enumerate(word)]


def learn(
    words: Mapping[str, int],
    first: Sequence[str],
    size: int,
    prefix: str = "",
    suffix: str = "",
    split: Callable[[str], Sequence[str]] | None = None,
) -> tuple[dict[str, int], list[Merge]]:
    """Learn merges until there are `size` pieces or nothing is left to merge.

    Args:
        words: Word -> its count, at least 1.
        first: The pieces with the ids from 0 on, including all characters of the words in all their forms.
        size: Number of pieces.
        prefix: Marks a piece that continues a word (WordPiece).
        suffix: Marks a piece that ends a word (BPE).
        split: The pieces of a word that merging starts from; None: its characters. With it, no merge makes one of the first
            pieces, so that a word is still made of them or of new ones.

    Returns:
        Piece -> id, and the merges in order.
    """
    ids = {piece: i for i, piece in enumerate(first)}
    pieces, learned = list(first), list[Merge]()
    row = _Row(words, ids, split or (lambda word: spell(word, prefix, suffix)))
    while len(pieces) < size and (best := row.most_frequent()) is not None:
        left, right, count = best
        piece = pieces[left] + pieces[right].removeprefix(prefix)
        if split is not None and ids.get(piece, len(first)) < len(first):
            row.leave(left, right)
            continue
        if piece not in ids:
            ids[piece] = len(pieces)
            pieces.append(piece)
        learned.append(Merge(pieces[left], pieces[right], count))
        row.merge(left, right, ids[piece])
    return ids, learned


class _Row:
    """The symbols of all words in one array, with the positions of every pair."""

    def __init__(self, words: Mapping[str, int], ids: Mapping[str, int], split: Callable[[str], Sequence[str]]) -> None:
        symbols, lengths = [GAP], []
        for word in words:
            before = len(symbols)
            symbols += [ids[letter] for letter in split(word)]
            symbols.append(GAP)
            lengths.append(len(symbols) - before)
        self._symbols = np.array(symbols, np.int64)
        n = len(symbols)
        self._next, self._before = np.arange(1, n + 1), np.arange(-1, n - 1)
        self._frequency = np.zeros(n, np.int64)
        self._frequency[1:] = np.repeat(np.fromiter(words.values(), np.int64, len(words)), lengths)
        self._counts: dict[int, int] = {}
        self._places: dict[int, list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = {}
        """Newest symbol of the pairs (-1: the characters) -> sorted pairs, start of the positions of each, positions."""
        self._heap: list[tuple[int, int]] = []
        self._least = 1 << 62
        self._newest = len(ids)
        at = np.flatnonzero((self._symbols[:-1] >= 0) & (self._symbols[1:] >= 0))
        self._add(-1, self._symbols[at] << 32 | self._symbols[at + 1], at)

    def most_frequent(self) -> tuple[int, int, int] | None:
        """Return the most frequent pair and its count; None if no pair is left."""
        while True:
            while self._heap:
                count, pair = heapq.heappop(self._heap)
                now = self._counts.get(pair, 0)
                if now == -count:
                    return pair >> 32, pair & 0xFFFFFFFF, now
                if now >= self._least:
                    heapq.heappush(self._heap, (-now, pair))
            if self._least <= 1:
                return None
            highest = max(self._counts.values(), default=1)
            self._least = max(1, highest // STEP)
            self._heap = [(-count, pair) for pair, count in self._counts.items() if count >= self._least]
            heapq.heapify(self._heap)

    def leave(self, left: int, right: int) -> None:
        """Never return a pair again."""
        del self._counts[left << 32 | right]

    def merge(self, left: int, right: int, new: int) -> None:
        """Replace every pair of left and right by one symbol."""
        symbols, following, preceding = self._symbols, self._next, self._before
        pair = left << 32 | right
        del self._counts[pair]
        at = self._found(pair, max(left, right))
        at = at[symbols[at] == left]
        second = following[at]
        alive = symbols[second] == right
        at, second = at[alive], second[alive]
        if left == right:  # of three in a row the first two are merged
            number = np.arange(len(at))
            opens = np.append(True, second[:-1] != at[1:])
            even = (number - np.maximum.accumulate(number * opens)) % 2 == 0
            at, second = at[even], second[even]
        before, after = preceding[at], following[second]
        symbols[second] = GONE
        opened, closed = (
            symbols[before] >= 0,
            symbols[after] >= 0,
        )  # the left neighbor of a merged pair is counted by that pair
        at_left, at_right = before[opened], at[closed]
        frequency = np.concatenate((self._frequency[at_left], self._frequency[at_right]))
        removed = np.concatenate((symbols[at_left] << 32 | left, right << 32 | symbols[after[closed]]))
        symbols[at] = new
        following[at], preceding[after] = after, at
        added = np.concatenate((symbols[at_left] << 32 | new, new << 32 | symbols[after[closed]]))
        pairs, inverse = np.unique(removed, return_inverse=True)
        counts = self._counts
        for gone, count in zip(pairs.tolist(), np.bincount(inverse, frequency).astype(np.int64).tolist(), strict=True):
            if gone in counts:
                counts[gone] -= count
        self._add(new, added, np.concatenate((at_left, at_right)))

    def _add(self, newest: int, pairs: np.ndarray, at: np.ndarray) -> None:
        """Record pairs (n,) at the positions (n,)."""
        if not len(pairs):
            return
        order = np.argsort(pairs, kind="stable")
        pairs, at = pairs[order], at[order]
        begins = np.flatnonzero(np.append(True, pairs[1:] != pairs[:-1]))
        kinds = pairs[begins]
        self._places.setdefault(newest, []).append((kinds, np.append(begins, len(pairs)), at))
        counts, heap, least = self._counts, self._heap, self._least
        for pair, count in zip(kinds.tolist(), np.add.reduceat(self._frequency[at], begins).tolist(), strict=True):
            counts[pair] = count = counts.get(pair, 0) + count
            if count >= least:
                heapq.heappush(heap, (-count, pair))

    def _found(self, pair: int, newest: int) -> np.ndarray:
        """Return the positions at which a pair was recorded."""
        found = []
        for kinds, begins, at in self._places.get(newest if newest >= self._newest else -1, ()):
            i = int(kinds.searchsorted(pair))
            if i < len(kinds) and kinds[i] == pair:
                found.append(at[begins[i] : begins[i + 1]])
        return found[0] if len(found) == 1 else np.sort(np.concatenate(found))
