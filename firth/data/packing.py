"""Where tokens go: rows and columns for many examples at once, and the arrays filled accordingly (NumPy only).

>>> places = PackedLayout(rows=np.array([0, 1]), starts=np.array([0, 0]), lengths=np.array([3, 1]))
>>> places.lay([np.array([5, 6, 7]), np.array([9])], fill=0, dtype=np.int64).tolist()
[[5, 6, 7], [9, 0, 0]]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from firth.types import UserError


def first_fit(lengths: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """First-fit decreasing: the longest first, each into the first row with room (at most 11/9 of the fewest rows).

    lengths (sides, N) -> the row of each example (N,) and its first column there (sides, N). An encoder-decoder has
    two sides, and an example goes where both have room.

    >>> rows, starts = first_fit(np.array([[3, 5, 2, 1]]), room=6)
    >>> rows.tolist(), starts.tolist()
    ([1, 0, 1, 0], [[0, 0, 3, 5]])
    """
    longest = lengths.max(0)
    if longest.max() > room:
        raise UserError(
            f"an example of {longest.max()} tokens does not fit into packed rows of {room}: "
            "make the examples shorter or the rows longer"
        )
    along = np.lexsort((*lengths, -longest))
    rows, starts = np.empty_like(longest), np.empty_like(lengths)
    used = np.zeros((len(lengths), len(longest)), np.int64)  # there are never more rows than examples
    opened = 0
    # Examples of one size go one after the other, so that each row in turn takes as many as it has room for: all of
    # them at once, which is what makes this cost 2 microseconds an example and not 10.
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
    """The places of N examples: their rows, first columns and lengths, each (N,)."""

    rows: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(rows, columns): no wider than the fullest row."""
        return int(self.rows.max()) + 1, int((self.starts + self.lengths).max())

    @cached_property
    def full(self) -> bool:
        """Nothing is padded."""
        return int(self.lengths.sum()) == self.shape[0] * self.shape[1]

    @cached_property
    def within(self) -> np.ndarray:
        """The number of each token in its example: (tokens,)."""
        ends = np.cumsum(self.lengths)
        numbers: np.ndarray = np.arange(ends[-1]) - np.repeat(ends - self.lengths, self.lengths)
        return numbers

    @cached_property
    def _flat(self) -> np.ndarray:
        """The place of each token in the flattened (rows, columns): (tokens,)."""
        flat: np.ndarray = np.repeat(self.rows * self.shape[1] + self.starts, self.lengths) + self.within
        return flat

    def lay(self, arrays: Sequence[np.ndarray], fill: int, dtype: type) -> np.ndarray:
        """One array (..., n) per example -> (rows, ..., columns)."""
        lead = arrays[0].shape[:-1]
        if self.full and len(self.rows) == self.shape[0] and not self.starts.any():
            stacked: np.ndarray = np.concatenate(arrays, dtype=dtype, casting="unsafe").reshape(len(arrays), *lead, -1)
            return stacked[np.argsort(self.rows)] if (np.diff(self.rows) < 0).any() else stacked
        values: np.ndarray = np.concatenate(arrays, axis=-1, dtype=dtype, casting="unsafe")
        out: np.ndarray = np.full((self.shape[0] * self.shape[1], *lead), fill, dtype)
        out[self._flat] = np.moveaxis(values, -1, 0) if lead else values
        out = out.reshape(*self.shape, *lead)
        return np.ascontiguousarray(np.moveaxis(out, 1, -1)) if lead else out

    def spread(self, values: np.ndarray, lead: tuple[int, ...], fill: int, dtype: type) -> np.ndarray:
        """One value per token (tokens,) -> (rows, *lead, columns), the same along the free axes."""
        out: np.ndarray = np.full(self.shape[0] * self.shape[1], fill, dtype)
        out[self._flat] = values
        return np.repeat(out.reshape(self.shape[0], 1, self.shape[1]), math.prod(lead), 1).reshape(
            self.shape[0], *lead, self.shape[1]
        )
