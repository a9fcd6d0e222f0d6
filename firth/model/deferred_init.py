"""Build a model without memory for its weights, and initialize it later one weight at a time, with the same numbers.

A constructor runs on the meta device while every operation on its tensors is recorded. `Recorded.replay` runs the operations
on the CPU in the same order, so that they take the same random numbers, and gives each weight to the caller as soon as its last
operation is done. A value that a later operation overwrites is not kept. So at most a few weights exist at a time, and the
caller can keep a shard of each (`firth.training.sharding`).

>>> from torch import nn
>>> with record_init() as record:
...     model = nn.Linear(3, 2)
>>> weights = {}
>>> _ = torch.manual_seed(0)
>>> record.bind(model)
>>> record.replay(lambda name, tensor: weights.update({name: tensor}))
>>> _ = torch.manual_seed(0)
>>> torch.equal(weights["weight"], nn.Linear(3, 2).weight)
True
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

OVERWRITES = frozenset({"normal_", "uniform_", "zero_", "fill_", "random_"})
"""Operations that set a whole tensor without reading it."""


@dataclass(frozen=True)
class _Operation:
    function: Any
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    result: Any

    @property
    def name(self) -> str:
        return str(self.function.overloadpacket.__name__)

    def storages(self) -> set[int]:
        """Return the storages that the operation reads or writes."""
        values = tree_leaves((self.arguments, self.options, self.result))
        return {_storage(x) for x in values if isinstance(x, Tensor) and x.is_meta}

    def overwrites(self, storage: int) -> bool:
        """Return whether the operation replaces all numbers of a storage."""
        if self.name not in OVERWRITES:
            return False
        x: Tensor = self.arguments[0]
        return _storage(x) == storage and x.numel() * x.itemsize == x.untyped_storage().nbytes()

    @property
    def is_view(self) -> bool:
        """Whether the result is another tensor on the storage of an argument."""
        results = [x for x in tree_leaves(self.result) if isinstance(x, Tensor)]
        given = {_storage(x) for x in tree_leaves(self.arguments) if isinstance(x, Tensor) and x.is_meta}
        return not self.name.endswith("_") and bool(results) and all(_storage(x) in given for x in results)


class Recorded(TorchDispatchMode):
    """The operations of a constructor, in their order.

    Attributes:
        operations: The operations.
        forks: Index of an operation -> "fork" or "join" for each of `fork_rng` that comes before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[_Operation] = []
        self.forks: dict[int, list[str]] = defaultdict(list)
        self.names: dict[int, str] = {}
        self.tensors: dict[str, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = kwargs or {}
        result = func(*args, **options)
        if any(isinstance(x, Tensor) and x.is_meta for x in tree_leaves((args, result))):
            self.operations.append(_Operation(func, args, options, result))
        return result

    def bind(self, model: nn.Module) -> None:
        """Set the weights and buffers that `replay` initializes: those of the constructed model that are on the meta device.

        Called before the model is changed. A shared weight has its first name.
        """
        named = [(name, x.detach()) for name, x in (*model.named_parameters(), *model.named_buffers()) if x.is_meta]
        self.names, self.tensors = {_storage(x): name for name, x in named}, dict(named)

    @torch.no_grad()
    def replay(self, done: Callable[[str, Tensor], None]) -> None:
        """Run the operations on the CPU, and call `done` with the name and the numbers of each weight and buffer.

        Args:
            done: Receives each tensor once. It must copy what it keeps.
        """
        names = dict(self.names)
        steps: dict[int, list[int]] = defaultdict(list)
        for number, operation in enumerate(self.operations):
            for storage in operation.storages():
                steps[storage].append(number)
        real: dict[int, Tensor] = {}
        states: list[Tensor] = []
        for number, operation in enumerate(self.operations):
            self._fork(number, states)
            if not operation.is_view:
                _run(operation, real)
            for storage in operation.storages():
                steps[storage].pop(0)
                if not steps[storage] and storage in names:
                    name = names.pop(storage)
                    done(name, _as(real[storage], self.tensors[name]))
                if not steps[storage] or self.operations[steps[storage][0]].overwrites(storage):
                    real.pop(storage, None)
        self._fork(len(self.operations), states)
        if names:
            raise RuntimeError(f"the initialization of {sorted(names.values())} was not recorded")

    def _fork(self, number: int, states: list[Tensor]) -> None:
        """Save or restore the random state where the constructor did so before an operation."""
        for fork in self.forks[number]:
            if fork == "fork":
                states.append(torch.get_rng_state())
            else:
                torch.set_rng_state(states.pop())


@contextmanager
def fork_rng() -> Iterator[None]:
    """Restore the random state of the CPU after a part of a constructor, also when it is recorded and replayed."""
    mode = _get_current_dispatch_mode()
    if not isinstance(mode, Recorded):
        with torch.random.fork_rng(devices=[]):
            yield
        return
    mode.forks[len(mode.operations)].append("fork")
    yield
    mode.forks[len(mode.operations)].append("join")


@contextmanager
def record_init() -> Iterator[Recorded]:
    """Construct modules on the meta device and record how their tensors are initialized."""
    record = Recorded()
    with torch.device("meta"), record:
        yield record


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


def _as(flat: Tensor, like: Tensor) -> Tensor:
    """Return the numbers of a storage in the shape of one of its tensors."""
    return torch.as_strided(flat, like.size(), like.stride(), like.storage_offset())


def _run(operation: _Operation, real: dict[int, Tensor]) -> None:
    """Run an operation on the CPU; `real` has the numbers of each storage."""

    def given(x: Any) -> Any:
        if isinstance(x, torch.device):
            return torch.device("cpu")
        if not isinstance(x, Tensor) or not x.is_meta:
            return x
        storage = _storage(x)
        if storage not in real:
            real[storage] = torch.empty(x.untyped_storage().nbytes() // x.itemsize, dtype=x.dtype, device="cpu")
        return _as(real[storage], x)

    arguments, options = tree_map(given, operation.arguments), tree_map(given, operation.options)
    result = operation.function(*arguments, **options)
    for meta, x in zip(tree_leaves(operation.result), tree_leaves(result), strict=True):
        if isinstance(meta, Tensor) and meta.is_meta and _storage(meta) not in real:
            real[_storage(meta)] = x.contiguous().view(-1)
