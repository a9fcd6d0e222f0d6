"""The words every room shares: what an example and a batch are, three constants, and the error a user sees.

An `Example` is one thing to learn from: NumPy arrays by field name, the last axis is tokens. A `Batch` is
many of them stacked, packed or padded by field name, as tensors. Nothing here imports torch: `firth --help`
and everything in `firth.text` must start without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Example = dict[str, Any]
"""One example: NumPy arrays by field name; the last axis is tokens, the others are free."""

if TYPE_CHECKING:
    Batch = dict[str, torch.Tensor]
    Outputs = dict[str, torch.Tensor]
else:
    Batch = dict
    Outputs = dict

LogLine = Callable[[str], None]
"""A function that prints one line for the user, such as `print`."""

IGNORE = -100
"""The label of a position where nothing is asked (torch's own `ignore_index`)."""

NEVER = 1 << 30
"""The moment that never comes: a token that `key_time` NEVER is seen by no position (padding, query slots)."""


ALWAYS = 1 - NEVER
"""The moment before all moments: what stands before a row is there from the start."""


class UserError(Exception):
    """A mistake that a user can mend: one sentence with the file, the line, what was wrong and what to do.

    The command line prints the sentence alone and exits with 2; a library caller catches this one type.
    """
