"""Ranges of numbers, as part of the type of a field or of a command-line option, checked where a value enters.

>>> @dataclass(frozen=True)
... class Batch(Ranged, section="batch"):
...     size: PositiveInt = 16
>>> Batch(size=0)
Traceback (most recent call last):
...
firth.types.UserError: batch.size=0 must be at least 1
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from firth.types import NEVER, UserError

MAX_INT = (1 << 63) - 1
"""The largest integer that NumPy and torch can represent; the upper bound of every range."""


@dataclass(frozen=True)
class Range:
    """The values that a number may take, except NaN and infinity.

    Args:
        ge: Minimum.
        gt: Exclusive lower bound.
        le: Maximum.
        lt: Exclusive upper bound.

    >>> str(Range(ge=1)), str(Range(gt=0, le=1)), str(Range()), Range(gt=0).holds(math.nan)
    ('at least 1', 'above 0 and at most 1', 'finite', False)
    """

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None

    def holds(self, value: Any) -> bool:
        """Return whether a value is in the range."""
        return (
            (math.isfinite(value) if isinstance(value, float) else -MAX_INT <= value <= MAX_INT)
            and (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )

    def __str__(self) -> str:
        bounds = (("at least", self.ge), ("above", self.gt), ("at most", self.le), ("below", self.lt))
        return " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None) or "finite"


MAX_TOKENS = NEVER - 1
"""Maximum tokens of a row: a later position could not be distinguished from padding."""

PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
TokenCount = Annotated[int, Range(ge=1, le=MAX_TOKENS)]
OptionalTokenCount = Annotated[int, Range(ge=0, le=MAX_TOKENS)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
FiniteFloat = Annotated[float, Range()]
Share = Annotated[float, Range(ge=0, le=1)]
"""A fraction from 0 to 1."""
ShareBelowOne = Annotated[float, Range(ge=0, lt=1)]
"""A fraction of at least 0 and below 1: dropout, label smoothing, held-out documents."""
ShareAboveZero = Annotated[float, Range(gt=0, le=1)]
OpenShare = Annotated[float, Range(gt=0, lt=1)]
"""A fraction above 0 and below 1: masked tokens."""


def range_of(hint: Any) -> Range | None:
    """Return the range in an annotation (of a number, of the numbers of a tuple, or of a union); None without one."""
    if typing.get_origin(hint) is Annotated:
        return next((one for one in hint.__metadata__ if isinstance(one, Range)), None)
    return next((found for inner in typing.get_args(hint) if (found := range_of(inner)) is not None), None)


def is_numeric(hint: Any) -> bool:
    """Return whether an annotation admits an int or a float.

    >>> is_numeric(tuple[float, ...]), is_numeric(int | None), is_numeric(bool), is_numeric(typing.Literal[1])
    (True, True, False, False)
    """
    if typing.get_origin(hint) is typing.Literal:
        return False
    return hint in (int, float) or any(is_numeric(inner) for inner in typing.get_args(hint))


def check_range(name: str, value: Any, allowed: Range) -> None:
    """Check a number, or each number of a tuple; other values pass.

    Args:
        name: The name of the value in the message.
        value: The value of a field or option.
        allowed: Its range.

    Raises:
        UserError: A number is out of range.
    """
    for number in _numbers(value):
        if not allowed.holds(number):
            described = str(allowed)
            if isinstance(number, float) and not math.isfinite(number):
                described = "finite" if allowed == Range() else f"finite, {described}"
            elif number > MAX_INT and allowed.le is None and allowed.lt is None:
                described += f" and at most {MAX_INT}"
            raise UserError(f"{name}={_written(value)} must be {described}")


def _numbers(value: Any) -> Iterator[Any]:
    if isinstance(value, tuple | list):
        for one in value:
            yield from _numbers(one)
    elif isinstance(value, numbers.Real):
        yield value


def _written(value: Any) -> str:
    """Return a value as a recipe writes it; a long one is shortened."""
    text = str(list(value)) if isinstance(value, tuple | list) else str(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


@functools.cache
def ranges(kind: type) -> Mapping[str, Range]:
    """Return field -> range of the numeric fields of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {f.name: range_of(hints[f.name]) for f in dataclasses.fields(kind)}
    return {name: allowed for name, allowed in found.items() if allowed is not None}


class Ranged:
    """Base class of dataclasses whose numbers are checked against their ranges on construction.

    Args:
        section: The field of a recipe that contains such an instance, used in messages.

    Raises:
        UserError: A number is out of range.
    """

    _section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str | None = None) -> None:
        super().__init_subclass__()
        if section is not None:
            cls._section = section

    def __post_init__(self) -> None:
        kind: Any = type(self)
        prefix = self._section and f"{self._section}."
        for name, allowed in ranges(kind).items():
            check_range(f"{prefix}{name}", getattr(self, name), allowed)
