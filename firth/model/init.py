"""Initialization of a whole model: empty on the meta device, one weight at a time, with label frequencies, with rows for new tokens.

`init_empty_weights` makes modules on the meta device, to know the names and sizes of their tensors or to be filled from a
file.

>>> from torch import nn
>>> with init_empty_weights():
...     matrix = nn.Linear(1_000_000, 1_000_000).weight
>>> matrix.device.type, tuple(matrix.shape)
('meta', (1000000, 1000000))

`init_head_from_frequencies` makes an untrained model predict the label frequencies. The first steps of a run learn only
which tokens are frequent: the loss falls from log(vocab_size), 9.0 nats for 8,192 tokens, to the entropy of single tokens,
6.4. Counting the labels gives as much before the first step.

    a head with a bias per token (BERT)        the bias is the log frequencies
    an untied head without (NanoChat, T5 1.1)  one number of every token's embedding is set to the same value; it passes
                                               blocks that start as the identity, and the head's column for it holds
                                               the log frequencies, as a bias would
    anything else (GPT-2's tied head)          nothing is done: a bias is not possible

>>> from firth.model.heads import LMHead
>>> from firth.model.config import decoder_config
>>> config = decoder_config(vocab_size=50, hidden_size=384, num_layers=1)
>>> _ = torch.manual_seed(0)
>>> model = LM(config, {"lm": LMHead(config)})
>>> counts = torch.arange(50.0)
>>> init_head_from_frequencies(model, counts, lambda: model({"tokens": torch.arange(50)[None]})[0])
True
>>> p = model.heads["lm"](model({"tokens": torch.tensor([[3]])})).softmax(-1)[0, 0]
>>> bool((p - (counts + 1) / (counts + 1).sum()).abs().max() < 2e-3)
True

`record_init` builds a model without memory for its weights, which are initialized later one at a time, with the same numbers. A
constructor runs on the meta device while every operation on its tensors is recorded. `Recorded.replay` runs the operations
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

`extend_vocab` gives a model rows for the tokens that were added to its tokenizer. The embedding of a new token is the mean of those
of the old tokens that its text had before, and so are its row and its bias in the LM head: the model begins near what it knew. A
character that was unknown is drawn from the distribution of the table (Hewitt 2021).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves, tree_map

from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.shard_tensors import assign, gathered, is_sharded
from firth.types import UserError

FILLS = ("normal_", "uniform_", "kaiming_uniform_", "zeros_", "ones_", "zero_", "fill_")


class _Unfilled(TorchFunctionMode):
    """Skips functions that initialize a tensor, which take 1.5 ms for each normally distributed matrix."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ in FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def init_empty_weights() -> Iterator[None]:
    """Create modules on the meta device, without initialization."""
    with torch.device("meta"), _Unfilled():
        yield


CONSTANT_SHARE = 0.5
"""The shared number, as a share of the root mean square length of the other numbers (docs/decisions/index.md)."""

MIN_MEAN_TO_STD = 4.0
"""Least ratio of mean to standard deviation of that number at the head, for it to serve as a constant."""


@torch.no_grad()
def init_head_from_frequencies(model: LM, counts: Tensor, read: Callable[[], Tensor]) -> bool:
    """Make an untrained model predict the frequencies of counts + 1.

    Args:
        model: An untrained model with an LM head.
        counts: (vocab_size,) label counts.
        read: Runs the model on some examples and returns the hidden states at supervised positions, (N, hidden_size).

    Returns:
        Whether the head could be initialized.
    """
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    counts = counts.to(head.weight.device, head.weight.dtype) + 1
    offsets = (counts / counts.sum()).log()
    offsets -= (offsets.max() + offsets.min()) / 2  # as small as possible: softmax ignores a shift, a soft cap does not
    if head.softcap:
        offsets = head.softcap * torch.atanh(offsets / head.softcap)
    if head.bias is not None:
        assign(head.bias, offsets)
        return True
    table = model.tokens.weight
    if table is head.weight or head.dense is not None:
        return False
    whole = gathered(table.detach())
    before = whole[:, 0].clone()
    _assign_first_column(table, whole, CONSTANT_SHARE * whole[:, 1:].square().sum(-1).mean().sqrt())
    shared = read()[:, 0].float() * head.scale
    if not shared.mean() > MIN_MEAN_TO_STD * shared.std():
        _assign_first_column(table, whole, before)
        return False
    _assign_first_column(head.weight, gathered(head.weight.detach()), offsets / shared.mean())
    return True


def _assign_first_column(weight: Tensor, whole: Tensor, column: Tensor) -> None:
    """Set the first column of a weight, given the whole of it: they are the same memory unless the weight is sharded."""
    whole[:, 0] = column
    if is_sharded(weight):
        assign(weight, whole)


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


@torch.no_grad()
def extend_vocab(model: LM, first: int, old_tokens: Sequence[Sequence[int]]) -> None:
    """Add the rows of new tokens to the token embeddings and the LM head of a model, in place.

    Args:
        model: The model.
        first: The id of the first new token: the size of the old tokenizer, which may be smaller than the table.
        old_tokens: For each new token, the old ids of its text; empty for an unknown character.

    Raises:
        UserError: The model has no token embeddings, or heads that are models with tables of their own.
    """
    if model.config.embedding.characters.max_length or model.submodels():
        raise UserError(
            "tokenizer.extend adds rows to one table of token embeddings, which this start model has not: leave it out"
        )
    size = max(model.config.vocab_size, first + len(old_tokens))
    model.config = replace(model.config, vocab_size=size)
    lm: Any = dict(model.heads.items()).get("lm")
    tied = lm is not None and lm.weight is model.tokens.weight
    model.tokens.weight = nn.Parameter(_grown(model.tokens.weight, size, first, old_tokens))
    model.tokens.num_embeddings = size
    if lm is None:
        return
    lm.config = replace(lm.config, vocab_size=size)
    if not tied:
        lm.weight = nn.Parameter(_grown(lm.weight, size, first, old_tokens))
    if lm.bias is not None:
        lm.bias = nn.Parameter(_grown(lm.bias, size, first, old_tokens))
    model.tie()


def _grown(rows: Tensor, size: int, first: int, old_tokens: Sequence[Sequence[int]]) -> Tensor:
    """Return a table (size, ...) with the old rows below `first` and the mean of old rows for each new one."""
    old = rows.detach()[:first]
    grown = rows.new_zeros(size, *rows.shape[1:])
    grown[: len(rows)] = rows
    generator = torch.Generator().manual_seed(0)
    mean, spread = old.mean(0), old.std(0)
    for i, parts in enumerate(old_tokens):
        drawn = mean + spread * torch.randn(mean.shape, generator=generator)
        grown[first + i] = old[list(parts)].mean(0) if len(parts) else drawn
    return grown
