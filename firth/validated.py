"""Ranges of numbers: part of the type of a field or of a command-line option, and checked where a value enters.

>>> @dataclass(frozen=True)
... class Batch(Ranged, section="batch"):
...     rows: PositiveInt = 16
>>> Batch(rows=0)
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
"""The largest whole number that NumPy and torch hold; every range ends there at the latest."""


@dataclass(frozen=True)
class Range:
    """The values that a number may take; NaN and infinity are never among them.

    Args:
        ge: The least value.
        gt: A bound that every value exceeds.
        le: The greatest value.
        lt: A bound that every value falls short of.

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
        named = (("at least", self.ge), ("above", self.gt), ("at most", self.le), ("below", self.lt))
        return " and ".join(f"{words} {bound}" for words, bound in named if bound is not None) or "finite"


MAX_TOKENS = NEVER - 1
"""Tokens of a row at most: a later position could not be told from padding."""

PositiveInt = Annotated[int, Range(ge=1)]
NonNegativeInt = Annotated[int, Range(ge=0)]
TokenCount = Annotated[int, Range(ge=1, le=MAX_TOKENS)]
OptionalTokenCount = Annotated[int, Range(ge=0, le=MAX_TOKENS)]
PositiveFloat = Annotated[float, Range(gt=0)]
NonNegativeFloat = Annotated[float, Range(ge=0)]
FiniteFloat = Annotated[float, Range()]
Share = Annotated[float, Range(ge=0, le=1)]
"""A share from none to all."""
ShareBelowOne = Annotated[float, Range(ge=0, lt=1)]
"""A share from none to nearly all: of dropout, of label smoothing, of held-out documents."""
ShareAboveZero = Annotated[float, Range(gt=0, le=1)]
OpenShare = Annotated[float, Range(gt=0, lt=1)]
"""A share that is neither none nor all: of the tokens that are masked."""


def range_of(hint: Any) -> Range | None:
    """Return the range in an annotation: that of its number, of a tuple's numbers, or of a union's; None without one."""
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
    """Check a number, or each number of a tuple; other values are left alone.

    Args:
        name: What the message calls the value, with the place it comes from.
        value: The value of a field or option.
        allowed: Its range.

    Raises:
        UserError: A number is outside of the range.
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
    """Return a value as a recipe writes it; a number of many digits in short."""
    text = str(list(value)) if isinstance(value, tuple | list) else str(value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"


@functools.cache
def ranges(kind: type) -> Mapping[str, Range]:
    """Return the range of each numeric field of a dataclass that has one."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {f.name: range_of(hints[f.name]) for f in dataclasses.fields(kind)}
    return {name: allowed for name, allowed in found.items() if allowed is not None}


class Ranged:
    """Base of dataclasses whose numbers have ranges; an instance with a number outside of its range cannot be made.

    Args:
        section: The field of a recipe that holds such an instance: what messages name the number by.

    Raises:
        UserError: A number is outside of its range.
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
