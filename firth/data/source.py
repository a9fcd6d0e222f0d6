"""Sources of examples: a source is a sequence of examples and the order in which a run reads them.

>>> class Letters(Source):
...     def __len__(self): return 3
...     def __getitem__(self, i): return {"tokens": np.array([i])}
>>> epoch, index = Letters().order(seed=0, positions=np.arange(3))
>>> sorted(index.tolist())
[0, 1, 2]
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from firth.data.shuffle import epoch_permutation
from firth.data.split import content_key
from firth.types import IGNORE, Example, UserError

if TYPE_CHECKING:
    from firth.model.model import LM


class Source:
    """A sequence of examples. `source[i]` is a pure function of i; everything that a run must save is in `state`."""

    @property
    def counts(self) -> Mapping[str, int]:
        """Numbers of examples read, truncated and omitted, for the report."""
        return {"examples": len(self)}

    @property
    def notes(self) -> Sequence[str]:
        """Sentences on what was truncated, omitted or missing, each with the place of the first."""
        return ()

    @property
    def group_ids(self) -> np.ndarray:
        """Group of each example, (n,) uint64: those with one `content_key` are held out together, or not at all."""
        return np.array([content_key(str(i)) for i in range(len(self))], np.uint64)

    @property
    def record_ids(self) -> np.ndarray:
        """Number of the record of each example, from 0: (n,)."""
        return np.arange(len(self))

    def metadata(self, index: int) -> Mapping[str, Any]:
        """Return what a metric needs of an example and its tokens do not contain, such as the passage of a window."""
        return {}

    @property
    def lengths(self) -> np.ndarray | None:
        """Length of each example, (n,), in a unit of the source's own; None if it is unknown before reading."""
        return None

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        """Return the number of labels of each class in some examples, including classes with none; {} without classes."""
        return {}

    def __len__(self) -> int:
        raise NotImplementedError(type(self).__name__)

    def __getitem__(self, index: int) -> Example:
        raise NotImplementedError(type(self).__name__)

    def many(self, indices: Sequence[int]) -> list[Example]:
        """Return the examples of some indices, as `source[i]` does, together where that is faster."""
        return [self[i] for i in indices]

    def in_epochs(self, seed: int, epochs: np.ndarray, indices: np.ndarray) -> list[Example]:
        """Return the examples that a run with this seed reads: a pure function of the three arguments.

        Args:
            seed: The seed that the run passes to `order`.
            epochs: (n,) int. In epoch 0 the examples are those of `source[i]`; in later ones a source may split its text elsewhere.
            indices: (n,) int.
        """
        return self.many(indices.tolist())

    def order(self, seed: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (epoch, index) of positions in an endless run: every epoch is a permutation."""
        return epoch_permutation(len(self), seed, positions)

    @property
    def on_policy(self) -> bool:
        """Whether examples depend on the model in training, or on earlier steps.

        Batches of such a source are built after the previous step has ended; those of others in a thread while it runs. A source
        that overrides `prepare` or `state` counts as one, unless it overrides this.
        """
        return type(self).prepare is not Source.prepare or type(self).state is not Source.state

    def prepare(self, model: LM, step: int) -> Mapping[str, float]:
        """Prepare the batches of a step; called before they are built. An on-policy source generates text here.

        Returns:
            Metrics of newly generated examples, for the log; {} without any.
        """
        return {}

    def rehearse(self) -> int:
        """Make the batches of step 0 available without a model, for a dry run: answers of the most tokens, say.

        Returns:
            The bytes of the models that it keeps.
        """
        return 0

    def rehearse_rollout(self, model: LM, number: int) -> None:
        """Run the forward passes of a rollout batch that need no sampled text, for a dry run after `rehearse`."""

    @property
    def steps_per_rollout(self) -> int:
        """Training steps that one `prepare` serves."""
        return 1

    def state(self) -> dict[str, np.ndarray]:
        """Return what a checkpoint must store to resume; {} for a source that only reads."""
        return {}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        """Restore a `state`."""


class MixtureSource(Source):
    """Several sources in fixed proportions: after any m examples each source has had its share of m to within one example.

    Position k of the run reads from one source, by a schedule that is a pure function of k; each source goes through its own
    permuted epochs. So a small source with a large weight is repeated, a large one with a small weight is read once in part,
    and resuming still needs one number.

    Args:
        sources: The sources.
        weights: Positive weights, which need not sum to one. They are exact if they are a ratio of integers with a sum of at
            most 65536, else rounded to 1/65536.

    Raises:
        UserError: A weight is missing or not positive.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        if len(sources) != len(weights) or not sources:
            raise UserError(f"a mixture needs one weight per source: {len(sources)} sources, {len(weights)} weights")
        if not all(math.isfinite(w) and w > 0 for w in weights):
            raise UserError(f"the weights of a mixture must be positive numbers, not {list(weights)}")
        self.sources = tuple(sources)
        self.quotas = _quotas(weights)
        self._starts = np.cumsum([0, *(len(s) for s in sources)])
        self._which = _schedule(self.quotas)
        """Source of each position within one period."""
        self._rank = np.empty_like(self._which)
        for which in range(len(sources)):
            at = self._which == which
            self._rank[at] = np.arange(at.sum())

    @property
    def counts(self) -> Mapping[str, int]:
        total: dict[str, int] = {}
        for source in self.sources:
            for name, n in source.counts.items():
                total[name] = total.get(name, 0) + n
        return total

    @property
    def notes(self) -> Sequence[str]:
        return list(dict.fromkeys(note for source in self.sources for note in source.notes))

    @property
    def lengths(self) -> np.ndarray | None:
        per_source = [source.lengths for source in self.sources]
        known = [sizes for sizes in per_source if sizes is not None]
        return np.concatenate(known) if len(known) == len(per_source) else None

    @property
    def record_ids(self) -> np.ndarray:
        per_source = [source.record_ids for source in self.sources]
        first = np.cumsum([0, *(int(ids.max(initial=-1)) + 1 for ids in per_source)])
        return np.concatenate([ids + start for ids, start in zip(per_source, first[:-1], strict=True)])

    @property
    def group_ids(self) -> np.ndarray:
        return np.concatenate([source.group_ids for source in self.sources])

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        total: dict[str, int] = {}
        for source, start in zip(self.sources, self._starts[:-1], strict=True):
            selected = indices[(indices >= start) & (indices < start + len(source))] - start
            for name, n in source.class_counts(selected).items():
                total[name] = total.get(name, 0) + n
        return total

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        which, within = self._at(index)
        return self.sources[which][within]

    def metadata(self, index: int) -> Mapping[str, Any]:
        which, within = self._at(index)
        return self.sources[which].metadata(within)

    def _at(self, index: int) -> tuple[int, int]:
        """Return the source of an example, and its index there."""
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        return which, index - int(self._starts[which])

    def order(self, seed: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        period, at = np.divmod(np.asarray(positions, np.int64), len(self._which))
        which = self._which[at]
        epoch, index = np.empty_like(at), np.empty_like(at)
        for i, source in enumerate(self.sources):
            selected = which == i
            draws = period[selected] * self.quotas[i] + self._rank[at[selected]]
            epoch[selected], local = source.order(seed + i, draws)
            index[selected] = local + self._starts[i]
        return epoch, index

    def in_epochs(self, seed: int, epochs: np.ndarray, indices: np.ndarray) -> list[Example]:
        which = self._starts.searchsorted(indices, side="right") - 1
        found: dict[int, Example] = {}
        for i in np.unique(which).tolist():
            at = np.flatnonzero(which == i)
            # `order` permutes source i with this seed.
            examples = self.sources[i].in_epochs(seed + i, epochs[at], indices[at] - self._starts[i])
            found |= zip(at.tolist(), examples, strict=True)
        return [found[k] for k in range(len(indices))]

    @property
    def on_policy(self) -> bool:
        return any(source.on_policy for source in self.sources)

    def prepare(self, model: LM, step: int) -> Mapping[str, float]:
        return {name: n for source in self.sources for name, n in source.prepare(model, step).items()}

    def rehearse(self) -> int:
        return sum(source.rehearse() for source in self.sources)

    def rehearse_rollout(self, model: LM, number: int) -> None:
        for source in self.sources:
            source.rehearse_rollout(model, number)

    @property
    def steps_per_rollout(self) -> int:
        return max(source.steps_per_rollout for source in self.sources)

    def state(self) -> dict[str, np.ndarray]:
        return {f"{i}.{k}": v for i, source in enumerate(self.sources) for k, v in source.state().items()}

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        for i, source in enumerate(self.sources):
            prefix = f"{i}."
            source.restore({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})


class WrappedSource(Source):
    """Base class of sources that change the examples of another source and delegate everything else to it."""

    def __init__(self, source: Source) -> None:
        self.source = source

    @property
    def counts(self) -> Mapping[str, int]:
        return self.source.counts

    @property
    def notes(self) -> Sequence[str]:
        return self.source.notes

    @property
    def group_ids(self) -> np.ndarray:
        return self.source.group_ids

    @property
    def record_ids(self) -> np.ndarray:
        return self.source.record_ids

    def metadata(self, index: int) -> Mapping[str, Any]:
        return self.source.metadata(index)

    @property
    def lengths(self) -> np.ndarray | None:
        return self.source.lengths

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        return self.source.class_counts(indices)

    def __len__(self) -> int:
        return len(self.source)

    def order(self, seed: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.source.order(seed, positions)

    @property
    def on_policy(self) -> bool:
        return self.source.on_policy

    def prepare(self, model: LM, step: int) -> Mapping[str, float]:
        return self.source.prepare(model, step)

    def rehearse(self) -> int:
        return self.source.rehearse()

    def rehearse_rollout(self, model: LM, number: int) -> None:
        self.source.rehearse_rollout(model, number)

    @property
    def steps_per_rollout(self) -> int:
        return self.source.steps_per_rollout

    def state(self) -> dict[str, np.ndarray]:
        return self.source.state()

    def restore(self, state: Mapping[str, np.ndarray]) -> None:
        self.source.restore(state)


class UnlabeledSource(WrappedSource):
    """The examples of a source with their labels replaced by IGNORE."""

    @property
    def counts(self) -> Mapping[str, int]:
        return {"unlabeled": len(self)}

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        return {}

    def __getitem__(self, index: int) -> Example:
        return self.source[index] | {"label": np.int64(IGNORE)}


MAX_PERIOD = 65536


def _quotas(weights: Sequence[float]) -> list[int]:
    """Return integers in the ratio of the weights: the number of draws from each source in one period.

    >>> _quotas([0.7, 0.2, 0.1]), _quotas([2, 2])
    ([7, 2, 1], [1, 1])
    """
    exact = [Fraction(str(w)) for w in weights]
    scale = math.lcm(*(f.denominator for f in exact))
    whole = [int(f * scale) for f in exact]
    whole = [n // math.gcd(*whole) for n in whole]
    if sum(whole) <= MAX_PERIOD:
        return whole
    share = [Fraction(n, sum(whole)) * MAX_PERIOD for n in whole]
    floors = [max(1, int(s)) for s in share]
    spare = MAX_PERIOD - sum(floors)
    largest = sorted(range(len(share)), key=lambda i: floors[i] - share[i])
    for i in largest[: max(spare, 0)]:
        floors[i] += 1
    return floors


def _schedule(quotas: Sequence[int]) -> np.ndarray:
    """Return the source of each position of one period, such that every prefix is within one example of its shares.

    The j-th draw of a source with share w belongs into the window [floor((j-1)/w), ceil(j/w)); taking the earliest
    deadline among the open windows never misses one (proportionate fairness, Baruah et al. 1996).
    """
    period = sum(quotas)
    which = np.empty(period, np.int32)
    taken = [0] * len(quotas)
    waiting = [(0, i) for i in range(len(quotas))]  # (release, source)
    ready: list[tuple[int, int]] = []  # (deadline, source)
    for at in range(period):
        while waiting and waiting[0][0] <= at:
            _, i = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-(taken[i] + 1) * period // quotas[i]), i))
        _, i = heapq.heappop(ready)
        which[at] = i
        taken[i] += 1
        heapq.heappush(waiting, (taken[i] * period // quotas[i], i))
    return which


class SubsetSource(Source):
    """Some examples of a source that only reads, in the order of `indices`."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices

    @property
    def counts(self) -> Mapping[str, int]:
        return {**self.source.counts, "examples": len(self)}

    @property
    def notes(self) -> Sequence[str]:
        return self.source.notes

    @property
    def lengths(self) -> np.ndarray | None:
        sizes = self.source.lengths
        return None if sizes is None else sizes[self.indices]

    @property
    def record_ids(self) -> np.ndarray:
        return self.source.record_ids[self.indices]

    @property
    def group_ids(self) -> np.ndarray:
        return self.source.group_ids[self.indices]

    def metadata(self, index: int) -> Mapping[str, Any]:
        return self.source.metadata(int(self.indices[index]))

    def class_counts(self, indices: np.ndarray) -> Mapping[str, int]:
        return self.source.class_counts(self.indices[indices])

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]
