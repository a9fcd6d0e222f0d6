"""Examples from the documents of a token store: windows of the running text, chunks of one document, pairs of segments.

    `WindowsConfig`        windows of the whole store, of one length         (causal language modeling)
    `ChunksConfig`         parts of single documents, of varied length       (masked language modeling, span corruption)
    `SegmentPairsConfig`   two adjacent segments and a random one            (next sentence and sentence order prediction)
    `WordWindowsConfig`    windows with the frequencies of the words         (word2vec)

Each kind is one frozen dataclass: its settings, and which tokens an example has. `Documents` is the same for all kinds: a sequence of
examples, which are read from the store. The store determines the indices, and the order of a run is drawn elsewhere
(`firth.data.shuffle`). Two kinds change between epochs: windows start at another offset in each, and pairs are drawn anew.

    source = Documents(ChunksConfig(max_length=64), store, tokenizer.vocab)
    source[0]                                                    # {"tokens": array([2, 17, 9, ..., 3])}

Word frequencies of a text are for word2vec's subsampling and negative sampling (Mikolov 2013, section 2).

    kept    a word with relative frequency f is kept with probability min(1, sqrt(t / f) + t / f): frequent words are seen less
            often, and their neighbors come closer    (as in word2vec.c; the paper has 1 - sqrt(t / f))
    noise   negative samples are drawn in proportion to count ** 0.75

Both are properties of the text, one number for each id, and are added to every example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from firth.data.examples import BuildContext, DatasetSplits, ExamplesConfig
from firth.data.shuffle import ExampleRNG
from firth.data.source import Source
from firth.data.token_store import TokenStore
from firth.fields import NonNegativeFloat, TokenCount
from firth.tokenizer.vocab import Vocab
from firth.types import Example, UserError

if TYPE_CHECKING:
    from firth.objectives.objective import Objective


@dataclass(frozen=True)
class DocumentsConfig(ExamplesConfig):
    """Base class of the kinds of examples that are made of the documents of a token store.

    Attributes:
        min_documents: The fewest documents that examples can be made of.
    """

    reads_documents: ClassVar[bool] = True
    min_documents: ClassVar[int] = 1

    def index(self, documents: Documents) -> Any:
        """Return what is computed once of a store; `Documents.index` has it."""
        return None

    def size(self, documents: Documents) -> int:
        """Return the number of examples of a store."""
        raise NotImplementedError(type(self).__name__)

    def example(self, documents: Documents, index: int) -> Example:
        """Return one example of a store: a pure function of the index."""
        raise NotImplementedError(type(self).__name__)

    def many(self, documents: Documents, indices: Sequence[int]) -> list[Example]:
        """Return several examples, together where that is faster."""
        return [self.example(documents, i) for i in indices]

    def in_epochs(self, documents: Documents, seed: int, epochs: np.ndarray, indices: np.ndarray) -> list[Example]:
        """Return the examples that a run with this seed reads (`Source.in_epochs`)."""
        return documents.many(indices.tolist())

    def statistics(self, store: TokenStore, vocab: Vocab) -> Example:
        """Return the statistics of the training text that are fields of every example."""
        return {}

    def check(self, documents: Documents) -> None:
        """Raise a UserError for a store that no example can be made of."""

    def check_training(self, train: TokenStore, split_by: str) -> None:
        """Raise a UserError for training documents that are not suitable, with the setting that may help."""

    def bytes_per_target(self, held_out: TokenStore, objective: Objective) -> float:
        """Return the UTF-8 bytes of held-out text per label, where every token is a label; else 0."""
        return 0.0

    def build(self, data: BuildContext, objective: Objective) -> DatasetSplits:
        train, valid = data.stores()
        self.check_training(train, data.config.split_by)
        memory, vocab = data.memory_length, data.tokenizer.vocab
        source = Documents(self, train, vocab, memory=memory)
        if valid is None or len(valid) < self.min_documents:
            return DatasetSplits(source, None, read_stats=source.read_stats)
        held = Documents(self, valid, vocab, memory=memory, held_out=True, statistics=source.statistics)
        return DatasetSplits(source, held, self.bytes_per_target(valid, objective), source.read_stats)


class Documents(Source):
    """The examples of the documents of a token store.

    Args:
        kind: Divides the store into examples.
        store: The token store.
        vocab: The vocabulary of its tokens.
        memory: Maximum number of tokens before an example that a model with memory reads.
        held_out: Whether the text is scored: then every token is in an example.
        statistics: Statistics of the training text; None computes those of this text.

    Raises:
        UserError: No example can be made of the store.
    """

    def __init__(
        self,
        kind: DocumentsConfig,
        store: TokenStore,
        vocab: Vocab,
        *,
        memory: int = 0,
        held_out: bool = False,
        statistics: Example | None = None,
    ) -> None:
        self.kind, self.store, self.vocab, self.memory, self.held_out = kind, store, vocab, memory, held_out
        self.index: Any = kind.index(self)
        kind.check(self)
        self.statistics = kind.statistics(store, vocab) if statistics is None else statistics

    @property
    def read_stats(self) -> Mapping[str, int]:
        """Counts of the reader when the store was built."""
        found: Mapping[str, int] = self.store.manifest["counts"]
        return found

    def __len__(self) -> int:
        return self.kind.size(self)

    def __getitem__(self, index: int) -> Example:
        return self.kind.example(self, index)

    def many(self, indices: Sequence[int]) -> list[Example]:
        return self.kind.many(self, indices)

    def in_epochs(self, seed: int, epochs: np.ndarray, indices: np.ndarray) -> list[Example]:
        return self.kind.in_epochs(self, seed, epochs, indices)


@dataclass(frozen=True)
class WindowsConfig(DocumentsConfig):
    """Windows of `max_length` tokens over the concatenated documents: {"tokens" (max_length + ahead,)}.

    Windows with several documents have "document_ids" from 0, so that these do not attend to each other. A held-out store has a last,
    shorter window. "memory_tokens" precede the window in its first document.

    Args:
        max_length: Tokens of a window.

    Attributes:
        ahead: Tokens beyond `max_length`, which are the first of the next window: 1 for next-token prediction, so that each token
            is a label exactly once; 0 if the labels are in the window.
        isolate: Whether documents do not attend to each other.
    """

    gives_memory: ClassVar[bool] = True
    ahead: ClassVar[int] = 1
    isolate: ClassVar[bool] = True

    max_length: TokenCount = 256

    def check(self, documents: Documents) -> None:
        if not len(documents):
            store = documents.store
            raise UserError(
                f"{store.directory}: {len(store.tokens)} tokens are too few for one window of {self.max_length}: "
                "use a longer text or shorter windows"
            )

    def bytes_per_target(self, held_out: TokenStore, objective: Objective) -> float:
        # A causal objective with one label field predicts every held-out token once, except the first of each document.
        if objective.attention != "causal" or len(objective.labels) != 1:
            return 0.0
        return held_out.num_bytes / max(1, len(held_out.tokens) - len(held_out))

    def size(self, documents: Documents) -> int:
        usable = len(documents.store.tokens) - self.ahead
        return -(-usable // self.max_length) if self._has_tail(documents) else max(usable, 0) // self.max_length

    def _has_tail(self, documents: Documents) -> bool:
        """Return whether there is a last, shorter window."""
        return documents.held_out

    def example(self, documents: Documents, index: int) -> Example:
        return self._from(documents, index * self.max_length)

    def in_epochs(self, documents: Documents, seed: int, epochs: np.ndarray, indices: np.ndarray) -> list[Example]:
        """Return windows that start at an offset drawn from (seed, epoch) in each epoch but the first, where it is 0.

        A model that reads the same text repeatedly then sees a token with a new context, at another position, in every epoch. The
        number of windows is the same; the last one may overlap the one before it. Windows with a tail do not move.
        """
        if self._has_tail(documents):
            return documents.many(indices.tolist())
        draws = ExampleRNG(seed, "windows")
        offsets = {e: int(draws.at(e, 0).random() * self.max_length) if e else 0 for e in set(epochs.tolist())}
        last = len(documents.store.tokens) - self.ahead - self.max_length
        places = zip(epochs.tolist(), indices.tolist(), strict=True)
        return [self._from(documents, min(offsets[epoch] + index * self.max_length, last)) for epoch, index in places]

    def _from(self, documents: Documents, start: int) -> Example:
        """Return the window that starts at the store's token `start`."""
        store = documents.store
        tokens = store.tokens[start : start + self.max_length + self.ahead].astype(np.int32)
        example: Example = {"tokens": tokens}
        if documents.memory:
            example["memory_tokens"] = self._before(documents, start)
        if not self.isolate:
            return example
        # Documents that begin inside the window.
        first, last = (store.offsets.document_at(token) for token in (start, start + len(tokens) - 1))
        if first == last:
            return example
        document = np.zeros(len(tokens), np.int32)
        document[store.offsets[first + 1 : last + 1] - start] = 1
        return example | {"document_ids": document.cumsum(dtype=np.int32)}

    def _before(self, documents: Documents, start: int) -> np.ndarray:
        """Return up to `memory` tokens before the token `start`, within its document: (at most memory,)."""
        store, offsets = documents.store, documents.store.offsets
        document_start = int(offsets[offsets.document_at(start)]) if self.isolate else 0
        before: np.ndarray = store.tokens[max(document_start, start - documents.memory) : start].astype(np.int32)
        return before


@dataclass(frozen=True)
class ChunksConfig(DocumentsConfig):
    """Chunks of single documents: {"tokens"}.

    A document that is too long is split into as few chunks as possible, of nearly equal length.

    Args:
        max_length: The most tokens of a chunk, including special ones.
        add_special_tokens: Whether each chunk is enclosed in [CLS] and [SEP].
        min_length: Documents with fewer tokens are dropped.
    """

    max_length: TokenCount = 128
    add_special_tokens: bool = True
    min_length: TokenCount = 1

    def index(self, documents: Documents) -> _DocumentParts:
        room = self.max_length - (2 if self.add_special_tokens else 0)
        if room < 1:
            raise UserError(f"chunks of {self.max_length} tokens have no room for text: raise examples.max_length")
        return _DocumentParts(documents.store, room, self.min_length)

    def size(self, documents: Documents) -> int:
        return len(documents.index)

    def example(self, documents: Documents, index: int) -> Example:
        start, stop = documents.index.bounds(index)
        tokens = documents.store.tokens[start:stop]
        vocab = documents.vocab
        return {
            "tokens": vocab.add_special_tokens(tokens, np.int32) if self.add_special_tokens else tokens.astype(np.int32)
        }

    def many(self, documents: Documents, indices: Sequence[int]) -> list[Example]:
        starts, stops = documents.index.bounds_of(np.asarray(indices, np.int64))
        num_special = 1 if self.add_special_tokens else 0
        lengths = stops - starts
        ends = np.cumsum(lengths + 2 * num_special)
        begins = ends - lengths - 2 * num_special
        flat = np.empty(int(ends[-1]), np.int32)
        places = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(int(lengths.sum()))
        inside = np.repeat(begins + num_special - starts, lengths) + places
        flat[inside] = documents.store.tokens.take(places)
        if self.add_special_tokens:
            flat[begins], flat[ends - 1] = documents.vocab.cls, documents.vocab.sep
        return [{"tokens": flat[a:b]} for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]


@dataclass(frozen=True)
class SegmentPairsConfig(DocumentsConfig):
    """Two adjacent segments and one from another document: {"first", "second", "other"}.

    They fit into `max_length` as [CLS] first [SEP] second [SEP]. first and second are a part of a document, split at a random place.
    other is the second segment of such a pair of another document, about as long as second: by itself neither gives the label away.
    The draws depend on the index, and in a run on the epoch too: BERT's data holds ten such draws of the text.

    Args:
        max_length: The most tokens of a pair.
        whole_sentences: Whether all three segments consist of whole sentences, as in BERT and ALBERT; a part with fewer than two
            sentences is split anywhere. Else all are split anywhere, and other starts at a random place of another document; then only
            adjacent words reveal an order, which small models do not find.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"first", "second", "other"})
    min_documents: ClassVar[int] = 2

    max_length: TokenCount = 128
    whole_sentences: bool = True

    @property
    def text_units(self) -> frozenset[str]:
        return frozenset({"pairs"} if self.whole_sentences else ())

    def check_training(self, train: TokenStore, split_by: str) -> None:
        if len(train) < 2:
            raise UserError(
                "pairs of segments need two documents or more, and there is one to train on: set data.split_by=blank (or line) if "
                f"blank lines (or lines) divide the documents of a text, or give more files (data.split_by is {split_by})"
            )

    def index(self, documents: Documents) -> _DocumentParts:
        store = documents.store
        if self.max_length < 5:
            raise UserError(
                f"pairs of {self.max_length} tokens have no room for two segments: raise examples.max_length"
            )
        parts = _DocumentParts(store, self.max_length - 3, min_length=2)
        if parts.num_texts < 2:
            raise UserError(
                f"{store.directory}: segment pairs need two documents or more with text, one for a random segment"
            )
        return parts

    def check(self, documents: Documents) -> None:
        if not len(documents):
            raise UserError(f"{documents.store.directory}: no document has the two tokens that a pair needs")

    def size(self, documents: Documents) -> int:
        return len(documents.index)

    def example(self, documents: Documents, index: int) -> Example:
        return self._drawn(documents, index, epoch=0)

    def in_epochs(self, documents: Documents, seed: int, epochs: np.ndarray, indices: np.ndarray) -> list[Example]:
        """Return pairs that are split, and whose random segment is drawn, anew in each epoch but the first."""
        places = zip(epochs.tolist(), indices.tolist(), strict=True)
        return [self._drawn(documents, index, epoch) for epoch, index in places]

    def _drawn(self, documents: Documents, index: int, epoch: int) -> Example:
        """Return the pair of a part of the text as it is drawn in an epoch."""
        start, stop = documents.index.bounds(index)
        rng = _PAIR_DRAWS.at(epoch, index)
        bounds = self._bounds(documents, start, stop)
        if len(bounds) > 2:
            start, cut, stop = bounds[0], _cut(bounds, rng), bounds[-1]
            room = self.max_length - 3 - (cut - start)
            low, high = self._second_of_another(documents, start, stop - cut, room, rng)
        else:
            cut = start + 1 + int(rng.random() * (stop - start - 1))
            low, high = self._random_segment(documents, start, stop - cut, rng)
            stop = cut + high - low
        first, second, other = (
            documents.store.tokens[a:b].astype(np.int32) for a, b in ((start, cut), (cut, stop), (low, high))
        )
        return {"first": first, "second": second, "other": other}

    def splits_sentences(self, documents: Documents, index: int) -> bool:
        """Return whether a pair is split between two sentences, and not anywhere because its part of the text has fewer than two."""
        return len(self._bounds(documents, *documents.index.bounds(index))) > 2

    def _bounds(self, documents: Documents, low: int, high: int) -> list[int]:
        """Return the sentence boundaries and text ends from token low to high of the store, inclusive."""
        if not self.whole_sentences:
            return []
        document_start, ends = documents.index.document(low)
        before = max(low - 1, 0)
        begins = (
            np.flatnonzero(documents.vocab.sentences(documents.store.tokens[before : high + 1].astype(np.int32)))
            + before
        )
        inside: list[int] = begins[(begins >= low) & (begins > document_start) & (begins < ends)].tolist()
        return [low] * (low == document_start) + inside + [high] * (high == ends)

    def _second_of_another(
        self, documents: Documents, start: int, need: int, room: int, rng: np.random.Generator
    ) -> tuple[int, int]:
        """Return the bounds of the second segment of another document's pair, of about `need` and at most `room` tokens.

        So a segment by itself does not tell whether it follows. The first of SECOND_DRAWS that is within an eighth of `need` is taken, or
        the nearest; if no other document has one, a random segment that is cut anywhere.
        """
        low, high = documents.index.document(start)
        best = (0, 0)
        for _ in range(SECOND_DRAWS):
            part = documents.index.bounds(int(rng.random() * len(documents.index)))
            if low <= part[0] < high:
                continue
            bounds = self._bounds(documents, *part)
            if len(bounds) < 3:
                continue
            found = (_cut(bounds, rng), bounds[-1])
            size = found[1] - found[0]
            if size <= room and abs(size - need) < abs(best[1] - best[0] - need):
                best = found
            if best[1] > best[0] and abs(best[1] - best[0] - need) <= need // 8:
                break
        return best if best[1] > best[0] else self._random_segment(documents, start, need, rng)

    def _random_segment(self, documents: Documents, start: int, need: int, rng: np.random.Generator) -> tuple[int, int]:
        """Return the bounds of `need` tokens of a document other than that at `start`, or of fewer if ten drawn ones are too short."""
        best = (0, 0)
        tried, total = 0, len(documents.store.tokens)
        while tried < 10 or best[1] == best[0]:
            at = int(rng.random() * total)
            if tried >= 10:  # the document at `start` is most of the text: draw from the rest
                own, end = documents.index.document(start)
                at = int(rng.random() * (total - (end - own)))
                at += (end - own) * (at >= own)
            low, high = documents.index.document(at)
            tried += 1
            if low <= start < high or low == high:
                continue
            at = max(low, min(at, high - need))
            if min(high, at + need) - at > best[1] - best[0]:
                best = (at, min(high, at + need))
            if best[1] - best[0] == need:
                break
        return best


def _cut(bounds: Sequence[int], rng: np.random.Generator) -> int:
    """Return one of the sentence boundaries within a part, between two segments."""
    return bounds[1 + int(rng.random() * (len(bounds) - 2))]


SECOND_DRAWS = 50
"""Most draws of a segment of about the length of another."""

_PAIR_DRAWS = ExampleRNG(0, "pairs")


DOCUMENTS_PER_MARK = 4096
"""Documents whose parts are counted together: one number in memory for so many."""


class _DocumentParts:
    """Every document's text in as few parts of at most `room` tokens as possible, of nearly equal length.

    Documents of fewer than `min_length` tokens have no part. The lengths of all documents are read once, and one number is kept for
    DOCUMENTS_PER_MARK documents; a look-up reads the lengths of so many.
    """

    def __init__(self, store: TokenStore, room: int, min_length: int) -> None:
        self._store, self._room, self._min_length = store, room, min_length
        counts = [np.zeros(1, np.int64)]
        self.num_texts = 0
        """Documents that have a token besides those that open and end them."""
        for lengths in store.document_lengths():
            self.num_texts += int(np.count_nonzero(lengths > 0))
            counts.append(np.add.reduceat(self._counts(lengths), np.arange(0, len(lengths), DOCUMENTS_PER_MARK)))
        self._marks = np.cumsum(np.concatenate(counts))

    def _counts(self, lengths: np.ndarray) -> np.ndarray:
        """Return the number of parts of documents by the tokens of their text."""
        return np.where(lengths < self._min_length, 0, -(-lengths // self._room))

    def __len__(self) -> int:
        return int(self._marks[-1])

    def bounds(self, index: int) -> tuple[int, int]:
        """Return the bounds of part `index` in the store's tokens."""
        start, stop = self.bounds_of(np.array([index]))
        return int(start[0]), int(stop[0])

    def bounds_of(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return `bounds` of many parts: (n,) -> (n,) and (n,)."""
        marks = self._marks.searchsorted(indices, "right") - 1
        starts, stops = np.empty_like(indices), np.empty_like(indices)
        for mark in np.unique(marks).tolist():
            selected = marks == mark
            first = mark * DOCUMENTS_PER_MARK
            offsets = self._store.offsets[first : first + DOCUMENTS_PER_MARK + 1]
            counts = self._counts(np.diff(offsets) - self._store.opened - 1)
            ends = counts.cumsum()
            within = indices[selected] - self._marks[mark]
            document = ends.searchsorted(within, "right")
            parts = counts[document]
            at = within - ends[document] + parts
            low = offsets[document] + self._store.opened
            n = offsets[document + 1] - 1 - low
            starts[selected], stops[selected] = low + n * at // parts, low + n * (at + 1) // parts
        return starts, stops

    def document(self, at: int) -> tuple[int, int]:
        """Return the bounds of the text of the document that holds the store's token `at`."""
        document = self._store.offsets.document_at(at)
        low, high = self._store.offsets[document : document + 2].tolist()
        return low + self._store.opened, high - 1


@dataclass(frozen=True)
class WordWindowsConfig(WindowsConfig):
    """Windows with word2vec's subsampling and noise probabilities: {"tokens", "kept" (V,), "noise" (V,)}.

    Args:
        max_length: Tokens of a window.
        subsampling_threshold: Words that are more frequent than this are dropped at random.
        noise_exponent: Power of the word frequencies in the noise distribution.
    """

    base_fields: ClassVar[frozenset[str]] = frozenset({"tokens", "kept", "noise"})
    gives_memory: ClassVar[bool] = False
    ahead: ClassVar[int] = 0

    max_length: TokenCount = 512
    subsampling_threshold: NonNegativeFloat = 1e-3
    noise_exponent: NonNegativeFloat = 0.75

    def check_training(self, train: TokenStore, split_by: str) -> None:
        if max(int(lengths.max()) for lengths in train.document_lengths()) < 2:
            raise UserError(
                "every document is a single word, so no word has a neighbor: give longer documents, or set "
                f"data.split_by=file (it is {split_by})"
            )

    def bytes_per_target(self, held_out: TokenStore, objective: Objective) -> float:
        return 0.0

    def _has_tail(self, documents: Documents) -> bool:
        return True

    def statistics(self, store: TokenStore, vocab: Vocab) -> Example:
        counts = word_counts(store.count_tokens(vocab.size), vocab)
        return word_statistics(counts, self.subsampling_threshold, self.noise_exponent)

    def example(self, documents: Documents, index: int) -> Example:
        return super().example(documents, index) | documents.statistics


def word_counts(counts: np.ndarray, vocab: Vocab) -> np.ndarray:
    """Return the counts of ids (V,) with 0 for control tokens and the unknown word, so that they are neither kept nor drawn."""
    return np.where(vocab.special, 0, counts)


def word_statistics(counts: np.ndarray, threshold: float, exponent: float) -> Example:
    """Return {"kept", "noise"} of a text.

    Args:
        counts: Count of each id, (V,).
        threshold: The subsampling threshold.
        exponent: Exponent of the counts for negative sampling.

    Raises:
        UserError: The text has too few known words.
    """
    if not counts.any():
        raise UserError("the text holds no word that the tokenizer knows: train the tokenizer on it")
    chances = keep_probabilities(counts, threshold)
    if (expected := float(chances @ counts)) < MIN_KEPT_WORDS:
        known = int(counts.sum())
        rare = known < MIN_KEPT_WORDS
        cause = "" if rare else f", of which examples.subsampling_threshold={threshold:g} keeps about {expected:.2g}"
        advice = "" if rare else ", or set examples.subsampling_threshold=0, which keeps every word"
        raise UserError(
            f"the text has too few words for word2vec: {known:,} that the tokenizer knows{cause}; word2vec needs "
            f"{MIN_KEPT_WORDS} or more to find neighbors in, so train on a longer text{advice}"
        )
    return {"kept": chances, "noise": noise_distribution(counts, exponent)}


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
