"""Types that all packages share: Example, Batch, constants, the facts that objectives declare, the logger, and the user error.

Nothing here imports torch at run time: `firth --help` and `firth.tokenizer` must start without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

VERSION = "0.1.0"
"""Version of firth."""

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


ALL_DOCUMENTS = -1
"""Document id of a key that all documents of its row attend to: a trained prefix (`firth.model.prefix`)."""

ALWAYS = 1 - NEVER
"""A time before all others: a token with `key_time` ALWAYS is visible from the start of a row."""


PRECOMPUTED_FIELDS = frozenset({"reference", "old", "values", "advantage"})
"""Example fields that a model computed once, without dropout, and that a loss compares with the model in training. An
objective that reads one trains without dropout too: two passes of the same weights must agree."""


def host_copy(x: torch.Tensor) -> torch.Tensor:
    """Return the copy of a tensor in main memory that was noted with it, else the tensor itself.

    Shapes that depend on numbers are computed from it, so that an accelerator is not waited for.
    """
    return getattr(x, "host_copy", x)


def with_host_copy(x: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
    """Note the copy of a tensor in main memory; operations on the tensor do not pass it on."""
    x.host_copy = copy  # type: ignore[attr-defined]
    return x


def on_both(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return a function of a tensor, and note that of its copy in main memory, if it has one."""
    copy = host_copy(x)
    return function(x) if copy is x else with_host_copy(function(x), function(copy))


@dataclass(frozen=True)
class DataStats:
    """Statistics of the training data that configure an objective.

    Args:
        class_names: Names of the classes.
        class_counts: Number of examples of each class.
        mean: Mean of the numeric labels.
        std: Standard deviation of the numeric labels.
        max_options: Largest number of options of a question, or of answers in a ranking.
        has_unanswerable: Whether some question has no answer.
        max_answer_tokens: Most tokens of a sampled answer.
    """

    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    max_options: int = 0
    has_unanswerable: bool = False
    max_answer_tokens: int = 0


@dataclass(frozen=True)
class Metric:
    """A further number that an objective logs.

    Args:
        field: The batch field whose labels count it: `loss` returns a sum, and its mean over these labels is logged.
        ratio: In place of a field, the names of two metrics with the same count: the first divided by the second, exact
            for any split of a step into micro-batches.
        remark: Returns a full sentence on the last metrics of a run (a collapse), or "".
    """

    field: str = ""
    ratio: tuple[str, str] | None = None
    remark: Callable[[Mapping[str, float]], str] | None = None


@dataclass(frozen=True)
class Constraints:
    """What an objective demands of the batches, the tokenizer and the data of a recipe.

    Args:
        needs_full_batch: The loss of an example depends on the others of the step (in-batch negatives), so a step cannot be
            split into micro-batches or over ranks.
        packable: Several examples may share a row. False for labels of a whole row.
        added_tokens: Tokens that the longest row that is built has beyond the example's.
        num_copies: Fixed versions of each example, which epochs rotate through; 0: a new one at every visit.
        num_sentinels: Number of `<extra_id_n>` tokens of a tokenizer that is trained for it.
        text_units: The units that it finds in a text: "words", "names", "sentences". A run warns where there are none.
        class_names: Names of the classes, in the order of their indices; empty: those of the data, or no classes.
    """

    needs_full_batch: bool = False
    packable: bool = True
    added_tokens: int = 0
    num_copies: int = 0
    num_sentinels: int = 0
    text_units: frozenset[str] = frozenset()
    class_names: tuple[str, ...] = ()

    def __or__(self, other: Constraints) -> Constraints:
        """Return the constraints of two objectives that are added."""
        return Constraints(
            self.needs_full_batch or other.needs_full_batch,
            self.packable and other.packable,
            max(self.added_tokens, other.added_tokens),
            max(self.num_copies, other.num_copies),
            max(self.num_sentinels, other.num_sentinels),
            self.text_units | other.text_units,
            self.class_names or other.class_names,
        )


class RankGroup(Protocol):
    """The ranks of a run, as far as data needs them (`firth.training.distributed.Ranks`)."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    def gather_arrays(self, x: np.ndarray) -> list[np.ndarray]: ...

    def errors(self, error: Exception | None) -> list[str]: ...


class UserError(Exception):
    """An error that the user can fix: one sentence with the file, the line, what was wrong and what to do.

    The command line prints the sentence alone and exits with 2; a library caller can catch this one type.
    """
