"""Import what a recipe names by `module:name`: a user's reward function or objective."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from firth.types import UserError


def find(name: str, kind: str) -> Any:
    """Return what `module:name` names, in an installed module or in a file in the working directory.

    Args:
        name: Module and attribute, such as `rewards:brief`.
        kind: What it should be, for messages: "function".

    Raises:
        UserError: There is no such module or attribute, or the module fails when it is imported.
    """
    module, _, attribute = name.partition(":")
    here = _search_working_directory()
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError, ValueError) as error:
        raise UserError(
            f"{name!r} names no {kind}: write module:{kind}, of an installed module or of a file in {here} ({error})"
        ) from None
    except Exception as error:
        raise UserError(f"{name!r} cannot be imported: {type(error).__name__} ({error})") from error


def find_class(name: str, base: type, what: str) -> type:
    """Return the frozen dataclass derived from `base` that `module:class` names.

    Args:
        name: Module and class, such as `skip_lm:SkipLM`.
        base: The class it must derive from.
        what: What it should be, for messages: "objective".

    Raises:
        UserError: The module cannot be imported, or the name is not such a class.
    """
    found = find(name, "class")
    if isinstance(found, type) and issubclass(found, base):
        parameters = vars(found).get("__dataclass_params__")
        if parameters is not None and parameters.frozen:
            return found
    raise UserError(f"{name!r} is no {what}: derive a @dataclass(frozen=True) from {base.__module__}.{base.__name__}")


def module_files(name: str) -> list[Path]:
    """Return the files of the module in `module:name` (all files of a package); none if there is no such module."""
    _search_working_directory()
    try:
        found = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):  # no such package, or no name
        return []
    if found is None or found.origin is None:
        return []
    origin = Path(found.origin)
    return sorted(origin.parent.rglob("*.py")) if found.submodule_search_locations else [origin] * origin.is_file()


def _search_working_directory() -> str:
    """Let imports find files in the working directory, and return it."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)  # last, so that a user's file never hides an installed module
    importlib.invalidate_caches()
    return here
