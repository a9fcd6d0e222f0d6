"""Modules that hold nothing, to know their tensors' names and sizes, or to be filled from a file.

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
    """Leaves out what fills a tensor: of no use here, and 1.5 ms for each matrix that is normally distributed."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ in FILLS:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


@contextmanager
def init_empty_weights() -> Iterator[None]:
    """Make modules on the meta device, unfilled."""
    with torch.device("meta"), _Unfilled():
        yield
