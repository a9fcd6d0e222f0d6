"""Types of configuration fields, and the base class whose fields pydantic checks.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Batch(Validated, section="batch"):
...     size: PositiveInt = 16
>>> Batch(size=0)
Traceback (most recent call last):
...
firth.types.UserError: batch.size=0 should be greater than or equal to 1
>>> Batch(size="8")
Traceback (most recent call last):
...
firth.types.UserError: batch.size='8' should be a valid integer
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Interval

from firth.types import NEVER, UserError

if TYPE_CHECKING:
    from pydantic import TypeAdapter

MAX_INT = (1 << 63) - 1
"""The largest integer that NumPy and torch can represent."""
MAX_TOKENS = NEVER - 1
"""Maximum tokens of a row: a later position could not be distinguished from padding."""

PositiveInt = Annotated[int, Interval(ge=1, le=MAX_INT)]
NonNegativeInt = Annotated[int, Interval(ge=0, le=MAX_INT)]
TokenCount = Annotated[int, Interval(ge=1, le=MAX_TOKENS)]
OptionalTokenCount = Annotated[int, Interval(ge=0, le=MAX_TOKENS)]
Port = Annotated[int, Interval(ge=0, le=65535)]
AnswerCount = Annotated[int, Interval(ge=2, le=9)]
VocabSize = Annotated[int, Interval(ge=1, lt=1 << 31)]
PositiveFloat = Annotated[float, Interval(gt=0)]
NonNegativeFloat = Annotated[float, Interval(ge=0)]
Share = Annotated[float, Interval(ge=0, le=1)]
"""A fraction from 0 to 1."""
ShareBelowOne = Annotated[float, Interval(ge=0, lt=1)]
"""A fraction of at least 0 and below 1: dropout, label smoothing, held-out documents."""
ShareAboveZero = Annotated[float, Interval(gt=0, le=1)]
OpenShare = Annotated[float, Interval(gt=0, lt=1)]
"""A fraction above 0 and below 1: masked tokens."""

PathKind = Literal["files", "task", "model", "tokenizer", "place"]
"""What a path in a recipe names: input files, a task file, a model or adapter directory, a tokenizer, or an output directory ("place")."""

CONFIG: Any = {"strict": True, "allow_inf_nan": False, "arbitrary_types_allowed": True}
"""pydantic's configuration: nothing is converted, except an int to a float."""


def path_field(kind: PathKind, default: Any) -> Any:
    """Declare a dataclass field that holds one or several paths (`firth.runs.config_io.paths`)."""
    return dataclasses.field(default=default, metadata={"path": kind})


class Validated:
    """Base class of frozen dataclasses whose fields are checked on construction.

    The annotation of a field is its schema: `Annotated[int, Interval(ge=1)]`, `Literal["a", "b"]`, `tuple[str, ...]`. A bool is
    no int, a text no number, and NaN and infinity are rejected. A list is accepted for a tuple, and so is a single item.

    Args:
        section: The field of a recipe that contains such an instance, used in messages.

    Raises:
        UserError: A field is invalid; the message names all such fields.
    """

    _section: ClassVar[str] = ""

    def __init_subclass__(cls, section: str | None = None) -> None:
        super().__init_subclass__()
        if section is not None:
            cls._section = section

    def __post_init__(self) -> None:
        values, errors = check_fields(type(self), vars(self))
        if errors:
            prefix = self._section and f"{self._section}."
            raise UserError("; ".join(f"{prefix}{name}{reason}" for name, reason in errors))
        for name, value in values.items():
            if value is not getattr(self, name):  # a list or an int, where the field holds a tuple or a float
                object.__setattr__(self, name, value)

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """Return the schema of a field that holds such an instance, which its own construction has checked."""
        from pydantic_core import core_schema

        return core_schema.is_instance_schema(cls)


def check_fields(kind: type, values: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Check the fields of a dataclass.

    Args:
        kind: The dataclass.
        values: Field -> value; fields may be missing, and other names are ignored.

    Returns:
        The values with the types of the fields, and the errors: pairs (field, "=0 should be ..."). One of them is empty.
    """
    return _check(values, _adapter(kind))


def check_value(name: str, value: Any, hint: Any) -> None:
    """Check a single value, such as that of a command-line option.

    Raises:
        UserError: It does not fit the type.
    """
    _, errors = _check({name: value}, _adapter_of({name: hint}))
    for _, reason in errors:
        raise UserError(name + reason)


@functools.cache
def _adapter(kind: type) -> TypeAdapter[dict[str, Any]]:
    """Return what checks a dict of the fields of a dataclass."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return _adapter_of({field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init})


def _adapter_of(hints: Mapping[str, Any]) -> TypeAdapter[dict[str, Any]]:
    from pydantic import TypeAdapter  # here, so that `firth --help` does not import it
    from typing_extensions import TypedDict

    make: Any = TypedDict  # its fields are not known to a type checker
    fields = make("fields", {name: _accept_list(hint) for name, hint in hints.items()}, total=False)
    fields.__pydantic_config__ = CONFIG
    return TypeAdapter(fields)


def _accept_list(hint: Any) -> Any:
    """Return a type that takes a list for a tuple, and a single item for a tuple of one: `path: mine/`."""
    from pydantic import BeforeValidator

    origins = [typing.get_origin(one) for one in (hint, *typing.get_args(hint))]

    def as_tuple(value: Any) -> Any:
        if isinstance(value, list):
            return tuple(value)
        return value if isinstance(value, tuple) or origins[0] is not tuple else (value,)

    return Annotated[hint, BeforeValidator(as_tuple)] if tuple in origins else hint


def _check(
    values: dict[str, Any], adapter: TypeAdapter[dict[str, Any]]
) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    from pydantic import ValidationError

    try:
        return adapter.validate_python(values), []
    except ValidationError as error:
        reasons: dict[str, list[str]] = {}
        for one in error.errors(include_url=False, include_context=False, include_input=False):
            reason = one["msg"].removeprefix("Input should be ").replace("a valid tuple", "a list")
            reasons.setdefault(str(one["loc"][0]), []).append(reason)
    # The options of a union have one reason each.
    return {}, [
        (name, f"={_written(values[name])} should be {' or '.join(dict.fromkeys(found))}")
        for name, found in reasons.items()
    ]


def _written(value: Any) -> str:
    """Return a value as Python writes it; a long one is shortened."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 40 else f"{text[:20]}... ({len(text)} characters)"
