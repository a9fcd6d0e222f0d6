"""Learn a Unigram vocabulary: a probability for each piece, pruned from every frequent substring (Kudo 2018).

p(word) is the sum, over its segmentations, of the product of their pieces' probabilities. Expectation maximization estimates
the probabilities; the pieces whose removal costs the least likelihood are dropped; this repeats until `size` are left. It is
SentencePiece's trainer (its seeds, its sparse M-step, its loss of a piece, its rule that a piece contains letters of one
script, digits or signs, never a mixture), written on arrays.

The tokenizers library has such a trainer too. It iterates over words in the order of a hash table that differs in each
process, so floating-point sums and ties differ and the same text gives another vocabulary every time. Here everything is
sorted: the same words give the same pieces, bit for bit.

    learn({"▁low": 5, "▁lower": 2, "▁slow": 3}, size=9)       # [("▁low", -0.9), ...]: pieces, the most likely first

Speed: words are split where no piece may cross (which factorizes the sum exactly), and the distinct parts form a table,
position by row, so that one step of the forward pass is one product of arrays over all of them. 5 MB of English (29,000
parts) to 8,000 pieces take one second on one core, SentencePiece four.
"""

from __future__ import annotations

import functools
import itertools
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

MAX_PIECE_CHARACTERS = 16
"""Maximum characters in a piece (SentencePiece's max_sentencepiece_length)."""
MAX_SEED_PIECES = 1_000_000
"""Maximum size of the initial vocabulary (SentencePiece's seed_sentencepiece_size)."""
MAX_PARTS = 500_000
"""Distinct parts of words that are used, the most frequent ones: bounds memory to about half a gigabyte."""
MAX_PART_CHARACTERS = 32
"""A longer part (without blanks) is split into parts of this length."""
KEEP_RATIO = 0.75
EM_STEPS = 2  # of expectation maximization between two prunings
MIN_EXPECTED_COUNT = 0.5
"""A piece with a lower expected count is dropped (SentencePiece); a required character is counted at least this often."""
BLANK = "▁"


def learn(words: Mapping[str, int], size: int) -> list[tuple[str, float]]:
    """Learn a Unigram vocabulary.

    Args:
        words: Word -> its count, at least 1; a blank is written `▁`, at the start of a word.
        size: Maximum number of pieces; at least the number of distinct characters, each of which becomes a piece.

    Returns:
        Pieces with their natural log-probabilities, the most likely first, ties by spelling.
    """
    table = PartTable.of(parts(words))
    pieces, weight = seeds(table)
    p = weight / weight.sum()
    wanted = max(size * 11 // 10, int((pieces.length == 1).sum()))
    while True:
        for _ in range(EM_STEPS):
            expected = expect(table, pieces, p)
            keep = (expected >= MIN_EXPECTED_COUNT) | (pieces.length == 1)
            pieces, expected = pieces.keep(keep), np.maximum(expected[keep], MIN_EXPECTED_COUNT)
            # Not expected / sum: the digammas favor few pieces (Liang & Klein 2007, as in SentencePiece).
            p = np.exp(digamma(expected) - digamma(expected.sum(keepdims=True)))
        if len(p) <= wanted:
            return _final(table, pieces, p, size, set(itertools.chain.from_iterable(words)))
        kept = pieces_to_keep(table, pieces, np.log(p), expected, max(wanted, int(KEEP_RATIO * len(p))))
        pieces, p = pieces.keep(kept), p[kept]


def parts(words: Mapping[str, int]) -> Mapping[str, int]:
    """Return part -> count of words split where no piece may cross: between scripts, letters, digits and signs.

    >>> sorted(parts({"▁low,": 2, "▁x86": 1}).items())
    [(',', 2), ('86', 1), ('▁low', 2), ('▁x', 1)]
    """
    found: Counter[str] = Counter()
    for word, count in words.items():
        for part in _runs(word):
            found[part] += count
    if len(found) <= MAX_PARTS:
        return found
    return dict(sorted(found.items(), key=lambda row: (-row[1], row[0]))[:MAX_PARTS])


def _runs(word: str) -> Iterator[str]:
    start, before = 0, ""  # before: the kind of the current part; a blank joins any kind
    for i, character in enumerate(word):
        kind = "" if character == BLANK else kind_of(character)
        if i > start and (kind == "" or i - start == MAX_PART_CHARACTERS or before not in ("", kind)):
            yield word[start:i]
            start = i
        before = kind
    yield word[start:]


@functools.cache
def kind_of(character: str) -> str:
    """Return the script of a letter (Han and kana are one, as in SentencePiece), else "digit" or "sign".

    >>> kind_of("a"), kind_of("ж"), kind_of("7"), kind_of("!")
    ('LATIN', 'CYRILLIC', 'digit', 'sign')
    """
    category = unicodedata.category(character)[0]
    if category not in "LM":
        return "digit" if category == "N" else "sign"
    script = unicodedata.name(character, "?").split()[0]
    return "CJK" if script in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else script


@dataclass(frozen=True, eq=False)
class PartTable:
    """Distinct parts in columns, the longest first: character o of part r is at index `base[o] + r`.

    So the parts that have a character o are the first `live[o]` ones, and an operation on them is one slice.

    Args:
        text: (N,) code points.
        count: (R,) count of each part.
        live: Offset -> number of parts that have a character there.
        base: Offset -> index of its first character.
    """

    text: np.ndarray
    count: np.ndarray
    live: list[int]
    base: list[int]

    @staticmethod
    def of(found: Mapping[str, int]) -> PartTable:
        """Return the table of parts."""
        rows = sorted(found, key=lambda part: (-len(part), part))
        lengths = np.array([len(part) for part in rows])
        live = [int((lengths > o).sum()) for o in range(len(rows[0]))]
        text = np.concatenate([np.array([ord(part[o]) for part in rows[:k]]) for o, k in enumerate(live)])
        count = np.array([found[part] for part in rows], np.float64)
        return PartTable(text, count, live, [0, *itertools.accumulate(live)])

    def slices(self) -> Iterator[tuple[int, int, slice, slice, slice]]:
        """Yield (offset, size, places, begin, end) for all pieces of `size` characters at an offset, in forward order.

        `places` are the table indices at which they start. `begin` and `end` are the nodes around them, in an array of all nodes; node o
        of part r, before its character o, is in the o-th block.
        """
        rows = len(self.count)
        for offset in range(len(self.live)):
            node = rows + self.base[offset - 1] if offset else 0
            for size in range(1, min(MAX_PIECE_CHARACTERS, len(self.live) - offset) + 1):
                k = self.live[offset + size - 1]
                end = rows + self.base[offset + size - 1]
                places = slice(self.base[offset], self.base[offset] + k)
                yield offset, size, places, slice(node, node + k), slice(end, end + k)


@dataclass(frozen=True, eq=False)
class Pieces:
    """The vocabulary while it is pruned, P pieces.

    Args:
        at: (MAX_PIECE_CHARACTERS, N) int32, the piece of length l + 1 that starts at each index of the table; P for none.
        offset: (P,) offset of one occurrence of each piece.
        row: (P,) part of that occurrence.
        length: (P,) characters.
    """

    at: np.ndarray
    offset: np.ndarray
    row: np.ndarray
    length: np.ndarray

    def keep(self, keep: np.ndarray) -> Pieces:
        """Return the pieces for which keep is True, renumbered in the same order."""
        if keep.all():
            return self
        new = np.where(keep, np.cumsum(keep) - 1, keep.sum())
        new = np.append(new, keep.sum()).astype(np.int32)
        return Pieces(new[self.at], self.offset[keep], self.row[keep], self.length[keep])


def seeds(table: PartTable) -> tuple[Pieces, np.ndarray]:
    """Return every character and the substrings that occur at least twice, weighted by frequency times length.

    At most MAX_SEED_PIECES, those of the largest weight. A substring is a known shorter one and a further character, so one sort
    of pairs of integers per length numbers them exactly, and only frequent ones are extended.
    """
    n = len(table.text)
    offset = np.repeat(np.arange(len(table.live)), table.live)
    row = np.arange(n) - np.array(table.base)[offset]
    ends = np.zeros(len(table.count), np.int64)
    for o, k in enumerate(table.live):
        ends[:k] = o + 1
    base = np.array(table.base)
    at = np.full((MAX_PIECE_CHARACTERS, n), -1, np.int64)
    copies, weights, lengths = [], [], []
    places, ids, total = np.arange(n), np.zeros(n, np.int64), 0
    for size in range(1, MAX_PIECE_CHARACTERS + 1):
        room = offset[places] + size <= ends[row[places]]
        places, ids = places[room], ids[room]
        last = table.text[base[offset[places] + size - 1] + row[places]]
        _, copy, ids = np.unique(ids * 0x110000 + last, return_index=True, return_inverse=True)
        frequency = np.bincount(ids, weights=table.count[row[places]])
        often = frequency >= (1 if size == 1 else 2)
        number = np.where(often, np.cumsum(often) - 1, -1)
        copies.append(places[copy[often]])
        weights.append(frequency[often] * size)
        lengths.append(np.full(int(often.sum()), size))
        ids = number[ids]
        places, ids = places[ids >= 0], ids[ids >= 0]
        at[size - 1, places] = ids + total
        total += len(copies[-1])
    start, weight, length = np.concatenate(copies), np.concatenate(weights), np.concatenate(lengths)
    pieces = Pieces(np.where(at < 0, total, at).astype(np.int32), offset[start], row[start], length)
    heaviest = np.argsort(np.where(length == 1, -np.inf, -weight), kind="stable")[:MAX_SEED_PIECES]
    keep = np.isin(np.arange(total), heaviest)
    return pieces.keep(keep), weight[keep]


def expect(table: PartTable, pieces: Pieces, p: np.ndarray) -> np.ndarray:
    """Return the expected count of each piece (P,): forward and backward sums over all parts at once.

    Each probability is multiplied by a constant per character, which cancels out and keeps the sums near one.
    """
    per_character = -(p * np.log(p)).sum() / (p * pieces.length).sum()
    q = np.append(p * np.exp(per_character * pieces.length), 0.0)
    rows, nodes = len(table.count), len(table.count) + len(table.text)
    slices = list(table.slices())
    forward = np.zeros(nodes)  # the sum over all segmentations of the text before a node
    forward[:rows] = 1
    for _, size, places, begin, end in slices:
        forward[end] += forward[begin] * q[pieces.at[size - 1, places]]
    backward = np.zeros(nodes)  # the same for the text after it
    for o, k in enumerate(table.live):
        further = table.live[o + 1] if o + 1 < len(table.live) else 0
        backward[rows + table.base[o] + further : rows + table.base[o] + k] = 1  # the ends of parts of o + 1 characters
    for _, size, places, begin, end in reversed(slices):
        backward[begin] += backward[end] * q[pieces.at[size - 1, places]]
    share = table.count / backward[:rows]
    use = np.zeros((MAX_PIECE_CHARACTERS, len(table.text)))
    for _, size, places, begin, end in slices:
        k = begin.stop - begin.start
        use[size - 1, places] = forward[begin] * backward[end] * share[:k]
    total = np.zeros(len(q))
    for at, used in zip(pieces.at, use, strict=True):
        total += np.bincount(at, weights=used, minlength=len(q))
    return np.asarray((total * q)[:-1])


def pieces_to_keep(table: PartTable, pieces: Pieces, log_p: np.ndarray, expected: np.ndarray, n: int) -> np.ndarray:
    """Return which n pieces to keep (P,) bool: the characters, and those whose removal would cost the most likelihood.

    The cost of a piece is how much less likely the text becomes if each occurrence is replaced by its best other segmentation,
    whose pieces then become more frequent (Kudo 2018, section 3.2).
    """
    others = alternatives(table, pieces, log_p)  # (P, MAX_PIECE_CHARACTERS), P for none
    count = (others < len(log_p)).sum(1)
    total = expected.sum()
    padded = np.append(expected, 0.0)
    grown = np.log(total + expected * (count - 1))
    instead = np.where(others < len(log_p), np.log(padded[others] + expected[:, None]), 0.0).sum(1) - count * grown
    worth = np.where(count > 0, expected * (np.log(expected / total) - instead), np.inf)
    kept = np.zeros(len(log_p), bool)
    kept[np.argsort(-worth, kind="stable")[:n]] = True
    return kept


def alternatives(table: PartTable, pieces: Pieces, log_p: np.ndarray) -> np.ndarray:
    """Return the most likely segmentation of each piece without itself: (P, MAX_PIECE_CHARACTERS) int32, padded with P.

    A character has none. One Viterbi pass over all pieces at once, the longest first so that a step is a slice.
    """
    none = len(log_p)
    order = np.argsort(-pieces.length, kind="stable")
    length, offset, row = pieces.length[order], pieces.offset[order], pieces.row[order]
    log_q, base = np.append(log_p, -np.inf), np.array(table.base)
    longest = int(length[0])
    best = np.full((longest + 1, none), -np.inf)
    best[0] = 0
    via = np.full((longest + 1, none), none, np.int32)
    step = np.zeros((longest + 1, none), np.int64)
    for end in range(1, longest + 1):
        k = int(np.searchsorted(-length, -end, side="right"))
        for size in range(1, end + 1):
            ids = pieces.at[size - 1, base[offset[:k] + end - size] + row[:k]]
            score = best[end - size, :k] + log_q[ids]
            if size == end:
                score[length[:k] == size] = -np.inf  # not the piece itself
            better = score > best[end, :k]
            best[end, :k][better] = score[better]
            via[end, :k][better] = ids[better]
            step[end, :k][better] = size
    found = np.full((none, MAX_PIECE_CHARACTERS), none, np.int32)
    node, each = length.copy(), np.arange(none)
    for i in range(longest):
        found[order, i] = via[node, each]
        node -= step[node, each]
    return found


def _final(table: PartTable, pieces: Pieces, p: np.ndarray, size: int, alphabet: set[str]) -> list[tuple[str, float]]:
    base = np.array(table.base)
    order = np.lexsort((np.arange(len(p)), -p, pieces.length > 1))  # characters, then the most likely
    score = np.log(p)
    missing = sorted(alphabet - {chr(table.text[base[o] + r]) for o, r in zip(pieces.offset, pieces.row, strict=True)})
    spelled = dict.fromkeys(
        missing, round(float(score.min()), 6)
    )  # characters that occur only in parts beyond MAX_PARTS
    for i in order[: size - len(missing)]:
        places = base[pieces.offset[i] + np.arange(pieces.length[i])] + pieces.row[i]
        spelled["".join(map(chr, table.text[places]))] = round(float(score[i]), 6)
    return sorted(spelled.items(), key=lambda row: (-row[1], row[0]))


def digamma(x: np.ndarray) -> np.ndarray:
    """Return the derivative of log-gamma for positive x: the recurrence up to 6, then the asymptotic series (error < 1e-9).

    >>> digamma(np.array([0.5, 1.0, 10.0])).round(6).tolist()
    [-1.96351, -0.577216, 2.251753]
    """
    x = np.array(x, np.float64)
    result = np.zeros_like(x)
    while (small := x < 6).any():
        result[small] -= 1 / x[small]
        x[small] += 1
    y = 1 / (x * x)
    return np.asarray(
        result + np.log(x) - 0.5 / x - y * (1 / 12 - y * (1 / 120 - y * (1 / 252 - y * (1 / 240 - y / 132))))
    )
