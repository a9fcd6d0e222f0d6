"""Computations in slices: generators that yield between two forward passes, so that a server can do something else there.

>>> def work():
...     total = 0
...     for part in (1, 2, 3):
...         total += part
...         yield
...     return total
>>> finish(work())
6
"""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import torch
from torch import Tensor

from firth.model.forward_context import ForwardContext
from firth.model.kv_cache import KVCache
from firth.model.model import LM
from firth.types import Batch

T = TypeVar("T")
U = TypeVar("U")
Slices = Generator[None, None, T]
"""A computation in slices: it yields after each and returns its result."""


def finish(job: Slices[T]) -> T:
    """Run a computation to its end and return its result."""
    while True:
        try:
            next(job)
        except StopIteration as end:
            result: T = end.value
            return result


def yielding(value: U, job: Slices[T]) -> Generator[U, None, T]:
    """Run a computation, yield `value` after each slice, and return its result."""
    while True:
        try:
            next(job)
        except StopIteration as end:
            result: T = end.value
            return result
        yield value


def can_read_in_chunks(model: LM) -> bool:
    """Return whether a model can read a text in chunks: a causal decoder, whose states do not depend on later tokens."""
    config = model.config
    return config.causal and not (config.attention.linformer.k or config.encoder.num_layers)


def read_in_chunks(
    model: LM, batch: Batch, max_tokens: int, needed: Tensor | None = None, cache: KVCache | None = None
) -> Slices[Tensor]:
    """Run a causal decoder on one row (1, T), at most `max_tokens` at a time; return its hidden states (1, T, hidden_size).

    Args:
        model: The model.
        batch: The fields of the row, with `positions`.
        max_tokens: Most tokens of a forward pass.
        needed: (1, T) bool, the states that will be read; None for all.
        cache: Earlier tokens of the row, with room for these; None for none.
    """
    length = batch["tokens"].shape[-1]
    cache = model.make_cache(1, length) if cache is None else cache
    states = []
    for start in range(0, length, max_tokens):
        stop = min(length, start + max_tokens)
        some = {name: field[:, start:stop] for name, field in batch.items()}
        wanted = None if needed is None else needed[:, start:stop]
        states.append(model(some, ForwardContext(cache, needed_positions=wanted)))
        if stop < length:
            yield
    return torch.cat(states, 1)
