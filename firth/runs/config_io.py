"""A typed tree of frozen dataclasses, read from YAML and written back: the grammar of a recipe.

A dataclass is its own schema: a field's annotation says what may stand there. Where one of several classes may
stand, the annotation is a base class and the YAML says which by `kind` (`objective: {kind: mlm, mlm_probability: 0.15}`, or
`objective: mlm` when nothing else is set, or a list for a sum: `[nsp, mlm]`). A value that does not fit, or a
field that does not exist, is a UserError with the field, the file and line, and the nearest name that does exist.

>>> @dataclass(frozen=True)
... class Batch:
...     rows: int = 16
>>> from_dict(Batch, {"rows": "64"})
Batch(rows=64)
>>> from_dict(Batch, {"row": 3})
Traceback (most recent call last):
...
firth.types.UserError: recipe: there is no field 'row' in Batch; did you mean 'rows'?
"""

from __future__ import annotations

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import TypeAdapter, ValidationError

from firth.io import yaml_files
from firth.types import UserError
from firth.validated import check_range, range_of


@dataclass(frozen=True)
class Registry:
    """The classes that may stand in one place, by name; `join` makes one value of a list (objectives: a sum), `part`
    is its inverse."""

    name: str
    names: Callable[[], Sequence[str]]
    find: Callable[[str], type]
    join: Callable[[Any, Any], Any] | None = None
    split: Callable[[Any], Sequence[Any]] | None = None


REGISTRIES: dict[type, Registry] = {}
"""Base class -> the kinds that may stand for it; filled by `firth.runs.recipe`."""

SHORT_FORMS: dict[type, str] = {}
"""Class -> the field that a word in its place means: `source: mine.csv`."""


PathKind = Literal["files", "model", "tokenizer", "place"]
"""What a path in a recipe names: files that are read, a model's or an adapter's directory, a tokenizer, a place to write."""


def path_field(kind: PathKind, default: Any) -> Any:
    """Declare a field of a recipe that holds a path, or several (see `paths`)."""
    return dataclasses.field(default=default, metadata={"path": kind})


def paths(value: Any, where: str = "") -> Iterator[tuple[str, PathKind, Any]]:
    """Yield the paths in a recipe that are set: (dotted name, what it names, value)."""
    for field in dataclasses.fields(value) if _is_data(value) else ():
        one, name = getattr(value, field.name), f"{where}{field.name}"
        if "path" in field.metadata:
            if one:
                yield name, field.metadata["path"], one
        else:
            yield from paths(one, f"{name}.")


def without_paths(value: Any) -> Any:
    """Return a recipe with every path at its default: what is left does not depend on where files are."""
    return _with_paths(value, lambda field, _: field.default)


def absolute_paths(value: Any) -> Any:
    """Return a recipe whose paths do not depend on the working directory; patterns stay patterns."""

    def whole(path: str) -> str:
        return str(Path(path).expanduser().absolute()) if path else path

    return _with_paths(value, lambda _, one: whole(one) if isinstance(one, str) else tuple(map(whole, one)))


def _with_paths(value: Any, change: Callable[[dataclasses.Field[Any], Any], Any]) -> Any:
    """A copy in which every path is changed."""
    if not _is_data(value):
        return value
    changed = {}
    for field in dataclasses.fields(value):
        one = getattr(value, field.name)
        new = change(field, one) if "path" in field.metadata else _with_paths(one, change)
        if new is not one and new != one:
            changed[field.name] = new
    return dataclasses.replace(value, **changed) if changed else value


def _is_data(value: Any) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, type)


def difference(first: Any, second: Any, where: str = "") -> str:
    """Name the first field in which two trees of plain data differ: "batch.size is 16 there and 8 here"; "" where none does."""
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
    """A place in a recipe: the dotted field, and the line it came from if it came from a file. said: of fields that were set on
    the command line, the text itself. A number in the path is the place of one of several kinds in a list."""

    path: tuple[str, ...] = ()
    lines: Mapping[tuple[str, ...], str] = dataclasses.field(default_factory=dict)
    command_line: Mapping[tuple[str, ...], str] = dataclasses.field(default_factory=dict)

    def __truediv__(self, name: str) -> SourceLocation:
        return SourceLocation((*self.path, name), self.lines, self.command_line)

    def line(self) -> str:
        """Return `file:line` of the field or of the nearest one around it; empty where the command line sets the field."""
        for n in range(len(self.path), -1, -1):
            if tuple(name for name in self.path[:n] if not name.isdigit()) in self.command_line:
                break
            if self.path[:n] in self.lines:
                return self.lines[self.path[:n]]
        return ""

    def __str__(self) -> str:
        return ": ".join(part for part in (self.line(), ".".join(self.path)) if part) or "recipe"


def from_dict(kind: type, value: Any, where: SourceLocation | None = None) -> Any:
    """A `kind` from plain data (what YAML gives): a dataclass, one of KINDS, or a leaf that pydantic can coerce."""
    where = where or SourceLocation()
    if kind in REGISTRIES:
        return _choose(REGISTRIES[kind], value, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, value, where)
    options = typing.get_args(kind)
    if any(dataclasses.is_dataclass(o) or o in REGISTRIES for o in options) and type(None) in options:
        if value is None:
            return None
        return from_dict(next(o for o in options if o is not type(None)), value, where)
    if kind is str:
        value = _text(value, where.command_line.get(where.path))
    allowed = range_of(kind)
    if allowed is not None and isinstance(value, bool):  # pydantic takes true for 1
        raise UserError(f"{where}: {value!r} does not fit: it should be a number, {allowed}")
    try:
        built: Any = TypeAdapter(kind).validate_python(_tuple(kind, value))
        if allowed is not None:
            check_range(str(where), built, allowed)
        return built
    except ValidationError as error:
        reasons = [one["msg"].removeprefix("Input should be ").removeprefix("Value error, ") for one in error.errors()]
        reason = " or ".join(dict.fromkeys(reasons)).replace("a valid tuple", "a list")
        raise UserError(f"{where}: {value!r} does not fit: it should be {reason}") from None


def _text(value: Any, said: str | None) -> Any:
    """What a field of text holds: what was typed, whatever YAML makes of its colons and braces, unless quotation marks were.

    >>> _text({"translate to French": {"en": None}}, "translate to French: {en}"), _text("a: b", "'a: b'"), _text(None, "null")
    ('translate to French: {en}', 'a: b', None)
    """
    kept = said is None or said.strip() in ("null", "~", "") or said.lstrip()[0] in "'\""
    return value if kept else said


def _tuple(kind: Any, value: Any) -> Any:
    """One string where several may stand means a list of one: `path: mine/` (a string is also a sequence of letters)."""
    return [value] if typing.get_origin(kind) is tuple and not isinstance(value, (list, tuple)) else value


def _dataclass(kind: type, value: Any, where: SourceLocation) -> Any:
    if isinstance(value, kind):
        return value
    if value is None:
        value = {}
    if kind in SHORT_FORMS and not isinstance(value, Mapping):
        value = {SHORT_FORMS[kind]: value}
    elif kind in SHORT_FORMS and "kind" in value:  # a word to which `override` has added fields
        value = {SHORT_FORMS[kind] if name == "kind" else name: one for name, one in value.items()}
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {value!r} does not fit: it should be the fields of {kind.__name__}")
    hints = typing.get_type_hints(kind, include_extras=True)
    names = [f.name for f in dataclasses.fields(kind) if f.init]
    for name in value:
        if name not in names:
            raise UserError(f"{where}: there is no field {name!r} in {kind.__name__}{_nearest(name, names)}")
    missing = [f.name for f in dataclasses.fields(kind) if _required(f) and f.name not in value]
    if missing:
        raise UserError(f"{where}: {kind.__name__} needs the field {missing[0]!r}")
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    found = {}
    for name, one in value.items():
        if hints[name] in REGISTRIES and isinstance(one, Mapping) and "kind" not in one and name in defaults:
            one = {**to_dict(defaults[name]), **one}  # fields of what is there unless another kind is named
        found[name] = from_dict(hints[name], one, where / name)
    try:
        return kind(**found)
    except UserError as error:  # fields that do not fit each other
        raise UserError(": ".join(part for part in (where.line(), str(error)) if part)) from None


def _required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.init and field.default is missing and field.default_factory is missing


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
    if name not in names:
        raise UserError(f"{where}: there is no {kinds.name} {name!r}{_nearest(str(name), names)}")
    return _dataclass(kinds.find(str(name)), {k: v for k, v in value.items() if k != "kind"}, where)


def _nearest(name: str, names: Sequence[str]) -> str:
    if not names:
        return ", which has no fields"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; there is {', '.join(names)}"


def to_dict(value: Any) -> Any:
    """The inverse of `build`: dicts, lists and scalars that YAML and JSON hold. Fields at their default are kept."""
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
    """Whether the field was worked out from others (an MLP's 4 x width): then an override of those must move it too."""
    now, default = getattr(value, field.name), field.default
    if not field.init:
        return True
    if default is dataclasses.MISSING or now == default:
        return False
    try:
        return bool(dataclasses.replace(value, **{field.name: default}) == value)
    except UserError:
        return False


def _plain_kind(kinds: Registry, value: Any) -> Any:
    for name in kinds.names():
        cls = kinds.find(name)
        if cls is type(value):
            fields = dataclasses.fields(cls)
            return {"kind": name} | {f.name: to_dict(getattr(value, f.name)) for f in fields if not _derived(value, f)}
    # Not a kind of its own: the sum that `join` makes, written as the list of its addends.
    addends = [to_dict(addend) for addend in (kinds.split(value) if kinds.split else ())]
    return [one for a in addends for one in (a if isinstance(a, list) else [a])]


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[tuple[str, ...], str]]:
    """The mapping in a YAML file, and for each field the `file:line` it stands on."""
    data, node = yaml_files.read_yaml(path)
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of fields (name, objective, source, ...), and this is not one")
    lines: dict[tuple[str, ...], str] = {(): str(path)}

    def walk(node: yaml.Node, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, child in node.value:
                lines[(*at, str(key.value))] = f"{path}:{key.start_mark.line + 1}"
                walk(child, (*at, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for place, child in enumerate(node.value):
                lines[(*at, str(place))] = f"{path}:{child.start_mark.line + 1}"
                walk(child, (*at, str(place)))

    if node is not None:
        walk(node, ())
    return data, lines


def write_yaml(value: Any) -> str:
    """The tree as YAML that `read_yaml` and `build` turn into an equal one."""
    text: str = yaml.safe_dump(to_dict(value), sort_keys=False, allow_unicode=True, default_flow_style=None, width=110)
    return text


def override(data: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`batch.size=64` laid over plain data; values are read as YAML, so `path=[a, b]` and `init_from=null` work.

    >>> override({"batch": {"rows": 16, "pack": 0}}, ["batch.size=64"])
    {'batch': {'rows': 64, 'pack': 0}}
    """
    result: dict[str, Any] = _copy(data)
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals or not name:
            raise UserError(f"{assignment!r} is no setting: write field=value, for example batch.size=64")
        *parents, last = name.split(".")
        place = result
        for parent in parents:
            inner = place.get(parent)
            if isinstance(inner, list) and last != "kind" and (addend := _addend(inner, last, name)) is not None:
                place = addend
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


def _addend(addends: list[Any], field: str, name: str) -> Any:
    """The one of several kinds in a list that has a field: it takes the setting. UserError where none has it, or several.

    What is no list of kinds is no place for a setting, and `build` will say so: None.
    """
    kinds = next((kinds for kinds in REGISTRIES.values() if kinds.join), None)
    told = [{"kind": one} if isinstance(one, str) else one for one in addends]
    if kinds is None or not all(isinstance(one, dict) and one.get("kind") in kinds.names() for one in told):
        return None
    addends[:] = told
    fields = {one["kind"]: [f.name for f in dataclasses.fields(kinds.find(one["kind"])) if f.init] for one in told}
    having = [one for one in told if field in fields[one["kind"]]]
    if len(having) == 1:
        return having[0]
    told_of = f"{name}: the {kinds.name} is the list [{', '.join(fields)}]"
    if not having:
        raise UserError(
            f"{told_of}, and none has a field {field!r}{_nearest(field, sorted({f for of in fields.values() for f in of}))}"
        )
    raise UserError(
        f"{told_of}, and {' and '.join(one['kind'] for one in having)} have a field {field!r}: write {name.rpartition('.')[0]}=[...]"
    )


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, list) else value
