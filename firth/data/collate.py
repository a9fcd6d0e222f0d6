"""From examples to tensors: stack and pad by field name, or pack several examples into a row.

>>> a = {"tokens": np.array([5, 6]), "labels": np.array([6, 7])}
>>> b = {"tokens": np.array([9]), "labels": np.array([4])}
>>> {name: field.tolist() for name, field in collate([a, b]).items()}
{'tokens': [[5, 6], [9, 0]], 'labels': [[6, 7], [4, -100]], 'key_time': [[0, 0], [0, 1073741824]]}
>>> {name: field.tolist() for name, field in pack([a, b], length=4).items()}
{'tokens': [[5, 6, 9]], 'labels': [[6, 7, 4]], 'document_ids': [[1, 1, 2]], 'positions': [[0, 1, 0]]}

Padding must not change an answer, so it is seen by nobody (`key_time` NEVER) and asks nothing (IGNORE in every field
that an objective names as a target). Nor is it anybody who looks (`query_time` -NEVER): what it reads is nobody's concern,
so rows that are causal and padded at their end still take the causal kernel. What nobody needs is left out: a batch
without `key_time` has no padding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from firth.data.layout import PADDING
from firth.data.packing import PackedLayout, first_fit
from firth.data.shuffle import ExampleRNG, length_grouped_batches
from firth.data.source import Source
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Batch, Example, UserError

LABEL_FIELDS = frozenset({"labels"})
SOURCE, MEMORY = "source_", "memory_"


class BuildsExamples(Protocol):
    """What a batch needs of an objective: its view, the names of the fields that hold answers, and how many views of an
    example epochs take turns with (0: each has its own)."""

    @property
    def labels(self) -> Mapping[str, str]: ...

    @property
    def metrics(self) -> Mapping[str, str]: ...

    @property
    def num_copies(self) -> int: ...

    def build_examples(
        self, examples: Sequence[Example], vocab: Vocab, draws: ExampleRNG, streams: Sequence[tuple[int, int]]
    ) -> list[Example]: ...


class Batches:
    """The batches of every step of a run, as a pure function of the step.

    Example k of step s is number s * rows + k of the run; ranks, and the `accumulate` micro-batches within them, take
    contiguous shares of the `rows`. So the same run on two ranks, or cut into other micro-batches, reads the same
    examples with the same random draws. pack: 0 pads each micro-batch; n packs it into rows of at most n tokens.
    sort: the examples of so many steps are sorted by length and dealt to these steps (`firth.data.shuffle.length_grouped_batches`), so that
    the rows of a step are about as long and little of them is padding; 0 leaves them as they are drawn. An example is met
    at most so many steps sooner or later than it would have been, once in every epoch all the same.
    """

    def __init__(
        self,
        source: Source,
        objective: BuildsExamples,
        vocab: Vocab,
        *,
        batch_size: int,
        seed: int,
        gradient_accumulation_steps: int = 1,
        pack_to_length: int = 0,
        group_by_length: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        if not len(source):
            raise UserError(f"there is nothing to train on: {dict(source.counts)}")
        if batch_size < gradient_accumulation_steps * world:
            raise UserError(
                f"{batch_size} rows a step cannot be shared by {world} ranks of {gradient_accumulation_steps} micro-batches each"
            )
        sizes = source.lengths if group_by_length else None
        if group_by_length and sizes is None:
            raise UserError(
                "the lengths of these examples are not known before they are read: set batch.group_by_length=0"
            )
        self.sizes, self.group_by_length = sizes, group_by_length
        self._dealt = (-1, np.zeros((0, 0), np.int64))
        self.source, self.objective, self.vocab = source, objective, vocab
        self.batch_size, self.seed, self.gradient_accumulation_steps, self.pack_to_length = (
            batch_size,
            seed,
            gradient_accumulation_steps,
            pack_to_length,
        )
        self.rank, self.world = rank, world
        self._draws = ExampleRNG(seed, "view")
        self._asked = frozenset({*objective.labels.values(), *objective.metrics.values()}) | LABEL_FIELDS

    def batches(self, step: int) -> list[Batch]:
        """This rank's micro-batches of a step, `accumulate` of them."""
        cells = self.world * self.gradient_accumulation_steps
        cuts = [self.batch_size * c // cells for c in range(cells + 1)]
        first = self.rank * self.gradient_accumulation_steps
        return [self.batch(step, cuts[c], cuts[c + 1]) for c in range(first, first + self.gradient_accumulation_steps)]

    def batch(self, step: int, start: int, stop: int) -> Batch:
        """Examples start..stop of a step as one batch."""
        return self._assemble(*self.source.order(self.seed, self.positions(step)[start:stop]))

    def positions(self, step: int) -> np.ndarray:
        """Which examples of the run a step reads, by their position in it: (rows,)."""
        if not self.group_by_length or self.sizes is None:
            return np.arange(self.batch_size) + step * self.batch_size
        number, within = divmod(step, self.group_by_length)
        if number != self._dealt[0]:
            span = np.arange(self.group_by_length * self.batch_size) + number * self.group_by_length * self.batch_size
            sizes = self.sizes[self.source.order(self.seed, span)[1]]
            self._dealt = number, span[length_grouped_batches(sizes, self.group_by_length, self.seed, number)]
        return self._dealt[1][within]

    def all_batches(self) -> Iterator[Batch]:
        """Every example of the source once, in the source's own order, `rows` at a time: what an evaluation reads.

        Each rank takes every `world`-th batch; draws and windows are those of epoch 0.
        """
        for start in range(self.rank * self.batch_size, len(self.source), self.world * self.batch_size):
            index = np.arange(start, min(start + self.batch_size, len(self.source)))
            yield self._assemble(np.zeros_like(index), index)

    def shown(self, epochs: np.ndarray, indices: np.ndarray) -> list[Example]:
        """What the objective makes of these examples in these epochs, as yet in no batch."""
        copies = self.objective.num_copies
        drawn = (epochs % copies if copies else epochs).tolist()
        examples = self.source.in_epochs(self.seed, epochs, indices)
        streams = list(zip(drawn, indices.tolist(), strict=True))
        return self.objective.build_examples(examples, self.vocab, self._draws, streams)

    def _assemble(self, epochs: np.ndarray, indices: np.ndarray) -> Batch:
        shown = self.shown(epochs, indices)
        return pack(shown, self.pack_to_length, self._asked) if self.pack_to_length else collate(shown, self._asked)


def collate(examples: Sequence[Example], asked: Collection[str] = LABEL_FIELDS) -> Batch:
    """One row per example, padded at the end of the token axis: (B, ..., T).

    asked: the fields that hold answers, padded with IGNORE. Examples may differ in which of looks, appears, leaves,
    document and positions they have, but in no other field. A field without a token axis is stacked as it is.
    """
    rows, starts = np.arange(len(examples)), np.zeros(len(examples), np.int64)
    laid: dict[str, np.ndarray] = {}
    for side in _sides(examples):
        laid |= _lay(examples, side, PackedLayout(rows, starts, _lengths(examples, side)), asked)
    if MEMORY + "tokens" in examples[0]:
        laid |= _lay(examples, MEMORY, PackedLayout(rows, starts, _lengths(examples, MEMORY)), asked)
    for name in examples[0].keys() - laid.keys():
        values = [np.asarray(e[name]) for e in examples]
        if any(v.shape != values[0].shape for v in values):
            raise ValueError(f"the field {name!r} is neither as long as the tokens nor of one shape in all examples")
        laid[name] = np.stack(values).astype(_dtype(name, values[0]))
    return {name: torch.from_numpy(field) for name, field in laid.items()}


def pack(examples: Sequence[Example], length: int, asked: Collection[str] = LABEL_FIELDS) -> Batch:
    """Several examples in a row of at most `length` tokens, kept apart by `document` (1, 2, ...; 0 is padding).

    First-fit decreasing: the longest examples first, each into the first row with room. `positions` count from 0 in
    every example. An encoder-decoder's source rows hold the same examples as its target rows. Raises UserError for an
    example longer than a row, and for a field without a token axis, which a row of several examples cannot hold.
    """
    sides = _sides(examples)
    lengths = np.stack([_lengths(examples, side) for side in sides])
    rows, starts = first_fit(lengths, length)
    first = _first_documents(examples, sides, rows, starts[0])
    laid: dict[str, np.ndarray] = {}
    for side, start, n in zip(sides, starts, lengths, strict=True):
        places = PackedLayout(rows, start, n)
        lead = examples[0][side + "tokens"].shape[:-1]
        laid |= _lay(examples, side, places, asked)
        own = laid.get(side + "document_ids")
        number = places.spread(np.repeat(first, n), lead, 0, np.int32)
        laid[side + "document_ids"] = number if own is None else number + own
        if side + "positions" not in laid:
            laid[side + "positions"] = places.spread(places.within, lead, 0, np.int32)
    if MEMORY + "tokens" in examples[0]:
        raise UserError(
            "rows with memory cannot be packed, for each has one text before it: set batch.pack_to_length=0 or model.memory_length=0"
        )
    for name in examples[0].keys() - laid.keys():
        raise UserError(f"the field {name!r} has no token axis, so these examples cannot be packed: set pack to 0")
    return {name: torch.from_numpy(field) for name, field in laid.items()}


def _first_documents(
    examples: Sequence[Example], sides: Sequence[str], rows: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """The number that each example's document 0 gets in its row: (N,). Both sides of an example share it."""
    fields = [side + "document_ids" for side in sides]
    spans = np.ones(len(examples), np.int64)
    for i, example in enumerate(examples):
        for field in fields:
            if field in example:
                spans[i] = max(spans[i], 1 + int(example[field].max()))
    along = np.lexsort((starts, rows))
    before = np.cumsum(spans[along]) - spans[along]
    opens = np.flatnonzero(np.diff(rows[along], prepend=-1))  # the first example of each row
    first = np.empty_like(spans)
    first[along] = 1 + before - np.repeat(before[opens], np.diff(opens, append=len(along)))
    return first


def _lay(examples: Sequence[Example], side: str, places: PackedLayout, asked: Collection[str]) -> dict[str, np.ndarray]:
    """All token fields of one side ("" or "source_"): those whose last axis is as long as the side's tokens."""
    lead = examples[0][side + "tokens"].shape[:-1]
    laid: dict[str, np.ndarray] = {}
    for name in {name: None for example in examples for name in example}:
        if side != next((s for s in (SOURCE, MEMORY) if name.startswith(s)), ""):
            continue
        bare = name.removeprefix(side)
        given = [e[name] for e in examples if name in e]
        if np.ndim(given[0]) <= len(lead):
            continue
        if len(given) < len(examples):
            if bare not in DEFAULTS:
                raise ValueError(f"the field {name!r} is in {len(given)} of {len(examples)} examples")
            shapes = (e[side + "tokens"].shape for e in examples)
            given = [e[name] if name in e else DEFAULTS[bare](s) for e, s in zip(examples, shapes, strict=True)]
        if np.array_equal([a.shape[-1] for a in given], places.lengths):
            fill = PADDING.get(bare, IGNORE if name in asked else 0)
            laid[name] = places.lay(given, fill, _dtype(bare, given[0]))
    if side + "key_time" not in laid and not places.full:
        laid[side + "key_time"] = places.spread(np.zeros_like(places.within), lead, NEVER, np.int32)
    return laid


DEFAULTS: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
    "query_time": lambda shape: np.zeros(shape, np.int32),
    "key_time": lambda shape: np.zeros(shape, np.int32),
    "key_expiry": lambda shape: np.full(shape, NEVER, np.int32),
    "document_ids": lambda shape: np.zeros(shape, np.int32),
    "positions": lambda shape: np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape),
}
"""What a missing field of the visibility rule stands for."""


def _sides(examples: Sequence[Example]) -> tuple[str, ...]:
    """The token axes that the examples have: the one the model writes, and the source it reads."""
    return ("", SOURCE) if SOURCE + "tokens" in examples[0] else ("",)


def _lengths(examples: Sequence[Example], side: str) -> np.ndarray:
    return np.array([e[side + "tokens"].shape[-1] for e in examples])


def _dtype(name: str, value: np.ndarray) -> type:
    """int32 for the fields of the visibility rule, int64 for ids, float32 for real numbers."""
    if name in DEFAULTS:
        return np.int32
    return {"f": np.float32, "b": np.bool_}.get(value.dtype.kind, np.int64)
