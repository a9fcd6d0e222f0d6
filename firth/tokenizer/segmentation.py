"""Words and sentences of any script, by Unicode's rules (UAX #29, Unicode 16).

    words        letters, digits and what joins them; every other sign is a unit of its own
    sentences    end behind . ! ? and their like in every script (。 ！ ？ । ؟ ። ...) with their closing quotes and blanks, and
                 at line breaks; a full stop that a small letter or a digit follows ends none

The properties of the characters are `uniseg`'s, which follows the rules one character at a time: 47 seconds for a megabyte
of sentences. Here the rules are a table of pairs (words) and one regular expression over the classes (sentences), on arrays:
a tenth of a second.

Chinese, Japanese, Thai, Lao, Khmer and Burmese do not separate words, and UAX #29 leaves them to dictionaries. ICU has some:
with the extra `firth[icu]` (package icu4py) words are found by them; without it every character is a unit.

>>> texts = ["e.g. 3.5 g. Dr. Who? Yes!", "他來了。我走了！好嗎？"]
>>> [split(text, sentence_starts) for text in texts]
[['e.g. ', '3.5 g. ', 'Dr. ', 'Who? ', 'Yes!'], ['他來了。', '我走了！', '好嗎？']]
>>> split("Don't stop, 3.5 km.", word_starts)
["Don't", ' ', 'stop', ',', ' ', '3.5', ' ', 'km', '.']
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from typing import Any

import numpy as np

ASCII = 128
BLOCK = 256
"""Code points whose classes are looked up at once, when the first of them is met."""

WORD_CLASSES = (
    "OTHER", "CR", "LF", "NEWLINE", "EXTEND", "ZWJ", "FORMAT", "REGIONAL_INDICATOR", "KATAKANA", "HEBREW_LETTER", "ALETTER",
    "SINGLE_QUOTE", "DOUBLE_QUOTE", "MIDNUMLET", "MIDLETTER", "MIDNUM", "NUMERIC", "EXTENDNUMLET", "WSEGSPACE",
)  # fmt: skip
OTHER, CR, LF, NEWLINE, EXTEND, ZWJ, FORMAT, RI, KATA, HEBREW, LETTER, SQ, DQ, MNL, ML, MN, NUM, JOINER, BLANK = range(
    19
)
PICTURE = 64
"""A bit on top of a word class: Extended_Pictographic."""

SENTENCE_CLASSES = {
    "OTHER": "x", "CR": "C", "LF": "L", "SEP": "S", "EXTEND": "e", "FORMAT": "e", "SP": "p", "LOWER": "l", "UPPER": "U",
    "OLETTER": "O", "NUMERIC": "N", "ATERM": "A", "SCONTINUE": "k", "STERM": "T", "CLOSE": "c",
}  # fmt: skip
"""Sentence_Break's values, a letter each."""

_TAIL, _BREAK = "c*+p*+(?![kAT])", "(?:CL|[CLS])?"
_END = "[ATCLS](?:(?<=A)(?!N)(?!(?<=[Ul]A)U)" + _TAIL + "{abbreviation}" + _BREAK
_END += f"|(?<=T){_TAIL}{_BREAK}|(?<=C)L|(?<=[CLS]))"
SENTENCE = re.compile(_END.format(abbreviation="(?![^OUlCLSAT]*l)").encode())
"""A sentence's end: rules SB3 to SB11, over the classes' letters."""
UNCASED_SENTENCE = re.compile(_END.format(abbreviation="").encode())
"""The same without SB8, by which a small letter behind a full stop goes on with the sentence: in a text without any capital
(uncased vocabularies) it would leave no sentence."""

UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x2E80, 0x2FDF),
    (0x3005, 0x3007), (0x3021, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAADF),
    (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip
"""First and last code points of scripts without blanks between words: Thai, Lao, Burmese, Khmer, Tai, Han, kana."""


def split(text: str, starts: Callable[[str], np.ndarray]) -> list[str]:
    """Cut a text where units begin; `starts` is `word_starts` or `sentence_starts`."""
    at = np.flatnonzero(starts(text)).tolist()
    return [text[a:b] for a, b in zip(at, [*at[1:], len(text)], strict=True)]


def word_starts(text: str) -> np.ndarray:
    """Return where a word or another unit begins: (characters,) bool. Blanks are units too."""
    if text.isascii():
        return _ascii_word_starts(text)
    codes = _codes(text)
    if has_dictionary() and unspaced(codes).any():
        starts = np.zeros(len(codes), bool)
        readable = re.sub("[\ud800-\udfff]", "\ufffd", text)
        lengths = [len(word) for word in importlib.import_module("icu4py.breakers").WordBreaker(readable, "en")]
        starts[np.cumsum([0, *lengths[:-1]])] = True
        return starts
    return _word_starts(_word_table().of(codes))


def sentence_starts(text: str) -> np.ndarray:
    """Return where a sentence begins: (characters,) bool."""
    if text.isascii():
        return _sentence_starts(text.encode("ascii").translate(_ascii_sentences()))
    classes = _sentence_table().of(_codes(text))
    starts = np.zeros(len(classes), bool)
    base = _bases(classes == ord("e"), np.isin(classes, (ord("C"), ord("L"), ord("S"))))
    kept = classes[base]
    kept[kept == ord("e")] = ord("x")
    starts[np.flatnonzero(base)] = _sentence_starts(kept.tobytes())
    return starts


def unspaced(codes: np.ndarray) -> np.ndarray:
    """Return which code points are of a script that does not separate words: (n,) bool."""
    edges = np.array(UNSPACED)
    at = edges[:, 0].searchsorted(codes, "right") - 1
    return (at >= 0) & (codes <= edges[at, 1])


@functools.cache
def has_dictionary() -> bool:
    """Whether ICU's dictionaries are installed (the extra `firth[icu]`)."""
    return importlib.util.find_spec("icu4py") is not None


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _bases(ignored: np.ndarray, newline: np.ndarray) -> np.ndarray:
    """Which characters count: marks and joiners go with what they follow, but for a line break or nothing (WB4, SB5)."""
    base = ~ignored
    base[:1] = True
    base[1:] |= newline[:-1]
    return base


def _sentence_starts(classes: bytes) -> np.ndarray:
    pattern = SENTENCE if b"U" in classes else UNCASED_SENTENCE
    starts = np.zeros(len(classes) + 1, bool)
    starts[[0, *(found.end() for found in pattern.finditer(classes))]] = True
    return starts[:-1]


@functools.cache
def _pairs() -> np.ndarray:
    """joined[a, b]: a word goes on from a character of class a to one of class b, whatever is around them."""
    letters, joined = (HEBREW, LETTER), np.zeros((19, 19), bool)
    for a in letters:
        for b in letters:
            joined[a, b] = True
        joined[a, NUM] = joined[NUM, a] = True
    joined[HEBREW, SQ] = joined[CR, LF] = True
    for a in (*letters, NUM, KATA, JOINER):
        joined[a, JOINER] = joined[JOINER, a] = True
    joined[NUM, NUM] = joined[KATA, KATA] = True
    return joined


def _word_starts(flagged: np.ndarray) -> np.ndarray:
    """Rules WB3 to WB16 on classes (n,)."""
    starts = np.zeros(len(flagged), bool)
    if not len(flagged):
        return starts
    c = flagged & (PICTURE - 1)
    base = _bases((c >= EXTEND) & (c <= FORMAT), (c >= CR) & (c <= NEWLINE))
    at = np.flatnonzero(base)
    d = c[at]
    d[(d >= EXTEND) & (d <= FORMAT)] = OTHER
    joined = np.zeros(len(d), bool)  # with what stands before
    joined[1:] = _pairs()[d[:-1], d[1:]]
    touching = at[1:] == at[:-1] + 1
    joined[1:] |= (d[1:] == BLANK) & (d[:-1] == BLANK) & touching  # WB3d
    joined[1:] |= (flagged[at[1:]] >= PICTURE) & (c[at[1:] - 1] == ZWJ)  # WB3c
    letter = (d == LETTER) | (d == HEBREW)
    between = (letter, (d == ML) | (d == MNL) | (d == SQ)), (d == NUM, (d == MN) | (d == MNL) | (d == SQ))
    for side, middle in (*between, (d == HEBREW, d == DQ)):  # WB6, WB7, WB7b, WB7c, WB11, WB12
        inside = side[:-2] & middle[1:-1] & side[2:]
        joined[1:-1] |= inside
        joined[2:] |= inside
    flag = d == RI  # WB15, WB16: every second one of a run
    if flag.any():
        run = np.arange(len(d)) - np.maximum.accumulate(np.where(flag, -1, np.arange(len(d))))
        joined |= flag & (run % 2 == 0)
    starts[at] = ~joined
    return starts


def _ascii_word_starts(text: str) -> np.ndarray:
    """The same where all is ASCII, which has no marks, flags and pictures: a tenth of the time."""
    table, joined, between = _ascii_words()
    c = np.frombuffer(text.encode("ascii").translate(table), np.uint8)
    starts = np.ones(len(c), bool)
    starts[1:] = ~joined[c[:-1], c[1:]]
    middle = np.flatnonzero((c[1:-1] >= SQ) & (c[1:-1] <= MN)) + 1
    middle = middle[between[c[middle - 1], c[middle], c[middle + 1]]]
    starts[middle] = starts[middle + 1] = False
    return starts


@functools.cache
def _ascii_words() -> tuple[bytes, np.ndarray, np.ndarray]:
    """Each character's class (for bytes.translate), the pairs that are joined, and signs by what stands before and behind."""
    joined, between = _pairs().copy(), np.zeros((19, 19, 19), bool)
    joined[BLANK, BLANK] = True
    for sign in (ML, MNL, SQ):
        between[LETTER, sign, LETTER] = True
    for sign in (MN, MNL, SQ):
        between[NUM, sign, NUM] = True
    classes = _word_table().of(np.arange(ASCII)) & (PICTURE - 1)
    return classes.tobytes() + bytes(256 - ASCII), joined, between


class _Table:
    """A property of every code point as a small integer, looked up a BLOCK at a time."""

    def __init__(self, look: Callable[[str], int]) -> None:
        self._look = look
        self._values = np.zeros(0x110000, np.uint8)
        self._known = np.zeros(0x110000 // BLOCK, bool)

    def of(self, codes: np.ndarray) -> np.ndarray:
        blocks = codes // BLOCK
        if not self._known[blocks].all():
            for block in np.unique(blocks[~self._known[blocks]]).tolist():
                first = block * BLOCK
                self._values[first : first + BLOCK] = [self._look(chr(code)) for code in range(first, first + BLOCK)]
                self._known[block] = True
        return self._values[codes]


@functools.cache
def _word_table() -> _Table:
    from uniseg import emoji, wordbreak  # 8 MB of tables and 0.4 s, which `firth --help` does without

    def look(character: str) -> int:
        if "\ud800" <= character <= "\udfff":  # a part of a character counts as a letter: most are
            return LETTER
        name: Any = wordbreak.word_break(character).name
        return WORD_CLASSES.index(name) + PICTURE * bool(emoji.extended_pictographic(character))

    return _Table(look)


@functools.cache
def _sentence_table() -> _Table:
    from uniseg import sentencebreak

    def look(character: str) -> int:
        if "\ud800" <= character <= "\udfff":
            return ord("O")
        name: Any = sentencebreak.sentence_break(character).name
        return ord(SENTENCE_CLASSES[name])

    return _Table(look)


@functools.cache
def _ascii_sentences() -> bytes:
    """For bytes.translate: the letter of each ASCII character; none of them is ignored."""
    return _sentence_table().of(np.arange(ASCII)).tobytes() + bytes(256 - ASCII)
