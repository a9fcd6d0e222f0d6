"""Fixtures of all tests: the fastest kernels of this machine, and a summary of skipped tests."""

from __future__ import annotations

import os
from collections import Counter

import pytest

from firth import kernel_choice
from firth.generate import quantized  # noqa: F401
from firth.model import attention  # noqa: F401
from firth.training import muon  # noqa: F401

# Measured once for all workers and the commands that tests start, so that two of them never choose differently.
os.environ.setdefault(
    kernel_choice.FORCE, ",".join(f"{name}={choice}" for name, choice in kernel_choice.table().items())
)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print why tests were skipped: one line per reason, with the number of tests."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section(f"{len(skipped)} tests were skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count} of them: {reason}")
