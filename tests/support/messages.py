"""The messages that firth logs."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from firth.types import LOGGER


@contextmanager
def logged(level: int = logging.INFO) -> Iterator[list[str]]:
    """Collect the messages of a level and above within the context."""
    messages: list[str] = []
    handler, before = logging.Handler(level), LOGGER.level
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    LOGGER.setLevel(level)
    try:
        yield messages
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(before)
