"""Report the training and held-out examples of each class, and reject training data with a single class.

classes: bad 51 (and 7 held out), good 49 (and 5 held out), odd 0 (and 1 held out)
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from firth.data.source import Source
from firth.types import UserError

MAX_LISTED_CLASSES = 12
"""Most classes that the line lists one by one."""


def count_classes(source: Source) -> Mapping[str, int]:
    """Return the number of examples of each class in a source; {} without classes."""
    return source.class_counts(np.arange(len(source)))


def class_summary(train: Source, valid: Source | None) -> str:
    """Return a line on the classes; empty if there are none."""
    found = count_classes(train)
    held = count_classes(valid) if valid is not None else {}
    if len(found) > MAX_LISTED_CLASSES:
        least, most = min(found, key=lambda name: found[name]), max(found, key=lambda name: found[name])
        return f"{len(found)} classes, from {found[least]:,} of {least} to {found[most]:,} of {most}"
    each = [
        f"{name} {n:,}" + (f" (and {held[name]:,} held out)" if held.get(name) else "") for name, n in found.items()
    ]
    return f"classes: {', '.join(each)}" if each else ""


def missing_classes(train: Source, valid: Source | None) -> list[str]:
    """Return a sentence for each class that has held-out examples and no training examples."""
    held = count_classes(valid) if valid is not None else {}
    return [
        f"the class {name!r} has no training examples and {held[name]:,} held-out ones, so it is not learned"
        for name, n in count_classes(train).items()
        if not n and held.get(name)
    ]


def check_several_classes(train: Source) -> None:
    """Raise a UserError if all training examples are of one class."""
    found = count_classes(train)
    some = [name for name, n in found.items() if n]
    if found and len(some) < 2:
        raise UserError(
            f"all training examples are of one class, {some[0] if some else 'none'!r}: add records of another class, or name the "
            "field of the label (examples.label_field)"
        )
