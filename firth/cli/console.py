"""Prints the messages of the logger `firth` for the command line."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import typer

from firth.types import LOGGER


class ConsoleHandler(logging.Handler):
    """Prints messages on standard output and warnings on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        typer.echo(f"firth: {record.getMessage()}" if warning else record.getMessage(), err=warning)


@contextmanager
def console() -> Iterator[None]:
    """Print the messages of firth within the context."""
    handler, level = ConsoleHandler(), LOGGER.level
    LOGGER.addHandler(handler)
    LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
