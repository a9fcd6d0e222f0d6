"""Read and write trees of frozen dataclasses as YAML or plain dicts: the format of recipes.

A dataclass is its own schema: the annotation of a field is its type. Where a field takes one of several classes, the
annotation is a base class and the YAML names the class by `kind` (`objective: {kind: mlm, mlm_probability: 0.15}`, or
`objective: mlm` where nothing else is set, or a list for a sum: `[nsp, mlm]`). An invalid value or an unknown field raises a
UserError with the field, the file and line, and the nearest existing name.

>>> @dataclass(frozen=True)
... class Batch:
...     rows: int = 16
>>> from_dict(Batch, {"rows": 64})
Batch(rows=64)
>>> from_dict(Batch, {"row": 3})
Traceback (most recent call last):
...
firth.types.UserError: row: there is no field 'row' in Batch; did you mean 'rows'?
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

import yaml

from firth.corpora.readers import is_url
from firth.fields import PathKind, check_fields
from firth.io import user_code, yaml_files
from firth.types import UserError


@dataclass(frozen=True)
class Registry:
    """The classes that a field may hold, by name.

    Args:
        name: What such a class is, for messages: "objective".
        names: Returns the names.
        find: Returns the class of a name.
        name_of: The inverse of `find`.
        exists: Whether there is a class of a name, which may be a user's `module:class` that `names` does not list.
        join: Makes one value of two list items (objectives: a sum).
        split: The inverse of `join`; empty for a value that is not the result of one.
    """

    name: str
    names: Callable[[], Sequence[str]]
    find: Callable[[str], type]
    name_of: Callable[[type], str]
    exists: Callable[[str], bool]
    join: Callable[[Any, Any], Any] | None = None
    split: Callable[[Any], Sequence[Any]] | None = None


def registry_of(name: str, classes: Mapping[str, type], base: type) -> Registry:
    """Return the registry of a dict of classes by name, and of a user's subclasses of `base` by `module:class`."""
    names = {one: key for key, one in classes.items()}
    return Registry(
        name,
        lambda: list(classes),
        lambda key: classes[key] if key in classes else user_code.find_class(key, base, name),
        lambda one: names.get(one, f"{one.__module__}:{one.__qualname__}"),
        lambda key: key in classes or ":" in key,
    )


REGISTRIES: dict[type, Registry] = {}
"""Base class -> the registry of its subclasses; filled by `firth.runs.recipe`."""

SHORT_FORMS: dict[type, str] = {}
"""Class -> the field that a bare value sets: `data: mine.csv` is `data: {path: mine.csv}`.

In a class that is not listed, a bare value sets the field `type`, if there is one: `norm: rms` is `norm: {type: rms}`.
"""


def paths(value: Any, where: str = "") -> Iterator[tuple[str, PathKind, Any]]:
    """Yield the paths that are set in a recipe: (dotted name, kind, value)."""
    for field in dataclasses.fields(value) if _is_data(value) else ():
        one, name = getattr(value, field.name), f"{where}{field.name}"
        if "path" in field.metadata:
            if one:
                yield name, field.metadata["path"], one
        elif isinstance(one, tuple):
            for i, item in enumerate(one):
                yield from paths(item, f"{name}.{i}.")
        else:
            yield from paths(one, f"{name}.")


def without_paths(value: Any) -> Any:
    """Return a copy of a recipe with every path at its default, so that it does not depend on where files are."""
    return _with_paths(value, lambda field, _: field.default)


def absolute_paths(value: Any) -> Any:
    """Return a copy of a recipe with absolute paths; globs and addresses stay what they are."""

    def whole(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if path and not is_url(path) else path

    return _with_paths(value, lambda _, one: whole(one) if isinstance(one, str) else tuple(map(whole, one)))


def with_models(value: Any, find: Callable[[str], str]) -> Any:
    """Return a copy of a recipe in which `find` is applied to every path of a model or a tokenizer."""
    return _with_paths(value, lambda field, one: find(one) if field.metadata["path"] in ("model", "tokenizer") else one)


def _with_paths(value: Any, change: Callable[[dataclasses.Field[Any], Any], Any]) -> Any:
    """Return a copy in which `change` is applied to every path."""
    if not _is_data(value):
        return value
    changed = {}
    for field in dataclasses.fields(value):
        one = getattr(value, field.name)
        if "path" in field.metadata:
            new = change(field, one)
        else:
            new = (
                tuple(_with_paths(item, change) for item in one) if isinstance(one, tuple) else _with_paths(one, change)
            )
        if new is not one and new != one:
            changed[field.name] = new
    return dataclasses.replace(value, **changed) if changed else value


def _is_data(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def difference(first: Any, second: Any, where: str = "") -> str:
    """Return the first difference of two plain trees, such as "batch.size is 16 there and 8 here"; "" if they are equal."""
    if first == second:
        return ""
    if not isinstance(first, Mapping) or not isinstance(second, Mapping):
        return f"{where} is {_short(first)} there and {_short(second)} here"
    names = [name for name in {**first, **second} if first.get(name, ...) != second.get(name, ...)]
    inner = f"{where}.{names[0]}" if where else names[0]
    return difference(first.get(names[0]), second.get(names[0]), inner)


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@dataclass(frozen=True)
class SourceLocation:
    """Where a value of a recipe comes from.

    Args:
        path: The names of the field and its parents; a number is an index into a list.
        lines: Path -> `file:line`, for a recipe from a file.
        command_line: Path -> text, for fields that are set on the command line.
    """

    path: tuple[str, ...] = ()
    lines: Mapping[tuple[str, ...], str] = dataclasses.field(default_factory=dict)
    command_line: Mapping[tuple[str, ...], str] = dataclasses.field(default_factory=dict)

    def __truediv__(self, name: str) -> SourceLocation:
        return SourceLocation((*self.path, name), self.lines, self.command_line)

    def line(self) -> str:
        """Return `file:line` of the field or its nearest parent; empty where the command line sets the field."""
        for n in range(len(self.path), -1, -1):
            if tuple(name for name in self.path[:n] if not name.isdigit()) in self.command_line:
                break
            if self.path[:n] in self.lines:
                return self.lines[self.path[:n]]
        return ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.line(), ".".join(self.path)) if part) or "recipe"


def from_dict(kind: Any, value: Any, where: SourceLocation | None = None) -> Any:
    """Build a value from plain data.

    Args:
        kind: The type: a dataclass, a base class in `REGISTRIES`, one of them or None, or the type of another field.
        value: Dicts, lists and scalars, as YAML has them.
        where: Where the value comes from, for error messages.

    Returns:
        The value; that of another field is checked with the dataclass that holds it.

    Raises:
        UserError: The value does not fit the type; one line for each invalid field, with its file and line.
    """
    where = where or SourceLocation()
    if (item := _item_class(kind)) is not None:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_dataclass(item, one, where / str(i)) for i, one in enumerate(items))
    options = [one for one in (kind, *typing.get_args(kind)) if one in REGISTRIES or dataclasses.is_dataclass(one)]
    if not options or (value is None and options[0] is not kind):
        return _text(value, where.command_line.get(where.path)) if kind is str else value
    if options[0] in REGISTRIES:
        return _choose(REGISTRIES[options[0]], value, where)
    return _dataclass(options[0], value, where)


def _item_class(kind: Any) -> type | None:
    """Return the dataclass of which a field holds a tuple; None for another field."""
    items = typing.get_args(kind) if typing.get_origin(kind) is tuple else ()
    return items[0] if items and dataclasses.is_dataclass(items[0]) else None  # type: ignore[return-value]


def _text(value: Any, given: str | None) -> Any:
    """Return the value of a text field: the text as given on the command line, unless it is quoted or null.

    YAML would turn the colons and braces of a text into a mapping.

    >>> _text({"translate to French": {"en": None}}, "translate to French: {en}"), _text("a: b", "'a: b'"), _text(None, "null")
    ('translate to French: {en}', 'a: b', None)
    """
    is_yaml = given is None or given.strip() in ("null", "~", "") or given.lstrip()[0] in "'\""
    return value if is_yaml else given


def _dataclass(kind: type, value: Any, where: SourceLocation) -> Any:
    if isinstance(value, kind):
        return value
    if value is None:
        value = {}
    short = _short_form(kind)
    if short and not isinstance(value, Mapping):
        value = {short: value}
    elif short and "kind" in value:  # a bare value to which `override` has added fields
        value = {short if name == "kind" else name: one for name, one in value.items()}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {value!r} does not fit: it should be the fields of {kind.__name__}")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    missing = [name for name, field in fields.items() if name not in value and _required(field)]
    errors = [f"{where}: {kind.__name__} needs the field {name!r}" for name in missing]
    found = {}
    for name, one in value.items():
        if name not in fields:
            errors.append(f"{where / name}: there is no field {name!r} in {kind.__name__}{_nearest(name, [*fields])}")
            continue
        default = fields[name].default
        if hints[name] in REGISTRIES and isinstance(one, Mapping) and "kind" not in one and default is not MISSING:
            one = {**to_dict(default), **one}  # fields of the default, unless another kind is named
        try:
            found[name] = from_dict(hints[name], one, where / name)
        except UserError as error:
            errors.append(str(error))
    errors += [f"{where / name}{reason}" for name, reason in check_fields(kind, found)[1]]
    if errors:
        raise UserError("\n".join(errors))
    try:
        return kind(**found)
    except UserError as error:  # fields that do not fit each other
        raise UserError(": ".join(part for part in (where.line(), str(error)) if part)) from None


def _short_form(kind: type) -> str:
    """Return the field of a dataclass that a bare value sets; empty if it takes none."""
    has_type = any(field.name == "type" for field in dataclasses.fields(kind))
    return SHORT_FORMS.get(kind, "type" if has_type else "")


def _required(field: dataclasses.Field[Any]) -> bool:
    return field.default is MISSING and field.default_factory is MISSING


def _choose(kinds: Registry, value: Any, where: SourceLocation) -> Any:
    if isinstance(value, str):
        value = {"kind": value}
    if isinstance(value, list) and kinds.join and value:
        built = [_choose(kinds, v, where / str(i)) for i, v in enumerate(value)]
        total = built[0]
        for one in built[1:]:
            total = kinds.join(total, one)
        return total
    names = list(kinds.names())
    if not isinstance(value, Mapping):
        if dataclasses.is_dataclass(value):  # it has been built
            return value
        raise UserError(f"{where}: {value!r} does not fit: it should be the name of a kind of {kinds.name}")
    name = value.get("kind")
    if not kinds.exists(str(name)):
        raise UserError(f"{where}: there is no {kinds.name} {name!r}{_nearest(str(name), names)}")
    try:
        found = kinds.find(str(name))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return _dataclass(found, {k: v for k, v in value.items() if k != "kind"}, where)


def _nearest(name: str, names: Sequence[str]) -> str:
    if not names:
        return ", which has no fields"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(names)}"


def to_dict(value: Any) -> Any:
    """Return a value as dicts, lists and scalars; the inverse of `from_dict`. Fields at their defaults are kept."""
    for base, kinds in REGISTRIES.items():
        if isinstance(value, base):
            return _plain_kind(kinds, value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if not _derived(value, f)}
    if isinstance(value, (tuple, list)):
        return [to_dict(v) for v in value]
    if isinstance(value, Mapping):
        return {k: to_dict(v) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def _derived(value: Any, field: dataclasses.Field[Any]) -> bool:
    """Return whether a field was computed from others (an MLP's 4 * hidden_size); an override of those must change it too."""
    now, default = getattr(value, field.name), field.default
    if not field.init:
        return True
    if default is MISSING or now == default:
        return False
    try:
        return bool(dataclasses.replace(value, **{field.name: default}) == value)
    except UserError:
        return False


def _plain_kind(kinds: Registry, value: Any) -> Any:
    components = [to_dict(one) for one in (kinds.split(value) if kinds.split else ())]
    if components:
        return [one for c in components for one in (c if isinstance(c, list) else [c])]
    fields = {f.name: to_dict(getattr(value, f.name)) for f in dataclasses.fields(value) if not _derived(value, f)}
    return {"kind": kinds.name_of(type(value))} | fields


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """Return the mapping in a YAML file, and the `file:line` of each field by its path."""
    data, node = yaml_files.read_yaml(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of fields (name, objective, data, ...), and this is not one")
    lines: dict[tuple[str, ...], str] = {(): str(path)}

    def walk(node: yaml.Node, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, child in node.value:
                line = f"{path}:{key.start_mark.line + 1}"
                if lines.setdefault((*at, str(key.value)), line) != line:
                    raise UserError(f"{line}: {key.value} is given twice: leave one out")
                walk(child, (*at, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for place, child in enumerate(node.value):
                lines[(*at, str(place))] = f"{path}:{child.start_mark.line + 1}"
                walk(child, (*at, str(place)))

    if node is not None:
        walk(node, ())
    return data, lines


def write_yaml(value: Any) -> str:
    """Return a tree as YAML, which `read_yaml` and `from_dict` turn into an equal tree."""
    text: str = yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return text


def expand_short_form(assignment: str, kind: Any) -> str:
    """Return `model.norm.type=rms` for `model.norm=rms`, so that the other fields of `model.norm` are kept.

    Args:
        assignment: A setting such as `batch.size=64`.
        kind: The dataclass that it is a setting of.
    """
    name, equals, text = assignment.partition("=")
    for field in name.split("."):
        hint = typing.get_type_hints(kind).get(field) if dataclasses.is_dataclass(kind) else None
        kind = next((one for one in typing.get_args(hint) if dataclasses.is_dataclass(one)), hint)  # of `Model | None`
    takes_type = dataclasses.is_dataclass(kind) and _short_form(kind) == "type"  # type: ignore[arg-type]
    is_bare = equals and text != "null" and not text.startswith("{")
    return f"{name}.type={text}" if takes_type and is_bare else assignment


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Return a copy of plain data with assignments such as `batch.size=64` applied.

    Values are parsed as YAML, so `path=[a, b]` and `init_from=null` work.

    >>> override({"batch": {"size": 16, "group_by_length": 0}}, ["batch.size=64"])
    {'batch': {'size': 64, 'group_by_length': 0}}
    >>> override({"objective": ["sop", "mlm"]}, ["objective[1].noise=iid"])
    {'objective': ['sop', {'kind': 'mlm', 'noise': 'iid'}]}

    Raises:
        UserError: An assignment has no "=", sets a field that none or several of the kinds in a list have, or names a place that a
            list does not have.
    """
    result: dict[str, Any] = _copy(data)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise UserError(f"{assignment!r} is no setting: write field=value, for example batch.size=64")
        *parents, last = name.split(".")
        place = result
        for parent in parents:
            numbered = re.fullmatch(r"(\w+)\[(\d+)\]", parent)
            if numbered and isinstance(place.get(numbered[1]), list):
                place = _numbered(place[numbered[1]], int(numbered[2]), parent)
                continue
            inner = place.get(parent)
            if isinstance(inner, list) and last != "kind" and (component := _component(inner, last, name)) is not None:
                place = component
                continue
            if isinstance(inner, str):
                inner = {"kind": inner}
            elif not isinstance(inner, dict):
                inner = {}
            place[parent] = inner
            place = inner
        try:
            value = yaml_files.parse_yaml(text, name)[0] if text else ""
        except UserError:
            value = text
        place[last] = value
    return result


def _numbered(components: list[Any], number: int, name: str) -> dict[str, Any]:
    """Return a component of a list of kinds by its place, as `firth show` names it."""
    if number >= len(components):
        raise UserError(f"{name}: the list has {len(components)} entries, numbered from 0")
    if isinstance(components[number], str):
        components[number] = {"kind": components[number]}
    found: dict[str, Any] = components[number]
    return found


def _component(components: list[Any], field: str, name: str) -> Any:
    """Return the component of a list of kinds that has a field; None for another list, which `from_dict` reports.

    Raises:
        UserError: None or several of the components have the field.
    """
    kinds = next((kinds for kinds in REGISTRIES.values() if kinds.join), None)
    mappings = [{"kind": one} if isinstance(one, str) else one for one in components]
    if kinds is None or not all(isinstance(one, dict) and kinds.exists(str(one.get("kind"))) for one in mappings):
        return None
    components[:] = mappings
    fields = {one["kind"]: [f.name for f in dataclasses.fields(kinds.find(one["kind"])) if f.init] for one in mappings}
    matching = [one for one in mappings if field in fields[one["kind"]]]
    if len(matching) == 1:
        return matching[0]
    listing = f"{name}: the {kinds.name} is the list [{', '.join(fields)}]"
    if not matching:
        raise UserError(
            f"{listing}, and none has a field {field!r}{_nearest(field, sorted({f for of in fields.values() for f in of}))}"
        )
    raise UserError(
        f"{listing}, and {' and '.join(one['kind'] for one in matching)} have a field {field!r}: write "
        f"{name.rpartition('.')[0]}[{mappings.index(matching[0])}].{field}="
    )


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value
