"""From a store's documents to examples: windows of the running text, pieces of one document, neighbouring pairs.

    `Windows`    tokens of the whole store, in rows of one length     (causal language modelling)
    `Pieces`     parts of single documents, of varied length          (masked language modelling, span corruption)
    `Pairs`      two neighbours, and a stranger                       (next sentence and sentence order prediction)

Each is a `Source`: indices are fixed by the store, and the order of a run is drawn elsewhere (`firth.data.shuffle`). Only
windows move: a run that reads its text several times cuts them at another offset in each epoch (`Windows.in_epochs`).
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

    ahead: tokens shown beyond `length`, which are the first of the next window: 1 where the next token is asked, so
    that each token is asked exactly once; 0 where the answers are in the window. isolate: in a window with several
    documents, "document_ids" numbers them from 0 and they do not see each other. tail: the last, shorter window too, so
    that every token of a held-out store is scored. memory: "memory_tokens" too, at most so many tokens that stand before
    the window in the document that it begins in (in the text, where documents are not kept apart).
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
                "use more text or shorter windows"
            )

    def __len__(self) -> int:
        usable = len(self.store.tokens) - self.ahead
        return -(-usable // self.length) if self.tail else max(usable, 0) // self.length

    def __getitem__(self, index: int) -> Example:
        return self._from(index * self.length)

    def in_epochs(self, seed: int, epochs: np.ndarray, indices: np.ndarray) -> list[Example]:
        """Return windows that begin at an offset drawn from (seed, epoch) in each epoch but the first, where it is 0.

        A model that reads the same text many times then sees a token after a new stretch of text, and at another position,
        in every epoch. There are as many windows in each; the last one may overlap the one before it. Windows with a tail
        do not move.
        """
        if self.tail:
            return self.many(indices.tolist())
        draws = ExampleRNG(seed, "windows")
        offsets = {e: int(draws.at(e, 0).random() * self.length) if e else 0 for e in set(epochs.tolist())}
        last = len(self.store.tokens) - self.ahead - self.length
        places = zip(epochs.tolist(), indices.tolist(), strict=True)
        return [self._from(min(offsets[epoch] + index * self.length, last)) for epoch, index in places]

    def _from(self, start: int) -> Example:
        """The window from the store's token `start` on."""
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
        """What stands before the token `start`, as far as memory and its document reach: (at most memory,)."""
        offsets = self.store.offsets
        opens = int(offsets[offsets.searchsorted(start, "right") - 1]) if self.isolate else 0
        before: np.ndarray = self.store.tokens[max(opens, start - self.memory) : start].astype(np.int32)
        return before


@dataclass(frozen=True, eq=False)
class DocumentChunks(Source):
    """Parts of single documents, at most `length` tokens long: {"tokens"}.

    A document that is too long is cut into as few parts as it takes, of nearly equal length. frame: the vocabulary
    whose [CLS] and [SEP] go around each (a text as an encoder reads it); None leaves the bare text. shortest: documents
    of fewer tokens are left out.
    """

    store: TokenStore
    length: int
    frame: Vocab | None = None
    shortest: int = 1

    def __post_init__(self) -> None:
        if self._room < 1:
            raise UserError(f"pieces of {self.length} tokens have no room for text: make them longer")

    @property
    def _room(self) -> int:
        return self.length - (2 if self.frame else 0)

    @cached_property
    def _parts(self) -> _Parts:
        return _Parts(self.store, self._room, self.shortest)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, index: int) -> Example:
        start, stop = self._parts.bounds(index)
        tokens = self.store.tokens[start:stop]
        return {"tokens": self.frame.add_special_tokens(tokens, np.int32) if self.frame else tokens.astype(np.int32)}

    def many(self, indices: Sequence[int]) -> list[Example]:
        starts, stops = self._parts.bounds_of(np.asarray(indices, np.int64))
        around = 1 if self.frame else 0
        lengths = stops - starts
        ends = np.cumsum(lengths + 2 * around)
        begins = ends - lengths - 2 * around
        flat = np.empty(int(ends[-1]), np.int32)
        places = np.repeat(starts - np.cumsum(lengths) + lengths, lengths) + np.arange(int(lengths.sum()))
        inside = np.repeat(begins + around - starts, lengths) + places
        flat[inside] = self.store.tokens.take(places)
        if self.frame:
            flat[begins], flat[ends - 1] = self.frame.cls, self.frame.sep
        return [{"tokens": flat[a:b]} for a, b in zip(begins.tolist(), ends.tolist(), strict=True)]


@dataclass(frozen=True, eq=False)
class SegmentPairs(Source):
    """Two neighbouring segments and one from another document: {"first", "second", "other"}, which fit into `length`
    as [CLS] first [SEP] second [SEP].

    first and second are a part of a document, cut at a random place; other begins at a random place of another document
    and is as long as second, so that lengths do not give the answer away. The draws are fixed by the index.

    sentences: the vocabulary that knows where a sentence begins. All three are then whole sentences, as BERT's and ALBERT's
    are, and the stranger ends with the sentence that brings it nearest to second's length; a part with fewer than two is cut
    anywhere. None: all are cut anywhere; then only how two words fit tells an order, which small models do not find.
    """

    store: TokenStore
    length: int
    sentences: Vocab | None = None

    def __post_init__(self) -> None:
        if self.length < 5:
            raise UserError(f"pairs of {self.length} tokens have no room for two segments: make them longer")
        if len(self.store) < 2:
            raise UserError(f"{self.store.directory}: pairs need two documents or more, one to take a stranger from")
        if not len(self):
            raise UserError(f"{self.store.directory}: no document has two tokens or more to make a pair from")

    @cached_property
    def _parts(self) -> _Parts:
        return _Parts(self.store, self.length - 3, shortest=2)

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
            low, high = self._stranger(start, stop - cut, rng, room=self.length - 3 - (cut - start))
        else:
            cut = start + 1 + int(rng.random() * (stop - start - 1))
            low, high = self._stranger(start, stop - cut, rng)
            stop = cut + high - low
        first, second, other = (
            self.store.tokens[a:b].astype(np.int32) for a, b in ((start, cut), (cut, stop), (low, high))
        )
        return {"first": first, "second": second, "other": other}

    def _bounds(self, low: int, high: int) -> list[int]:
        """Where between the store's tokens low and high, both among them, a sentence begins or the text ends."""
        if self.sentences is None:
            return []
        opens, ends = self._parts.document(low)
        before = max(low - 1, 0)
        begins = (
            np.flatnonzero(self.sentences.sentences(self.store.tokens[before : high + 1].astype(np.int32))) + before
        )
        inside: list[int] = begins[(begins >= low) & (begins > opens) & (begins < ends)].tolist()
        return [low] * (low == opens) + inside + [high] * (high == ends)

    def _stranger(self, start: int, need: int, rng: np.random.Generator, room: int = 0) -> tuple[int, int]:
        """Bounds of `need` tokens of a document other than the one at `start`; fewer if ten had not enough. room: of whole
        sentences, as near to `need` tokens as they come, and at most so many."""
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


class _Parts:
    """Every document's text in as few parts of at most `room` tokens as it takes, of nearly equal length.

    Costs 8 bytes a document and two binary searches a look-up. Documents of fewer than `shortest` tokens have none.
    """

    def __init__(self, store: TokenStore, room: int, shortest: int) -> None:
        self._offsets, self._opened = store.offsets, int(store.opened)
        lengths = np.diff(store.offsets) - store.opened - 1
        self._ends = np.cumsum(np.where(lengths < shortest, 0, -(-lengths // room)))

    def __len__(self) -> int:
        return int(self._ends[-1])

    def bounds(self, index: int) -> tuple[int, int]:
        """Where part `index` is in the store's tokens."""
        document = int(self._ends.searchsorted(index, "right"))
        before = self._ends.item(document - 1) if document else 0
        parts = self._ends.item(document) - before
        low, high = self._text(document)
        n, at = high - low, index - before
        return low + n * at // parts, low + n * (at + 1) // parts

    def bounds_of(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """`bounds` of many parts: (n,) -> (n,) and (n,)."""
        document = self._ends.searchsorted(indices, "right")
        before = np.append(0, self._ends)[document]
        parts, at = self._ends[document] - before, indices - before
        low = self._offsets[document] + self._opened
        n = self._offsets[document + 1] - 1 - low
        return low + n * at // parts, low + n * (at + 1) // parts

    def document(self, at: int) -> tuple[int, int]:
        """The bounds of the text of the document that holds the store's token `at`."""
        return self._text(int(self._offsets.searchsorted(at, "right")) - 1)

    def _text(self, document: int) -> tuple[int, int]:
        return self._offsets.item(document) + self._opened, self._offsets.item(document + 1) - 1
