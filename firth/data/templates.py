"""Text templates that are filled with a record's fields: `translate to French: {en}`.

A field is its name between braces and nothing else; doubled braces are literal braces. Python's own formatting can do
more (`{en:>999999999}` allocates a gigabyte, `{en.__class__}` accesses Python objects), which no prompt needs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from firth.types import UserError

FIELD_OR_BRACE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def field_names(template: str) -> list[str]:
    """Return the names of the fields in a template, sorted, each once.

    >>> field_names("{b}, {a} and {b}: {{c}}")
    ['a', 'b']
    """
    return sorted({found[1] for found in FIELD_OR_BRACE.finditer(template) if found[1]})


def fill_template(template: str, record: Mapping[str, Any]) -> str:
    """Return the template with field names replaced by a record's values.

    Raises:
        UserError: A brace is unpaired, or a name is not a field of the record.

    >>> fill_template("in French: {en} {{x}}", {"en": "otter"})
    'in French: otter {x}'
    """

    def value(found: re.Match[str]) -> str:
        if found[0] in ("{{", "}}"):
            return found[0][0]
        if found[1] is None:
            raise UserError(
                f"the template {template!r} has an unpaired brace {found[0]!r}: double it for a literal brace"
            )
        if found[1] not in record:
            raise UserError(
                f"the template {template!r} does not fit this record: {found[0]} is not a field name; the fields are "
                f"{', '.join(record) or 'none'}: write one of these names between braces, and nothing else"
            )
        return str(record[found[1]])

    return FIELD_OR_BRACE.sub(value, template)
