"""Examples from the documents of a token store, and word frequencies for word2vec.

Examples from the documents of a token store: windows of the running text, chunks of one document, pairs of segments.

    `Windows`          windows of the whole store, of one length         (causal language modeling)
    `DocumentChunks`   parts of single documents, of varied length       (masked language modeling, span corruption)
    `SegmentPairs`     two adjacent segments and a random one            (next sentence and sentence order prediction)

Each is a `Source`: the store determines the indices, and the order of a run is drawn elsewhere (`firth.data.shuffle`). Only
windows change between epochs: they start at another offset in each (`Windows.in_epochs`).

Word frequencies of a text for word2vec's subsampling and negative sampling (Mikolov 2013, section 2).

    kept    a word with relative frequency f is kept with probability min(1, sqrt(t / f) + t / f): frequent words are seen less
            often, and their neighbors come closer    (as in word2vec.c; the paper has 1 - sqrt(t / f))
    noise   negative samples are drawn in proportion to count ** 0.75

Both are properties of the text, one number for each id, and are added to every example.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from firth.data.shuffle import ExampleRNG
from firth.data.source import Source
from firth.data.token_store import TokenStore
from firth.tokenizer.vocab import Vocab
from firth.types import Example, UserError


@dataclass(frozen=True, eq=False)
class Windows(Source):
    """Non-overlapping windows of the running text: {"tokens" (length + ahead,)}.

    Args:
        store: The token store.
        length: Number of predicted tokens of a window.
        ahead: Tokens beyond `length`, which are the first of the next window: 1 for next-token prediction, so that each token
            is a label exactly once; 0 if the labels are in the window.
        isolate: Whether windows with several documents have "document_ids" from 0, so that these do not attend to each other.
        tail: Whether to include the last, shorter window, so that every token of a held-out store is scored.
        memory: Maximum number of "memory_tokens", which precede the window in its first document (in the text, if documents
            are not isolated).

    Raises:
        UserError: The store is shorter than one window.
    """

    store: TokenStore
    length: int
    ahead: int = 1
    isolate: bool = True
    tail: bool = False
    memory: int = 0

    def __post_init__(self) -> None:
        if not len(self):
            raise UserError(
                f"{self.store.directory}: {len(self.store.tokens)} tokens are too few for one window of {self.length}: "
                "use a longer text or shorter windows"
            )

    def __len__(self) -> int:
        usable = len(self.store.tokens) - self.ahead
        return -(-usable // self.length) if self.tail else max(usable, 0) // self.length

    def __getitem__(self, index: int) -> Example:
        return self._from(index * self.length)

    def in_epochs(self, seed: int, epochs: np.ndarray, indices: np.ndarray) -> list[Example]:
        """Return windows that start at an offset drawn from (seed, epoch) in each epoch but the first, where it is 0.

        A model that reads the same text repeatedly then sees a token with a new context, at another position, in every epoch. The
        number of windows is the same; the last one may overlap the one before it. Windows with a tail do not move.
        """
        if self.tail:
            return self.many(indices.tolist())
        draws = ExampleRNG(seed, "windows")
        offsets = {e: int(draws.at(e, 0).random() * self.length) if e else 0 for e in set(epochs.tolist())}
        last = len(self.store.tokens) - self.ahead - self.length
        places = zip(epochs.tolist(), indices.tolist(), strict=True)
        return [self._from(min(offsets[epoch] + index * self.length, last)) for epoch, index in places]

    def _from(self, start: int) -> Example:
        """Return the window that starts at the store's token `start`."""
        tokens = self.store.tokens[start : start + self.length + self.ahead].astype(np.int32)
        example = {"tokens": tokens} | ({"memory_tokens": self._before(start)} if self.memory else {})
        if not self.isolate:
            return example
        # Documents that begin inside the window.
        first, last = self.store.offsets.searchsorted((start, start + len(tokens) - 1), "right")
        if first == last:
            return example
        document = np.zeros(len(tokens), np.int32)
        document[self.store.offsets[first:last] - start] = 1
        return example | {"document_ids": document.cumsum(dtype=np.int32)}

    def _before(self, start: int) -> np.ndarray:
        """Return up to `memory` tokens before the token `start`, within its document: (at most memory,)."""
        offsets = self.store.offsets
        document_start = int(offsets[offsets.searchsorted(start, "right") - 1]) if self.isolate else 0
        before: np.ndarray = self.store.tokens[max(document_start, start - self.memory) : start].astype(np.int32)
        return before


@dataclass(frozen=True, eq=False)
class DocumentChunks(Source):
    """Parts of single documents, at most `length` tokens long: {"tokens"}.

    A document that is too long is split into as few parts as possible, of nearly equal length.

    Args:
        store: The token store.
        length: Maximum number of tokens, including special ones.
        special_vocab: Vocabulary whose [CLS] and [SEP] are added; None: add none.
        min_length: Minimum number of tokens of a document; shorter ones are left out.

    Raises:
        UserError: `length` leaves no room for text.
    """

    store: TokenStore
    length: int
    special_vocab: Vocab | None = None
    min_length: int = 1

    def __post_init__(self) -> None:
        if self._room < 1:
            raise UserError(f"chunks of {self.length} tokens have no room for text: raise examples.max_length")

    @property
    def _room(self) -> int:
        return self.length - (2 if self.special_vocab else 0)

    @cached_property
    def _parts(self) -> _DocumentParts:
        return _DocumentParts(self.store, self._room, self.min_length)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Example:
        start, stop = self._parts.bounds(index)
        tokens = self.store.tokens[start:stop]
        return {
            "tokens": self.special_vocab.add_special_tokens(tokens, np.int32)
            if self.special_vocab
            else tokens.astype(np.int32)
        }

    def many(self, indices: Sequence[int]) -> list[Example]:
        starts, stops = self._parts.bounds_of(np.asarray(indices, np.int64))
        num_special = 1 if self.special_vocab else 0
        lengths = stops - starts
        ends = np.cumsum(lengths + 2 * num_special)
        begins = ends - lengths - 2 * num_special
        flat = np.empty(int(ends[-1]), np.int32)
        places = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(int(lengths.sum()))
        inside = np.repeat(begins + num_special - starts, lengths) + places
        flat[inside] = self.store.tokens.take(places)
        if self.special_vocab:
            flat[begins], flat[ends - 1] = self.special_vocab.cls, self.special_vocab.sep
        return [{"tokens": flat[a:b]} for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class SegmentPairs(Source):
    """Two adjacent segments and one from another document: {"first", "second", "other"}.

    They fit into `length` as [CLS] first [SEP] second [SEP]. first and second are a part of a document, split at a random place.
    other starts at a random place of another document and is as long as second, so that the length does not give the label away.
    The draws depend on the index alone.

    Args:
        store: The token store.
        length: Maximum number of tokens of a pair.
        sentence_vocab: Vocabulary that detects sentence boundaries. All three segments are then whole sentences, as in BERT and
            ALBERT, and other ends with the sentence that brings it nearest to second's length; a part with fewer than two
            sentences is split anywhere. None: all are split anywhere; then only adjacent words reveal an order, which
            small models do not find.

    Raises:
        UserError: The length is too small, or the store has too few documents or tokens.
    """

    store: TokenStore
    length: int
    sentence_vocab: Vocab | None = None

    def __post_init__(self) -> None:
        if self.length < 5:
            raise UserError(f"pairs of {self.length} tokens have no room for two segments: raise examples.max_length")
        if len(self.store) < 2:
            raise UserError(
                f"{self.store.directory}: segment pairs need two documents or more, one for a random segment"
            )
        if not len(self):
            raise UserError(f"{self.store.directory}: no document has the two tokens that a pair needs")

    @cached_property
    def _parts(self) -> _DocumentParts:
        return _DocumentParts(self.store, self.length - 3, min_length=2)

    @cached_property
    def _draws(self) -> ExampleRNG:
        return ExampleRNG(0, "pairs")

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Example:
        start, stop = self._parts.bounds(index)
        rng = self._draws.at(0, index)
        bounds = self._bounds(start, stop)
        if len(bounds) > 2:
            start, cut, stop = bounds[0], bounds[1 + int(rng.random() * (len(bounds) - 2))], bounds[-1]
            low, high = self._random_segment(start, stop - cut, rng, room=self.length - 3 - (cut - start))
        else:
            cut = start + 1 + int(rng.random() * (stop - start - 1))
            low, high = self._random_segment(start, stop - cut, rng)
            stop = cut + high - low
        first, second, other = (
            self.store.tokens[a:b].astype(np.int32) for a, b in ((start, cut), (cut, stop), (low, high))
        )
        return {"first": first, "second": second, "other": other}

    def _bounds(self, low: int, high: int) -> list[int]:
        """Return the sentence boundaries and text ends from token low to high of the store, inclusive."""
        if self.sentence_vocab is None:
            return []
        document_start, ends = self._parts.document(low)
        before = max(low - 1, 0)
        begins = (
            np.flatnonzero(self.sentence_vocab.sentences(self.store.tokens[before : high + 1].astype(np.int32)))
            + before
        )
        inside: list[int] = begins[(begins >= low) & (begins > document_start) & (begins < ends)].tolist()
        return [low] * (low == document_start) + inside + [high] * (high == ends)

    def _random_segment(self, start: int, need: int, rng: np.random.Generator, room: int = 0) -> tuple[int, int]:
        """Return the bounds of about `need` tokens of a document other than that at `start`.

        With `room`, the bounds are of whole sentences with at most `room` tokens. Fewer than `need` tokens are returned if ten
        drawn documents are too short.
        """
        best = (0, 0)
        tried = 0
        while tried < 10 or best[1] == best[0]:
            at = int(rng.random() * len(self.store.tokens))
            low, high = self._parts.document(at)
            tried += 1
            if low <= start < high or low == high:
                continue
            at = max(low, min(at, high - need))
            if room:
                begins = self._bounds(max(low, at - self.length), at)
                at = begins[-1] if begins else at
                ends = self._bounds(at + 1, min(high, at + room))
                return at, min(ends, key=lambda end: abs(end - at - need)) if ends else min(high, at + need)
            if min(high, at + need) - at > best[1] - best[0]:
                best = (at, min(high, at + need))
            if best[1] - best[0] == need:
                break
        return best


class _DocumentParts:
    """Every document's text in as few parts of at most `room` tokens as possible, of nearly equal length.

    Costs 8 bytes per document and two binary searches per look-up. Documents of fewer than `min_length` tokens have no part.
    """

    def __init__(self, store: TokenStore, room: int, min_length: int) -> None:
        self._offsets, self._opened = store.offsets, int(store.opened)
        lengths = np.diff(store.offsets) - store.opened - 1
        self._ends = np.cumsum(np.where(lengths < min_length, 0, -(-lengths // room)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def bounds(self, index: int) -> tuple[int, int]:
        """Return the bounds of part `index` in the store's tokens."""
        document = int(self._ends.searchsorted(index, "right"))
        before = self._ends.item(document - 1) if document else 0
        parts = self._ends.item(document) - before
        low, high = self._text(document)
        n, at = high - low, index - before
        return low + n * at // parts, low + n * (at + 1) // parts

    def bounds_of(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `bounds` of many parts: (n,) -> (n,) and (n,)."""
        document = self._ends.searchsorted(indices, "right")
        before = np.append(0, self._ends)[document]
        parts, at = self._ends[document] - before, indices - before
        low = self._offsets[document] + self._opened
        n = self._offsets[document + 1] - 1 - low
        return low + n * at // parts, low + n * (at + 1) // parts

    def document(self, at: int) -> tuple[int, int]:
        """Return the bounds of the text of the document that holds the store's token `at`."""
        return self._text(int(self._offsets.searchsorted(at, "right")) - 1)

    def _text(self, document: int) -> tuple[int, int]:
        return self._offsets.item(document) + self._opened, self._offsets.item(document + 1) - 1


def keep_probabilities(counts: np.ndarray, sample: float) -> np.ndarray:
    """Return the probability to keep each id: (V,) -> (V,).

    Args:
        counts: Count of each id, (V,).
        sample: The threshold t; 0 keeps everything.

    >>> keep_probabilities(np.array([0, 1, 100]), sample=0.01).round(2).tolist()
    [0.0, 1.0, 0.11]
    """
    if not sample:
        return (counts > 0).astype(float)
    ratio = sample * counts.sum() / np.maximum(counts, 1)
    chance: np.ndarray = np.where(counts > 0, np.minimum(np.sqrt(ratio) + ratio, 1.0), 0.0)
    return chance


def noise_distribution(counts: np.ndarray, power: float) -> np.ndarray:
    """Return the cumulative probabilities of the ids as negative samples: counts (V,) -> (V,).

    >>> noise_distribution(np.array([0, 1, 16]), power=0.75).round(2).tolist()
    [0.0, 0.11, 1.0]
    """
    mass = np.where(counts > 0, counts.astype(float) ** power, 0.0).cumsum()
    table: np.ndarray = mass / mass[-1]
    return table


MIN_KEPT_WORDS = 8
"""Number of words: with fewer words kept on average, a step often has no two neighbors."""


@dataclass(frozen=True, eq=False)
class WordWindows(Source):
    """The examples of a text, each with {"kept" (V,), "noise" (V,)}.

    Args:
        text: The examples.
        counts_of: Count of each id, (V,). Control tokens and the unknown word have count 0, so they are neither kept nor drawn.
        sample: The subsampling threshold.
        power: Exponent of the counts for negative sampling.

    Raises:
        UserError: The text has too few known words.
    """

    text: Source
    counts_of: np.ndarray
    sample: float
    power: float

    def __post_init__(self) -> None:
        if not self.counts_of.any():
            raise UserError("the text holds no word that the tokenizer knows: train the tokenizer on it")
        chances = keep_probabilities(self.counts_of, self.sample)
        if (expected := float(chances @ self.counts_of)) < MIN_KEPT_WORDS:
            known = int(self.counts_of.sum())
            rare = known < MIN_KEPT_WORDS
            cause = (
                "" if rare else f", of which examples.subsampling_threshold={self.sample:g} keeps about {expected:.2g}"
            )
            advice = "" if rare else ", or set examples.subsampling_threshold=0, which keeps every word"
            raise UserError(
                f"the text has too few words for word2vec: {known:,} that the tokenizer knows{cause}; word2vec needs "
                f"{MIN_KEPT_WORDS} or more to find neighbors in, so train on a longer text{advice}"
            )
        object.__setattr__(
            self, "_word_stats", {"kept": chances, "noise": noise_distribution(self.counts_of, self.power)}
        )

    @staticmethod
    def count(tokens: np.ndarray, vocab: Vocab) -> np.ndarray:
        """Return the count of each id in a text; control tokens count 0."""
        return np.where(vocab.special, 0, np.bincount(tokens, minlength=vocab.size))

    def __len__(self) -> int:
        return len(self.text)

    def __getitem__(self, index: int) -> Example:
        word_stats: Example = self.__dict__["_word_stats"]
        return self.text[index] | word_stats
