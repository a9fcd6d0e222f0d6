"""Read YAML within limits.

A file of a kilobyte can describe a gigabyte (aliases of aliases), or nest beyond Python's recursion limit.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from firth.io.atomic import check_regular_file
from firth.types import UserError

MAX_BYTES = 1 << 20
"""Maximum size of a YAML file; PyYAML takes ten seconds for it, and no recipe has a tenth of it."""
MAX_VALUES = 100_000
"""Maximum number of values in a document with all aliases expanded."""
MAX_DEPTH = 50
"""Maximum nesting depth."""


class _Loader(yaml.SafeLoader):
    """PyYAML's loader with the floats of YAML 1.2: `1e-5` is a number, which YAML 1.1 reads as a text."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> tuple[Any, yaml.Node | None]:
    """Return the content of a YAML file, as plain data and as nodes with line numbers.

    Raises:
        UserError: The file does not exist, is not YAML, or exceeds the limits.
    """
    check_regular_file(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has {path.stat().st_size:,} bytes, more than any such file needs: it is not read")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: this is not YAML: {error}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, name: str) -> tuple[Any, yaml.Node | None]:
    """Parse YAML text as `read_yaml` does.

    Args:
        text: The YAML text.
        name: The source of the text, for error messages.

    Raises:
        UserError: The text is not YAML, or exceeds the limits.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None and _values(node, {}, 0) > MAX_VALUES:
            raise UserError(f"{name}: its aliases expand to more than {MAX_VALUES:,} values: use fewer aliases")
        return yaml.load(text, Loader=_Loader), node
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", error)).split())
        raise UserError(f"{name}{line}: this is not YAML: {reason}") from None
    except RecursionError:
        raise UserError(f"{name}: its values are nested too deeply") from None
    except ValueError as error:  # a date that does not exist, a number of too many digits
        raise UserError(f"{name}: this is not YAML: {error}") from None


def _values(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Count the values under a node, aliases expanded. An alias of an enclosing node would never end, so it is rejected."""
    if depth > MAX_DEPTH:
        raise RecursionError
    if id(node) not in known:
        known[id(node)] = MAX_VALUES + 1  # until it is counted: only nodes inside of it meet it before
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [one for pair in node.value for one in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        known[id(node)] = 1 + sum(_values(child, known, depth + 1) for child in children)
    return known[id(node)]
