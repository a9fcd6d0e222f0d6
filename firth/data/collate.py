"""Batches from examples: padding, packing and the placement of examples in rows.

Placement of examples in rows, and arrays filled accordingly; `pack` makes the batch.

>>> placement = PackedLayout(rows=np.array([0, 1]), starts=np.array([0, 0]), lengths=np.array([3, 1]))
>>> placement.scatter([np.array([5, 6, 7]), np.array([9])], fill=0, dtype=np.int64).tolist()
[[5, 6, 7], [9, 0, 0]]

Collate examples into batches: stack and pad each field, or pack several examples into a row.

>>> a = {"tokens": np.array([5, 6]), "labels": np.array([6, 7])}
>>> b = {"tokens": np.array([9]), "labels": np.array([4])}
>>> {name: field.tolist() for name, field in collate([a, b]).items()}
{'tokens': [[5, 6], [9, 0]], 'labels': [[6, 7], [4, -100]], 'key_time': [[0, 0], [0, 1073741824]]}
>>> {name: field.tolist() for name, field in pack([a, b], length=4).items()}
{'tokens': [[5, 6, 9]], 'labels': [[6, 7, 4]], 'document_ids': [[1, 1, 2]], 'positions': [[0, 1, 0]]}

Padding must not change a result. Padded tokens are masked as keys (`key_time` NEVER) and have no label (IGNORE in every label
field of the objective). As queries they are masked too (`query_time` -NEVER), so causal rows with padding at the end can still
use the causal kernel. Fields that carry no information are omitted: a batch without `key_time` has no padding.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from firth.data.attention_fields import PADDING
from firth.data.shuffle import ExampleRNG, length_grouped_batches
from firth.data.source import Source
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Batch, Constraints, Example, Metric, UserError


def first_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign examples to rows by first-fit decreasing: longest first, each into the first row with room (at most 11/9 of the optimum).

    Args:
        lengths: (sides, N) int. An encoder-decoder has two sides, and an example goes where both have room.
        room: Capacity of a row in tokens.

    Returns:
        The row of each example, (N,), and its first column on each side, (sides, N).

    Raises:
        UserError: An example is longer than a row.

    >>> rows, starts = first_fit(np.array([[3, 5, 2, 1]]), room=6)
    >>> rows.tolist(), starts.tolist()
    ([1, 0, 1, 0], [[0, 0, 3, 5]])
    """
    longest = lengths.max(0)
    if longest.max() > room:
        raise UserError(
            f"an example of {longest.max()} tokens does not fit into packed rows of {room}: "
            "shorten the examples or lengthen the rows"
        )
    along = np.lexsort((*lengths, -longest))
    rows, starts = np.empty_like(longest), np.empty_like(lengths)
    used = np.zeros((len(lengths), len(longest)), np.int64)  # there are never more rows than examples
    opened = 0
    # Examples of one length are consecutive, so each row takes as many of them at once as it has room for. This costs
    # 2 microseconds an example instead of 10.
    for same in np.split(along, np.flatnonzero(np.diff(lengths[:, along]).any(0)) + 1):
        need = lengths[:, same[0], None]
        filled = used[:, : opened + len(same)]
        holds = np.where(need > 0, (room - filled) // np.maximum(need, 1), len(same)).min(0)
        before = np.cumsum(holds) - holds
        takes = np.clip(len(same) - before, 0, holds)
        into = np.repeat(np.arange(len(takes)), takes)
        starts[:, same] = filled[:, into] + need * (np.arange(len(same)) - before[into])
        rows[same] = into
        filled += need * takes
        opened = max(opened, int(into[-1]) + 1)
    return rows, starts


@dataclass(frozen=True)
class PackedLayout:
    """Placement of N examples.

    Args:
        rows: Row of each example, (N,).
        starts: First column of each example, (N,).
        lengths: Number of tokens of each example, (N,).
    """

    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(rows, columns): as wide as the fullest row."""
        return int(self.rows.max()) + 1, int((self.starts + self.lengths).max())

    @cached_property
    def full(self) -> bool:
        """Whether there is no padding."""
        return int(self.lengths.sum()) == self.shape[0] * self.shape[1]

    @cached_property
    def token_index(self) -> np.ndarray:
        """Index of each token within its example: (tokens,)."""
        ends = np.cumsum(self.lengths)
        numbers: np.ndarray = np.arange(ends[-1]) - np.repeat(ends - self.lengths, self.lengths)
        return numbers

    @cached_property
    def _flat(self) -> np.ndarray:
        """Index of each token in the flattened (rows, columns): (tokens,)."""
        flat: np.ndarray = np.repeat(self.rows * self.shape[1] + self.starts, self.lengths) + self.token_index
        return flat

    def scatter(self, arrays: Sequence[np.ndarray], fill: int, dtype: type) -> np.ndarray:
        """Place one array (..., n) per example into (rows, ..., columns)."""
        lead = arrays[0].shape[:-1]
        if self.full and len(self.rows) == self.shape[0] and not self.starts.any():
            stacked: np.ndarray = np.concatenate(arrays, dtype=dtype, casting="unsafe").reshape(len(arrays), *lead, -1)
            return stacked[np.argsort(self.rows)] if (np.diff(self.rows) < 0).any() else stacked
        values: np.ndarray = np.concatenate(arrays, axis=-1, dtype=dtype, casting="unsafe")
        out: np.ndarray = np.full((self.shape[0] * self.shape[1], *lead), fill, dtype)
        out[self._flat] = np.moveaxis(values, -1, 0) if lead else values
        out = out.reshape(*self.shape, *lead)
        return np.ascontiguousarray(np.moveaxis(out, 1, -1)) if lead else out

    def scatter_per_token(self, values: np.ndarray, lead: tuple[int, ...], fill: int, dtype: type) -> np.ndarray:
        """Place one value per token, (tokens,), into (rows, *lead, columns), repeated along the leading axes."""
        out: np.ndarray = np.full(self.shape[0] * self.shape[1], fill, dtype)
        out[self._flat] = values
        return np.repeat(out.reshape(self.shape[0], 1, self.shape[1]), math.prod(lead), 1).reshape(
            self.shape[0], *lead, self.shape[1]
        )


LABEL_FIELDS = frozenset({"labels"})
SOURCE_PREFIX, MEMORY_PREFIX = "source_", "memory_"


class BuildsExamples(Protocol):
    """What `Batches` needs of an objective (`firth.objectives.objective.Objective`)."""

    @property
    def labels(self) -> Mapping[str, str]: ...

    @property
    def metrics(self) -> Mapping[str, Metric]: ...

    @property
    def constraints(self) -> Constraints: ...

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example: ...


def counted_fields(objective: BuildsExamples) -> dict[str, str]:
    """Return loss term or metric -> the batch field whose labels count it, for all that `loss` returns."""
    return dict(objective.labels) | {name: metric.field for name, metric in objective.metrics.items() if metric.field}


def label_fields_of(objective: BuildsExamples) -> frozenset[str]:
    """Return the names of the batch fields that hold labels, which are padded with IGNORE."""
    return LABEL_FIELDS.union(counted_fields(objective).values())


@functools.singledispatch
def build_examples(
    objective: BuildsExamples,
    examples: Sequence[Example],
    vocab: Vocab,
    draws: ExampleRNG,
    streams: Sequence[tuple[int, int]],
) -> list[Example]:
    """Return `build_example` of many examples. An objective that is faster at all of them at once registers how.

    Args:
        objective: The objective.
        examples: The examples.
        vocab: The vocabulary.
        draws: Creates the random generator of each example.
        streams: (epoch, index) of each example, the key of its generator.
    """
    return [objective.build_example(x, vocab, draws.at(*stream)) for x, stream in zip(examples, streams, strict=True)]


class Batches:
    """The batches of every step of a run, as a pure function of the step.

    Example k of step s is number s * batch_size + k of the run. Ranks, and the micro-batches within them, take contiguous slices
    of a step, so a run reads the same examples with the same random draws on any number of ranks and micro-batches.

    Args:
        source: The examples.
        objective: Builds the model inputs and labels.
        vocab: The vocabulary.
        batch_size: Examples per step, over all ranks.
        seed: Seed of the order and of all draws.
        gradient_accumulation_steps: Micro-batches per step and rank.
        pack_to_length: 0 pads each micro-batch; n packs it into rows of at most n tokens.
        group_by_length: Number of steps whose examples are sorted by length and redistributed among these steps
            (`firth.data.shuffle.length_grouped_batches`), so that a step needs little padding; 0 keeps the order. An example
            moves by fewer steps than that, and still occurs once in every epoch.
        rank: Index of this process.
        world: Number of processes.

    Raises:
        UserError: The source is empty, a step cannot be split, or the lengths are unknown.
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
            raise UserError(f"there is nothing to train on: the counts of the data are {dict(source.counts)}")
        if batch_size < gradient_accumulation_steps * world:
            raise UserError(
                f"{batch_size} examples a step cannot be shared by {world} ranks of {gradient_accumulation_steps} micro-batches "
                "each"
            )
        sizes = source.lengths if group_by_length else None
        if group_by_length and sizes is None:
            raise UserError(
                "the lengths of these examples are unknown before they are read: set batch.group_by_length=0"
            )
        self.sizes, self.group_by_length = sizes, group_by_length
        self._group = (-1, np.zeros((0, 0), np.int64))
        self.source, self.objective, self.vocab = source, objective, vocab
        self.batch_size, self.seed, self.pack_to_length = batch_size, seed, pack_to_length
        self.gradient_accumulation_steps = gradient_accumulation_steps
        self.rank, self.world = rank, world
        self._draws = ExampleRNG(seed, "view")
        self._label_fields = label_fields_of(objective)

    def batches(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of a step."""
        cells = self.world * self.gradient_accumulation_steps
        cuts = [self.batch_size * c // cells for c in range(cells + 1)]
        first = self.rank * self.gradient_accumulation_steps
        return [self.batch(step, cuts[c], cuts[c + 1]) for c in range(first, first + self.gradient_accumulation_steps)]

    def batch(self, step: int, start: int, stop: int) -> Batch:
        """Return examples start..stop of a step as one batch."""
        return self._assemble(*self.source.order(self.seed, self.positions(step)[start:stop]))

    def positions(self, step: int) -> np.ndarray:
        """Return the positions in the run of the examples of a step: (batch_size,)."""
        if not self.group_by_length or self.sizes is None:
            return np.arange(self.batch_size) + step * self.batch_size
        number, index = divmod(step, self.group_by_length)
        if number != self._group[0]:
            span = np.arange(self.group_by_length * self.batch_size) + number * self.group_by_length * self.batch_size
            sizes = self.sizes[self.source.order(self.seed, span)[1]]
            self._group = number, span[length_grouped_batches(sizes, self.group_by_length, self.seed, number)]
        return self._group[1][index]

    def all_batches(self) -> Iterator[Batch]:
        """Yield every example of the source once, in the source's order, for evaluation.

        Each rank takes every `world`-th batch. Draws and windows are those of epoch 0.
        """
        for start in range(self.rank * self.batch_size, len(self.source), self.world * self.batch_size):
            index = np.arange(start, min(start + self.batch_size, len(self.source)))
            yield self._assemble(np.zeros_like(index), index)

    def filler(self) -> list[Batch]:
        """Return the batches that this rank has fewer in `all_batches` than another one: none, or the last one of the source."""
        count = -(-len(self.source) // self.batch_size)
        if self.rank < count % self.world or count % self.world == 0:
            return []
        index = np.arange((count - 1) * self.batch_size, len(self.source))
        return [self._assemble(np.zeros_like(index), index)]

    def shown(self, epochs: np.ndarray, indices: np.ndarray) -> list[Example]:
        """Build the model inputs and labels of some examples, without collating them.

        Args:
            epochs: Epoch of each example, (n,).
            indices: Index of each example in the source, (n,).
        """
        copies = self.objective.constraints.num_copies
        drawn = (epochs % copies if copies else epochs).tolist()
        examples = self.source.in_epochs(self.seed, epochs, indices)
        streams = list(zip(drawn, indices.tolist(), strict=True))
        return build_examples(self.objective, examples, self.vocab, self._draws, streams)

    def _assemble(self, epochs: np.ndarray, indices: np.ndarray) -> Batch:
        shown = self.shown(epochs, indices)
        return (
            pack(shown, self.pack_to_length, self._label_fields)
            if self.pack_to_length
            else collate(shown, self._label_fields)
        )


def collate(examples: Sequence[Example], label_fields: Collection[str] = LABEL_FIELDS) -> Batch:
    """Collate examples into one row each, padded at the end of the token axis.

    Args:
        examples: The examples. They may differ in which of query_time, key_time, key_expiry, document_ids and positions they
            have, but in no other field. A field without a token axis is stacked.
        label_fields: Names of the fields that hold labels, which are padded with IGNORE.

    Returns:
        Field -> (B, ..., T).

    Raises:
        ValueError: A field is missing from some examples, or its shapes differ.
    """
    rows, starts = np.arange(len(examples)), np.zeros(len(examples), np.int64)
    fields: dict[str, np.ndarray] = {}
    for side in _sides(examples):
        fields |= _collate_side(examples, side, PackedLayout(rows, starts, _lengths(examples, side)), label_fields)
    if MEMORY_PREFIX + "tokens" in examples[0]:
        fields |= _collate_side(
            examples, MEMORY_PREFIX, PackedLayout(rows, starts, _lengths(examples, MEMORY_PREFIX)), label_fields
        )
    for name in examples[0].keys() - fields.keys():
        values = [np.asarray(e[name]) for e in examples]
        if any(v.shape != values[0].shape for v in values):
            raise ValueError(f"the field {name!r} is neither as long as the tokens nor of one shape in all examples")
        fields[name] = np.stack(values).astype(_dtype(name, values[0]))
    return {name: torch.from_numpy(field) for name, field in fields.items()}


def pack(examples: Sequence[Example], length: int, label_fields: Collection[str] = LABEL_FIELDS) -> Batch:
    """Pack several examples into each row, separated by `document_ids` (1, 2, ...; 0 is padding).

    Uses first-fit decreasing: the longest example first, each into the first row with room. `positions` count from 0 in
    every example. For an encoder-decoder, source and target rows hold the same examples.

    Args:
        examples: The examples.
        length: Maximum number of tokens of a row.
        label_fields: Names of the fields that hold labels, which are padded with IGNORE.

    Returns:
        Field -> (rows, ..., T).

    Raises:
        UserError: An example is longer than a row, or has a field without a token axis.
    """
    sides = _sides(examples)
    lengths = np.stack([_lengths(examples, side) for side in sides])
    rows, starts = first_fit(lengths, length)
    first = _first_documents(examples, sides, rows, starts[0])
    fields: dict[str, np.ndarray] = {}
    for side, start, n in zip(sides, starts, lengths, strict=True):
        placement = PackedLayout(rows, start, n)
        lead = examples[0][side + "tokens"].shape[:-1]
        fields |= _collate_side(examples, side, placement, label_fields)
        own = fields.get(side + "document_ids")
        number = placement.scatter_per_token(np.repeat(first, n), lead, 0, np.int32)
        fields[side + "document_ids"] = number if own is None else number + own
        if side + "positions" not in fields:
            fields[side + "positions"] = placement.scatter_per_token(placement.token_index, lead, 0, np.int32)
    if MEMORY_PREFIX + "tokens" in examples[0]:
        raise UserError(
            "rows with memory cannot be packed, because the memory belongs to one text: set batch.pack_to_length=0 or "
            "model.attention.memory_length=0"
        )
    for name in examples[0].keys() - fields.keys():
        raise UserError(
            f"the field {name!r} has no token axis, so these examples cannot be packed: set batch.pack_to_length=0"
        )
    return {name: torch.from_numpy(field) for name, field in fields.items()}


def _first_documents(
    examples: Sequence[Example], sides: Sequence[str], rows: np.ndarray, starts: np.ndarray
) -> np.ndarray:
    """Return the number that document 0 of each example gets in its row: (N,). Both sides of an example share it."""
    names = [side + "document_ids" for side in sides]
    spans = np.ones(len(examples), np.int64)
    for i, example in enumerate(examples):
        for name in names:
            if name in example:
                spans[i] = max(spans[i], 1 + int(example[name].max()))
    along = np.lexsort((starts, rows))
    before = np.cumsum(spans[along]) - spans[along]
    opens = np.flatnonzero(np.diff(rows[along], prepend=-1))  # the first example of each row
    first = np.empty_like(spans)
    first[along] = 1 + before - np.repeat(before[opens], np.diff(opens, append=len(along)))
    return first


def _collate_side(
    examples: Sequence[Example], side: str, placement: PackedLayout, label_fields: Collection[str]
) -> dict[str, np.ndarray]:
    """Collate all token fields of one side ("" or "source_"): those whose last axis is as long as the side's tokens."""
    lead = examples[0][side + "tokens"].shape[:-1]
    fields: dict[str, np.ndarray] = {}
    for name in {name: None for example in examples for name in example}:
        if side != next((s for s in (SOURCE_PREFIX, MEMORY_PREFIX) if name.startswith(s)), ""):
            continue
        base_name = name.removeprefix(side)
        given = [e[name] for e in examples if name in e]
        if np.ndim(given[0]) <= len(lead):
            continue
        if len(given) < len(examples):
            if base_name not in DEFAULTS:
                raise ValueError(f"the field {name!r} is in {len(given)} of {len(examples)} examples")
            shapes = (e[side + "tokens"].shape for e in examples)
            given = [e[name] if name in e else DEFAULTS[base_name](s) for e, s in zip(examples, shapes, strict=True)]
        if np.array_equal([a.shape[-1] for a in given], placement.lengths):
            fill = PADDING.get(base_name, IGNORE if name in label_fields else 0)
            fields[name] = placement.scatter(given, fill, _dtype(base_name, given[0]))
    if side + "key_time" not in fields and not placement.full:
        fields[side + "key_time"] = placement.scatter_per_token(
            np.zeros_like(placement.token_index), lead, NEVER, np.int32
        )
    return fields


DEFAULTS: dict[str, Callable[[tuple[int, ...]], np.ndarray]] = {
    "query_time": lambda shape: np.zeros(shape, np.int32),
    "key_time": lambda shape: np.zeros(shape, np.int32),
    "key_expiry": lambda shape: np.full(shape, NEVER, np.int32),
    "document_ids": lambda shape: np.zeros(shape, np.int32),
    "positions": lambda shape: np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape),
}
"""Attention field -> its values where an example does not have it."""


def _sides(examples: Sequence[Example]) -> tuple[str, ...]:
    """Return the token axes of the examples: that of the decoder or only stack, and that of the encoder's source."""
    return ("", SOURCE_PREFIX) if SOURCE_PREFIX + "tokens" in examples[0] else ("",)


def _lengths(examples: Sequence[Example], side: str) -> np.ndarray:
    return np.array([e[side + "tokens"].shape[-1] for e in examples])


def _dtype(name: str, value: np.ndarray) -> type:
    """Return int32 for attention fields, int64 for ids, float32 for real numbers."""
    if name in DEFAULTS:
        return np.int32
    return {"f": np.float32, "b": np.bool_}.get(value.dtype.kind, np.int64)
