"""Find the test items whose words are in the training text of a run (Brown 2020, GPT-3, appendix C).

Words are lower case, without punctuation. An item is contaminated if 13 consecutive words of one of its texts are consecutive
words of one training document. If no text has 13 words, the longest one of at least 8 is looked up whole; an item without
such a text is too short to tell. Each field of a record is a text of its own, so that no template is looked up, and no text
that a task repeats in all its items (`own_fields`).

The token store is decoded once, in pieces, whatever the number of items. Words that no item has become 0, and only
rows of words that items have are looked up, exactly and not by hash alone. Items are encoded and decoded with the
tokenizer of the run too, because some tokenizers change the text.

>>> words("The model's 2nd run -- it FAILED.")
['the', 'models', '2nd', 'run', 'it', 'failed']
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Any, Protocol

import numpy as np

from firth.data.token_store import TokenStore
from firth.tokenizer.tokenizer import Tokenizer

NGRAM_WORDS = 13
"""Words of an n-gram."""
MIN_WORDS = 8
"""Fewest words of a text that is looked up whole, because no text of its item has an n-gram."""
PIECE_TOKENS = 1 << 14
"""Tokens of a long document that are decoded as one text."""
OVERLAP_TOKENS = 128
"""Tokens that a piece shares with the one before it, so that an n-gram is whole in one of them."""
BATCH_TOKENS = 1 << 19
"""Tokens that are decoded at once: about 2 MB of text."""

_PUNCTUATION = re.compile(r"[^\w\s]|_")
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


class Record(Protocol):
    """An item of a task: `firth.evaluate.prompting.prompts.Item`."""

    @property
    def fields(self) -> Mapping[str, Any]:
        """Fields of its record."""

    @property
    def own_fields(self) -> tuple[str, ...]:
        """Fields that are looked up; all if empty."""


@dataclass(frozen=True)
class TrainingText:
    """The training text of a run.

    Args:
        name: The run.
        stores: Its token stores; a mixture has several.
        tokenizer: The tokenizer of the stores.
    """

    name: str
    stores: Sequence[TokenStore]
    tokenizer: Tokenizer


@dataclass(frozen=True)
class Contamination:
    """Test items of a task that are in training text.

    Args:
        runs: Names of the runs whose text was searched.
        items: For each item whether it was found; None if it is too short to tell.
    """

    runs: tuple[str, ...]
    items: tuple[bool | None, ...]

    @property
    def checked(self) -> int:
        """Items that are long enough."""
        return sum(one is not None for one in self.items)

    @property
    def found(self) -> int:
        """Items that were found."""
        return sum(one is True for one in self.items)

    @property
    def share(self) -> float:
        """Found items as a share of those that were checked."""
        return self.found / max(1, self.checked)


def words(text: str) -> list[str]:
    """Return the words of a text: lower case, punctuation removed, split at blanks."""
    return _PUNCTUATION.sub("", text.lower()).split()


def find_contaminated(tasks: Sequence[Sequence[Record]], texts: Sequence[TrainingText]) -> list[Contamination]:
    """Look up the items of tasks in training text.

    Args:
        tasks: The items of each task.
        texts: The training text of each run; it is read once for all tasks.
    """
    items = [item for task in tasks for item in task]
    found: list[bool | None] = [None] * len(items)
    for text in texts:
        for i, one in enumerate(_search(items, text)):
            found[i] = one if found[i] is None else found[i] or bool(one)
    runs, results, start = tuple(text.name for text in texts), [], 0
    for task in tasks:
        results.append(Contamination(runs, tuple(found[start : start + len(task)])))
        start += len(task)
    return results


def _search(items: Sequence[Record], text: TrainingText) -> list[bool | None]:
    """Return for each item whether it is in the training text of one run; None if it is too short."""
    vocabulary: dict[str, int] = {}
    wanted: dict[int, dict[tuple[int, ...], list[int]]] = {}  # words -> n-gram -> items
    found: list[bool | None] = [None] * len(items)
    for i, item in enumerate(items):
        for gram in _item_grams([words(_read_back(one, text.tokenizer)) for one in _item_texts(item)]):
            found[i] = False
            ids = tuple(vocabulary.setdefault(word, len(vocabulary) + 1) for word in gram)
            wanted.setdefault(len(ids), {}).setdefault(ids, []).append(i)
    tables = {n: _hash_table(list(grams)) for n, grams in wanted.items()}
    for block in _word_ids(text, vocabulary) if wanted else ():
        for n, table in tables.items():
            for start in _candidates(block, n, table):
                for i in wanted[n].get(tuple(block[start : start + n].tolist()), ()):
                    found[i] = True
    return found


def _item_texts(item: Record) -> Iterator[str]:
    """Yield the texts of an item that are looked up."""
    return _texts([item.fields[name] for name in item.own_fields] if item.own_fields else item.fields)


def _texts(value: Any) -> Iterator[str]:
    """Yield the texts in the fields of a record, also those in lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for one in value.values():
            yield from _texts(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _read_back(text: str, tokenizer: Tokenizer) -> str:
    return tokenizer.decode(tokenizer.encode(text))


def _item_grams(texts: Sequence[Sequence[str]]) -> Iterator[Sequence[str]]:
    """Yield the n-grams of an item from the words of its texts."""
    longest = max(texts, key=len, default=())
    if MIN_WORDS <= len(longest) < NGRAM_WORDS:
        yield longest
    for text in texts:
        for start in range(len(text) - NGRAM_WORDS + 1):
            yield text[start : start + NGRAM_WORDS]


def _word_ids(text: TrainingText, vocabulary: Mapping[str, int]) -> Iterator[np.ndarray]:
    """Yield the words of the stores as numbers (n,) uint64: 0 for a word that no item has, and between documents."""
    for store in text.stores:
        for pieces in _batches(store):
            ids: list[int] = []
            for one in text.tokenizer.engine.decode_batch(pieces, skip_special_tokens=True):
                ids.extend(map(vocabulary.get, words(one), repeat(0)))
                ids.append(0)
            yield np.array(ids, np.uint64)


def _batches(store: TokenStore) -> Iterator[list[list[int]]]:
    """Yield the tokens of a store in batches of pieces, none of which is of two documents."""
    batch: list[list[int]] = []
    size = 0
    for begin, end in _documents(store):
        for at in range(begin, end, PIECE_TOKENS):
            piece = store.tokens[max(begin, at - OVERLAP_TOKENS) : min(end, at + PIECE_TOKENS)]
            batch.append(piece.tolist())
            size += len(piece)
            if size >= BATCH_TOKENS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def _documents(store: TokenStore) -> Iterator[tuple[int, int]]:
    """Yield the first token of each document and the one after its last; the offsets are read in stretches."""
    for start in range(0, len(store), BATCH_TOKENS):
        yield from pairwise(store.offsets[start : start + BATCH_TOKENS + 1].tolist())


def _candidates(ids: np.ndarray, count: int, table: np.ndarray) -> np.ndarray:
    """Return where rows of `count` words start whose words items have and whose hash is that of an n-gram of an item."""
    if len(ids) < count:
        return np.zeros(0, np.int64)
    unknown = np.concatenate(([0], np.cumsum(ids == 0)))
    starts = np.flatnonzero(unknown[count:] == unknown[:-count])
    hashes = np.zeros(len(starts), np.uint64)
    for k in range(count):
        hashes = hashes * _MULTIPLIER + ids[starts + k]
    at = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
    found: np.ndarray = starts[table[at] == hashes]
    return found


def _hash_table(grams: Sequence[tuple[int, ...]]) -> np.ndarray:
    """Return the sorted hashes of n-grams, as `_candidates` computes them."""
    ids = np.array(grams, np.uint64)
    hashes = np.zeros(len(ids), np.uint64)
    for k in range(ids.shape[1]):
        hashes = hashes * _MULTIPLIER + ids[:, k]
    return np.sort(hashes)
