"""Split text of any script into words and sentences by Unicode's rules (UAX #29, Unicode 16).

    words        letters, digits and what joins them; every other character is a unit of its own
    sentences    end after . ! ? and their equivalents in every script (。 ！ ？ । ؟ ። ...) with closing quotes and blanks, and
                 at line breaks; a full stop before a lowercase letter or a digit ends none

The properties of the characters come from `uniseg`, whose own segmentation goes one character at a time: 47 seconds for a
megabyte of sentences. Here the rules are a table of pairs (words) and one regular expression over the classes (sentences),
on arrays: a tenth of a second.

Chinese, Japanese, Thai, Lao, Khmer and Burmese do not separate words, and UAX #29 leaves them to dictionaries. With the extra
`firth[icu]` (package icu4py) ICU's dictionaries find their words; without it every character is a unit.

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
"""Code points whose classes are looked up at once, when the first of them occurs."""

WORD_CLASSES = (
    "OTHER", "CR", "LF", "NEWLINE", "EXTEND", "ZWJ", "FORMAT", "REGIONAL_INDICATOR", "KATAKANA", "HEBREW_LETTER", "ALETTER",
    "SINGLE_QUOTE", "DOUBLE_QUOTE", "MIDNUMLET", "MIDLETTER", "MIDNUM", "NUMERIC", "EXTENDNUMLET", "WSEGSPACE",
)  # fmt: skip
OTHER, CR, LF, NEWLINE, EXTEND, ZWJ, FORMAT, RI, KATA, HEBREW, LETTER, SQ, DQ, MNL, ML, MN, NUM, JOINER, BLANK = range(
    19
)
PICTURE = 64
"""Flag added to a word class: Extended_Pictographic."""

SENTENCE_CLASSES = {
    "OTHER": "x", "CR": "C", "LF": "L", "SEP": "S", "EXTEND": "e", "FORMAT": "e", "SP": "p", "LOWER": "l", "UPPER": "U",
    "OLETTER": "O", "NUMERIC": "N", "ATERM": "A", "SCONTINUE": "k", "STERM": "T", "CLOSE": "c",
}  # fmt: skip
"""Values of Sentence_Break -> one letter each."""

_TAIL, _BREAK = "c*+p*+(?![kAT])", "(?:CL|[CLS])?"
_END = "[ATCLS](?:(?<=A)(?!N)(?!(?<=[Ul]A)U)" + _TAIL + "{abbreviation}" + _BREAK
_END += f"|(?<=T){_TAIL}{_BREAK}|(?<=C)L|(?<=[CLS]))"
SENTENCE = re.compile(_END.format(abbreviation="(?![^OUlCLSAT]*l)").encode())
"""The end of a sentence: rules SB3 to SB11, over the letters of the classes."""
UNCASED_SENTENCE = re.compile(_END.format(abbreviation="").encode())
"""The same without SB8, by which a lowercase letter after a full stop continues the sentence: a text without capitals (uncased
vocabularies) would be one sentence.
"""

UNSPACED = (
    (0x0E00, 0x0EFF), (0x1000, 0x109F), (0x1780, 0x17FF), (0x1950, 0x19DF), (0x1A20, 0x1AAF), (0x2E80, 0x2FDF),
    (0x3005, 0x3007), (0x3021, 0x30FF), (0x31F0, 0x31FF), (0x3400, 0x9FFF), (0xA9E0, 0xA9FF), (0xAA60, 0xAADF),
    (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip
"""First and last code points of scripts without blanks between words: Thai, Lao, Burmese, Khmer, Tai, Han, kana."""


def split(text: str, starts: Callable[[str], np.ndarray]) -> list[str]:
    """Split a text at the starts of its units; `starts` is `word_starts` or `sentence_starts`."""
    at = np.flatnonzero(starts(text)).tolist()
    return [text[a:b] for a, b in zip(at, [*at[1:], len(text)], strict=True)]


def word_starts(text: str) -> np.ndarray:
    """Return where a word or another unit starts: (characters,) bool. Blanks are units too."""
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
    """Return where a sentence starts: (characters,) bool."""
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
    """Return which code points belong to a script that does not separate words: (n,) bool."""
    edges = np.array(UNSPACED)
    at = edges[:, 0].searchsorted(codes, "right") - 1
    return (at >= 0) & (codes <= edges[at, 1])


@functools.cache
def has_dictionary() -> bool:
    """Return whether ICU's dictionaries are installed (the extra `firth[icu]`)."""
    return importlib.util.find_spec("icu4py") is not None


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)


def _bases(ignored: np.ndarray, newline: np.ndarray) -> np.ndarray:
    """Return which characters count: marks and joiners belong to the previous character, except after a line break (WB4, SB5)."""
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
    """Return joined[a, b]: whether a word continues from a character of class a to one of class b, in any context."""
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
    """Apply the rules WB3 to WB16 to classes (n,)."""
    starts = np.zeros(len(flagged), bool)
    if not len(flagged):
        return starts
    c = flagged & (PICTURE - 1)
    base = _bases((c >= EXTEND) & (c <= FORMAT), (c >= CR) & (c <= NEWLINE))
    at = np.flatnonzero(base)
    d = c[at]
    d[(d >= EXTEND) & (d <= FORMAT)] = OTHER
    joined = np.zeros(len(d), bool)  # with the previous character
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
    """Return the same for ASCII, which has no marks, flags and pictures, in a tenth of the time."""
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
    """Return the class of each character (for bytes.translate), the joined pairs, and signs by the classes before and after."""
    joined, between = _pairs().copy(), np.zeros((19, 19, 19), bool)
    joined[BLANK, BLANK] = True
    for sign in (ML, MNL, SQ):
        between[LETTER, sign, LETTER] = True
    for sign in (MN, MNL, SQ):
        between[NUM, sign, NUM] = True
    classes = _word_table().of(np.arange(ASCII)) & (PICTURE - 1)
    return classes.tobytes() + bytes(256 - ASCII), joined, between


class _Table:
    """A property of every code point as a small integer, looked up BLOCK code points at a time."""

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
    from uniseg import emoji, wordbreak  # 8 MB of tables and 0.4 s, which `firth --help` must not pay

    def look(character: str) -> int:
        if "\ud800" <= character <= "\udfff":  # half of a character counts as a letter: most are
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
    """Return the letter of each ASCII character (for bytes.translate); none of them is ignored."""
    return _sentence_table().of(np.arange(ASCII)).tobytes() + bytes(256 - ASCII)
