"""The fields of a recipe with type, value, default and meaning, read from the classes: `firth show` and the reference pages."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from annotated_types import Interval

from firth.fields import MAX_INT
from firth.objectives.objective import Objective, Sum, components
from firth.runs import config_io
from firth.runs.recipe import Recipe


def described(kind: type) -> dict[str, str]:
    """Return the description of each field of a class, from the `Args:` of its docstring and of its bases'."""
    found: dict[str, str] = {}
    for cls in reversed(kind.__mro__):
        text = inspect.cleandoc(cls.__doc__ or "")
        part = text.partition("\nArgs:\n")[2]
        part = re.split(r"\n(?=\S)", part)[0]
        for match in re.finditer(r"^    (\w+): (.*(?:\n {8}.*)*)", part, re.M):
            found[match[1]] = " ".join(match[2].split())
    return found


def default(field: dataclasses.Field[Any]) -> str:
    """Return a field's default as one writes it in a recipe; empty for a section, "required" without one."""
    value = field.default
    if value is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else ""
    if dataclasses.is_dataclass(value):
        return ""
    if isinstance(value, tuple):
        value = list(value)
    return str(
        "null" if value is None else str(value).lower() if isinstance(value, bool) else value if value != "" else '""'
    )


def range_of(limits: Interval) -> str:
    """Return the range of a number in words."""
    bounds = (("at least", limits.ge), ("above", limits.gt), ("at most", limits.le), ("below", limits.lt))
    return " and ".join(f"{words} {bound}" for words, bound in bounds if bound not in (None, MAX_INT))


def kind_of(hint: Any, quote: str = "`") -> str:
    """Return the type of a field in a few words.

    Args:
        hint: The annotation.
        quote: Written around each of several allowed values.
    """
    if typing.get_origin(hint) is typing.Annotated:
        inner, *limits = typing.get_args(hint)
        return ", ".join([kind_of(inner, quote), *map(range_of, limits)])
    if typing.get_origin(hint) is typing.Literal:
        values = (value if value != "" else '""' for value in typing.get_args(hint))
        return ", ".join(f"{quote}{value}{quote}" for value in values)
    options = [one for one in typing.get_args(hint) if one is not type(None)]
    if typing.get_origin(hint) is tuple:
        return f"list of {kind_of(options[0], quote)}"
    if options and typing.get_origin(hint) is not None:
        return " or ".join(kind_of(one, quote) for one in options)
    name = getattr(hint, "__name__", str(hint))
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(name, name)


@dataclass(frozen=True)
class FieldValue:
    """A field of a recipe.

    Args:
        name: Its dotted name, as on the command line.
        kind: Its type in a few words.
        value: Its value as one writes it in a recipe.
        default: Its default, or "required".
        meaning: Its description.
    """

    name: str
    kind: str
    value: str
    default: str
    meaning: str


def fields_of(recipe: Recipe) -> list[FieldValue]:
    """Return every field of a recipe, sections within sections."""
    return list(_fields(recipe, ""))


def _fields(section: Any, prefix: str) -> Iterator[FieldValue]:
    """Yield the fields of a section: first its own, then those of the sections in it."""
    kind = type(section)
    hints, about = typing.get_type_hints(kind, include_extras=True), described(kind)
    inner: list[tuple[Any, str]] = []
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        value, name = getattr(section, field.name), prefix + field.name
        if isinstance(value, Objective):
            inner += _objective_sections(value, name)
        elif dataclasses.is_dataclass(value):
            inner.append((value, name))
        else:
            text = json.dumps(config_io.to_dict(value), ensure_ascii=False, default=str)
            plain = text[1:-1] if isinstance(value, str) and value else text
            yield FieldValue(name, kind_of(hints[field.name], ""), plain, default(field), about.get(field.name, ""))
    for value, name in inner:
        title = summary(type(value))
        registered = [r for base, r in config_io.REGISTRIES.items() if isinstance(value, base)]
        if registered:
            chosen = registered[0].name_of(type(value))
            yield FieldValue(f"{name}.kind", registered[0].name, chosen, "", title)
        yield from _fields(value, f"{name}.")


def _objective_sections(objective: Objective, name: str) -> list[tuple[Objective, str]]:
    """Return the objective, or the parts of a sum with their places in the list."""
    parts = components(objective)
    return [(part, name if not isinstance(objective, Sum) else f"{name}[{i}]") for i, part in enumerate(parts)]


def summary(thing: object) -> str:
    """Return the first paragraph of a docstring in one line."""
    return (inspect.getdoc(thing) or "").split("\n\n")[0].replace("\n", " ")


def table(recipe: Recipe) -> str:
    """Return the fields as text: name and value, then type, default and meaning."""
    lines = []
    for field in fields_of(recipe):
        same = "" if field.default in ("", field.value) else f"; default {field.default}"
        lines += [f"{field.name} = {field.value}", f"    {field.kind}{same}. {field.meaning}".rstrip()]
    return "\n".join(lines)
