"""A text with a record's fields in it: `translate to French: {en}`.

A field is its name between braces and nothing else; two braces are one that is printed. Python's own formatting does
more (`{en:>999999999}` asks for a gigabyte, `{en.__class__}` looks inside of Python), which no prompt needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from firth.types import UserError

PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def field_names(form: str) -> list[str]:
    """Return the names of the fields in a form, sorted, each once.

    >>> field_names("{b}, {a} and {b}: {{c}}")
    ['a', 'b']
    """
    return sorted({found[1] for found in PIECE.finditer(form) if found[1]})


def fill_template(form: str, record: Mapping[str, Any]) -> str:
    """Return the form with a record's values in the places of their names.

    Raises:
        UserError: A brace without its other, or a name that is no field of the record.

    >>> fill_template("in French: {en} {{x}}", {"en": "otter"})
    'in French: otter {x}'
    """

    def value(found: re.Match[str]) -> str:
        if found[0] in ("{{", "}}"):
            return found[0][0]
        if found[1] is None:
            raise UserError(
                f"the form {form!r} has the brace {found[0]!r} without its other: write two for one that is printed"
            )
        if found[1] not in record:
            raise UserError(
                f"the form {form!r} does not fit this record: {found[0]} is not the name of a field, which is "
                f"{', '.join(record) or 'none'}: write one of those between braces, and nothing else"
            )
        return str(record[found[1]])

    return PIECE.sub(value, form)
