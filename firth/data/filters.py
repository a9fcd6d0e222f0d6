"""Light filters of `firth prepare`: duplicates, near duplicates, language and repetition, on one machine without another package.

    exact duplicates     documents with the same text but for white space; the first one is kept
    near duplicates      MinHash (Broder 1997) over shingles of 5 words, 14 bands of 8 hashes, as in datatrove and FineWeb (Penedo 2024):
                         texts of Jaccard similarity s share a band with probability 1 - (1 - s^8)^14, which is 0.92 at 0.8, 0.77 at
                         0.75 and 0.05 at 0.5; a document that shares a band with an earlier one is dropped
    language             by py3langid if it is installed, else by the script of the letters
    repetition           the ratios of Gopher (Rae 2021, table A1), each times `max_repetition`

Whether a document is dropped depends on it and on earlier ones, so documents that are added later change nothing.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from firth.data.shuffle import mix_bits
from firth.data.split import content_key
from firth.fields import NonNegativeFloat, Validated
from firth.types import UserError

RULES = ("", "language", "repetition", "duplicate", "near duplicate")
"""Names of the rules; their numbers are in the files of a part."""

LANGUAGE, REPETITION, DUPLICATE, NEAR_DUPLICATE = range(1, 5)

BANDS, ROWS, SHINGLE_WORDS = 14, 8, 5

SCRIPTS = {
    **dict.fromkeys(("ru", "uk", "bg", "sr", "mk", "be", "kk"), ("CYRILLIC",)),
    **dict.fromkeys(("zh",), ("CJK",)),
    **dict.fromkeys(("ja",), ("HIRAGANA", "KATAKANA", "CJK")),
    **dict.fromkeys(("ko",), ("HANGUL",)),
    **dict.fromkeys(("ar", "fa", "ur"), ("ARABIC",)),
    **dict.fromkeys(("hi", "mr", "ne"), ("DEVANAGARI",)),
    **{"el": ("GREEK",), "he": ("HEBREW",), "th": ("THAI",), "ka": ("GEORGIAN",), "hy": ("ARMENIAN",), "bn": ("BENGALI",)},
}  # fmt: skip
"""Language -> first words of the Unicode names of its letters; others are Latin."""

LANGUAGE_CHARACTERS = 2000
"""Characters of a document by which its language is determined."""

_WORD = re.compile(r"\w+")
_UNSPACED = re.compile("([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff])")
"""Letters of scripts without blanks between words: each counts as a word."""


@dataclass(frozen=True)
class FilterConfig(Validated, section="filters"):
    """Which documents `firth prepare` drops.

    Args:
        deduplicate: Whether to drop exact duplicates.
        near_duplicates: Whether to drop near duplicates.
        language: The language to keep, as in "en"; empty keeps all.
        language_by: How it is determined: "py3langid" or "script"; empty takes the first that this machine has.
        max_repetition: Multiple of Gopher's limits on repetition, 1 for these limits; 0 keeps all.
    """

    deduplicate: bool = False
    near_duplicates: bool = False
    language: str = ""
    language_by: str = ""
    max_repetition: NonNegativeFloat = 0.0

    @property
    def any(self) -> bool:
        """Whether a document can be dropped."""
        return bool(self.deduplicate or self.near_duplicates or self.language or self.max_repetition)

    @property
    def compares(self) -> bool:
        """Whether documents are compared with each other."""
        return self.deduplicate or self.near_duplicates


def language_method(language: str) -> str:
    """Return how the language is determined on this machine.

    Raises:
        UserError: The language is not a code of two letters.
    """
    if not language:
        return ""
    if not re.fullmatch("[a-z]{2}", language):
        raise UserError(f"--language {language!r}: use a code of two letters, for example en")
    return "py3langid" if importlib.util.find_spec("py3langid") else "script"


class Filters:
    """The rules that concern one document alone."""

    def __init__(self, config: FilterConfig) -> None:
        self._config = config
        self._classify = _classifier() if config.language_by == "py3langid" else None

    def rule(self, text: str) -> int:
        """Return the number of the rule that drops a text, or 0."""
        config = self._config
        if config.language and not self._in_language(text[:LANGUAGE_CHARACTERS]):
            return LANGUAGE
        if config.max_repetition and repetition(text) > config.max_repetition:
            return REPETITION
        return 0

    def _in_language(self, text: str) -> bool:
        language = self._config.language
        if self._classify is not None:
            return self._classify(text) == language
        scripts = SCRIPTS.get(language, ("LATIN",))
        letters = Counter(unicodedata.name(c, "").split(" ")[0] for c in text if c.isalpha())
        return 2 * sum(letters[script] for script in scripts) >= letters.total()


def _classifier() -> Callable[[str], str]:
    try:
        import py3langid
    except ImportError:
        raise UserError(
            "this corpus was filtered with py3langid, which is not installed: pip install py3langid, or prepare into another --out"
        ) from None
    return lambda text: str(py3langid.classify(text)[0])


GOPHER_TOP = {2: 0.20, 3: 0.18, 4: 0.16}
"""n -> the most of the text that the most frequent n-gram may be."""
GOPHER_DUPLICATE = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}
"""n -> the most of the text that repeated n-grams may cover."""
GOPHER_LINES, GOPHER_LINE_CHARACTERS = 0.30, 0.20
"""The most repeated lines (or paragraphs), as a share of the lines, and of the characters."""


def repetition(text: str) -> float:
    """Return the largest ratio of repetition of a text over Gopher's limit for it: more than 1 is what Gopher drops.

    Lines and paragraphs count as repeated if they occurred before; so do n-grams of words, whose characters count once.
    """
    worst = 0.0
    for separator in (r"\n+", r"\n{2,}"):
        parts = [part for part in re.split(separator, text.strip()) if part]
        extra = [part for part, n in Counter(parts).items() for _ in range(n - 1)]
        if parts:
            worst = max(worst, len(extra) / len(parts) / GOPHER_LINES)
            worst = max(worst, sum(map(len, extra)) / max(1, len(text)) / GOPHER_LINE_CHARACTERS)
    words = Words(text)
    for n, limit in GOPHER_TOP.items():
        worst = max(worst, words.top_share(n) / limit)
    for n, limit in GOPHER_DUPLICATE.items():
        worst = max(worst, words.repeated_share(n) / limit)
    return worst


class Words:
    """The words of a text in lower case, and the hashes of sequences of them.

    A sequence has the polynomial hash of its bytes modulo 2^64, which is a difference of two prefixes, so all n-grams of a text cost a
    few operations on arrays.
    """

    def __init__(self, text: str) -> None:
        spaced = _UNSPACED.sub(r" \1 ", text.lower())
        raw = " ".join(_WORD.findall(spaced)).encode("utf-8", "replace")
        codes = np.frombuffer(raw, np.uint8)
        blanks = np.flatnonzero(codes == 32)
        self.starts = np.concatenate(([0], blanks + 1)) if len(raw) else np.zeros(0, np.int64)
        self.stops = np.concatenate((blanks, [len(raw)])) if len(raw) else np.zeros(0, np.int64)
        powers, self._inverse = _powers(len(raw) + 1)
        self._prefix = np.concatenate(
            (np.zeros(1, np.uint64), np.cumsum((codes.astype(np.uint64) + np.uint64(1)) * powers[: len(raw)]))
        )

    def __len__(self) -> int:
        return len(self.starts)

    def ngrams(self, n: int) -> np.ndarray:
        """Return the hashes of the sequences of n words: (len(self) - n + 1,) uint64."""
        if len(self) < n:
            return np.zeros(0, np.uint64)
        starts, stops = self.starts[: len(self) - n + 1], self.stops[n - 1 :]
        return mix_bits((self._prefix[stops] - self._prefix[starts]) * self._inverse[starts])

    def top_share(self, n: int) -> float:
        """Return the share of the text that the most frequent sequence of n words is; 0 if none occurs twice."""
        hashes = self.ngrams(n)
        if not len(hashes):
            return 0.0
        _, first, counts = np.unique(hashes, return_index=True, return_counts=True)
        sizes = self.stops[first + n - 1] - self.starts[first]
        most = counts.max()
        return float((sizes * counts)[counts == most].max() / self.stops[-1]) if most > 1 else 0.0

    def repeated_share(self, n: int) -> float:
        """Return the share of the text in sequences of n words that occurred before."""
        hashes = self.ngrams(n)
        if not len(hashes):
            return 0.0
        repeated = np.ones(len(hashes), bool)
        repeated[np.unique(hashes, return_index=True)[1]] = False
        covered = np.zeros(len(self) + 1, np.int64)
        at = np.flatnonzero(repeated)
        np.add.at(covered, at, 1)
        np.add.at(covered, at + n, -1)
        sizes = self.stops - self.starts
        return float(sizes[covered.cumsum()[:-1] > 0].sum() / max(1, sizes.sum()))


_BASE = 0x9E3779B97F4A7C15
_tables: list[np.ndarray] = [np.ones(1, np.uint64), np.ones(1, np.uint64)]


def _powers(count: int) -> list[np.ndarray]:
    """Return the powers of the base and of its inverse modulo 2^64, `count` or more of each."""
    if len(_tables[0]) < count:
        size = 1 << (count - 1).bit_length()
        for i, base in enumerate((_BASE, pow(_BASE, -1, 1 << 64))):
            factors = np.full(size, base, np.uint64)
            factors[0] = 1
            _tables[i] = np.multiply.accumulate(factors)
    return _tables


_RNG = np.random.Generator(np.random.Philox(key=np.array([0x4D696E48617368, 0], np.uint64)))
_FACTORS = (_RNG.integers(0, 1 << 63, BANDS * ROWS, np.uint64) << np.uint64(1)) | np.uint64(1)
_SHIFTS = _RNG.integers(0, 1 << 63, BANDS * ROWS, np.uint64)

SHINGLES_AT_ONCE = 2048


def signature(text: str) -> np.ndarray:
    """Return the MinHash signature of a text: the minimum of each of 112 hash functions over its shingles, (112,) uint64.

    A text of fewer than five words is one shingle, and so is one without words, such as signs alone.
    """
    words = Words(text)
    shingles = np.unique(words.ngrams(min(SHINGLE_WORDS, len(words))) if len(words) else np.uint64(content_key(text)))
    found = np.full(BANDS * ROWS, np.iinfo(np.uint64).max, np.uint64)
    for start in range(0, len(shingles), SHINGLES_AT_ONCE):
        hashed = shingles[start : start + SHINGLES_AT_ONCE, None] * _FACTORS + _SHIFTS
        np.minimum(found, hashed.min(0), out=found)
    return found


def bands(text: str) -> np.ndarray:
    """Return the hash of each band of the signature, (14,) uint64."""
    rows = signature(text).reshape(BANDS, ROWS)
    found = np.arange(BANDS, dtype=np.uint64)
    for k in range(ROWS):
        found = mix_bits(found ^ rows[:, k])
    return found


class Fingerprints:
    """What is compared between documents: collected while a part is scanned, and written as arrays.

    rules.npy (documents,) uint8, keys.npy (documents,) uint64 and bands.npy (documents, 14) uint64.
    """

    def __init__(self, config: FilterConfig) -> None:
        self._config = config
        self._rules, self._keys = bytearray(), bytearray()
        self._bands = bytearray()

    def add(self, text: str, rule: int) -> None:
        """Add a document, and the rule that drops it."""
        self._rules.append(rule)
        if self._config.deduplicate:
            self._keys += np.uint64(0 if rule else content_key(text)).tobytes()
        if self._config.near_duplicates:
            self._bands += (np.zeros(BANDS, np.uint64) if rule else bands(text)).tobytes()

    def write(self, place: Path) -> None:
        """Write the arrays."""
        np.save(place / "rules.npy", np.frombuffer(self._rules, np.uint8))
        np.save(place / "keys.npy", np.frombuffer(self._keys, np.uint64))
        np.save(place / "bands.npy", np.frombuffer(self._bands, np.uint64).reshape(-1, BANDS))


COMPARED_AT_ONCE = 1 << 22
"""Values that are sorted at once."""


def dropped(scans: Sequence[Path], config: FilterConfig) -> list[np.ndarray]:
    """Return the number of the rule that drops each document, for each part in order: (documents,) uint8 each.

    Args:
        scans: Directories that `Fingerprints.write` wrote, in the order of the documents.
        config: The rules.
    """
    found = [np.load(scan / "rules.npy") for scan in scans]
    alive = [rules == 0 for rules in found]
    if config.deduplicate:
        _mark(found, _repeated(lambda part: np.load(scans[part] / "keys.npy", mmap_mode="r"), alive), DUPLICATE)
        alive = [rules == 0 for rules in found]
    if config.near_duplicates:
        for band in range(BANDS):
            values = partial(_band, scans, band)
            _mark(found, _repeated(values, alive), NEAR_DUPLICATE)
    return found


def _band(scans: Sequence[Path], band: int, part: int) -> np.ndarray:
    """Return a column of the fingerprints of a part."""
    rows: np.ndarray = np.load(scans[part] / "bands.npy", mmap_mode="r")
    return rows[:, band]


def _mark(found: list[np.ndarray], repeated: Iterator[tuple[int, np.ndarray]], rule: int) -> None:
    """Note the rule for documents that no rule has dropped before."""
    for part, rows in repeated:
        some = rows[found[part][rows] == 0]
        found[part][some] = rule


def _repeated(read: Callable[[int], np.ndarray], alive: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Yield (part, rows) of values that an earlier row or part has too; only rows that are alive count.

    The values are compared in groups of equal remainder, so that memory is bounded. One file is open at a time: parts can be more
    than the files that a process may open.

    Args:
        read: Returns the values of a part.
        alive: The rows of each part that count.
    """
    groups = max(1, -(-sum(map(len, alive)) // COMPARED_AT_ONCE))
    for group in range(groups):
        rows, some_values = [], []
        for part, mask in enumerate(alive):
            column = read(part)
            rows.append(np.flatnonzero(mask & (column % np.uint64(groups) == group)))
            some_values.append(column[rows[-1]])
        values = np.concatenate(some_values)
        order = np.argsort(values, kind="stable")
        again = np.zeros(len(values), bool)
        again[order[1:]] = values[order[1:]] == values[order[:-1]]
        start = 0
        for part, some in enumerate(rows):
            yield part, some[again[start : start + len(some)]]
            start += len(some)
