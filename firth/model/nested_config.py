"""Nested dataclasses as dicts, and their fields by dotted names.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Norm:
...     eps: float = 1e-5
>>> @dataclass(frozen=True)
... class Block:
...     width: int
...     norm: Norm = Norm()
>>> block = from_dict(Block, {"width": 8, "norm": {"eps": 1e-6}})
>>> flat_fields(block)
{'width': 8, 'norm.eps': 1e-06}
>>> with_fields(block, {"width": 4, "norm.eps": 0.1})
Block(width=4, norm=Norm(eps=0.1))
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any

from firth.types import UserError


def from_dict(kind: Any, data: Mapping[str, Any], prefix: str = "") -> Any:
    """Build a dataclass from nested dicts; a field with a dataclass as its default is built from a dict of its own.

    Args:
        kind: The dataclass.
        data: Field -> value, nested as `dataclasses.asdict` nests them.
        prefix: Names of the parents and a dot, for messages.

    Raises:
        UserError: A field is unknown, or a dataclass rejects its fields.
        TypeError: A required field is missing, or a nested dataclass is not a dict.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"model.{prefix[:-1]} is {data!r:.40}, not a mapping of fields")
    defaults = {field.name: field.default for field in fields(kind)}
    values = {}
    for name, value in data.items():
        if name not in defaults:
            raise UserError(f"unknown model config field {prefix + name!r}: another version of firth wrote it")
        default: Any = defaults[name]
        values[name] = from_dict(type(default), value, f"{prefix}{name}.") if is_dataclass(default) else value
    return kind(**values)


def flat_fields(config: Any, prefix: str = "") -> dict[str, Any]:
    """Return the dotted name -> value of every field, nested dataclasses expanded."""
    found = {}
    for field in fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        found.update(flat_fields(value, f"{name}.") if is_dataclass(value) else {name: value})
    return found


def with_fields(config: Any, values: Mapping[str, Any]) -> Any:
    """Return a copy of a dataclass with fields set by their dotted names."""
    changed: dict[str, Any] = {name: value for name, value in values.items() if "." not in name}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in values.items():
        group, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(group, {})[rest] = value
    for group, those in inner.items():
        changed[group] = with_fields(changed.get(group, getattr(config, group)), those)
    return replace(config, **changed)
