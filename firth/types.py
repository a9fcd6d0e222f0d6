"""Types that all packages share: Example, Batch, constants, the logger, and the error for users.

Nothing here imports torch at run time: `firth --help` and `firth.tokenizer` must start without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

Example = dict[str, Any]
"""One training example: NumPy arrays by field name; the last axis is tokens."""

if TYPE_CHECKING:
    Batch = dict[str, torch.Tensor]
    Outputs = dict[str, torch.Tensor]
else:
    Batch = dict
    Outputs = dict

LogLine = Callable[[str], None]
"""A function that prints one line for the user, such as `print`."""

LOGGER = logging.getLogger("firth")
"""Python's logger of all messages: INFO for progress and notes, WARNING for what the user should look at."""

IGNORE = -100
"""Label of a position without a loss (torch's `ignore_index`)."""

NEVER = 1 << 30
"""A time after all others: a token with `key_time` NEVER is visible to no position (padding, query slots)."""


ALWAYS = 1 - NEVER
"""A time before all others: a token with `key_time` ALWAYS is visible from the start of a row."""


class UserError(Exception):
    """An error that the user can fix: one sentence with the file, the line, what was wrong and what to do.

    The command line prints the sentence alone and exits with 2; a library caller can catch this one type.
    """
