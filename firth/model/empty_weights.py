"""Modules on the meta device, to know the names and sizes of their tensors or to be filled from a file.

>>> from torch import nn
>>> with init_empty_weights():
...     matrix = nn.Linear(1_000_000, 1_000_000).weight
>>> matrix.device.type, tuple(matrix.shape)
('meta', (1000000, 1000000))
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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
