"""Fixtures of all tests, their markers, the fastest kernels of this machine, and a summary of skipped tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from firth import kernel_choice
from firth.generate import quantized  # noqa: F401
from firth.model import attention  # noqa: F401
from firth.training import muon  # noqa: F401
from tests.support import packages

# Measured once for all workers and the commands that tests start, so that two of them never choose differently.
os.environ.setdefault(
    kernel_choice.FORCE, ",".join(f"{name}={choice}" for name, choice in kernel_choice.table().items())
)


DIRECTORIES = {Path(__file__).parent / "oracles": "oracle", Path(__file__).parent / "integration": "slow"}
"""Directory -> the marker of all of its tests."""
DOWNLOADS = {"minilm", "unpack"}
"""Fixtures that read downloaded data."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests in oracles/ as `oracle`, those in integration/ as `slow`, and tests of downloaded data as `network`."""
    for item in items:
        for directory, marker in DIRECTORIES.items():
            if item.path.is_relative_to(directory):
                item.add_marker(marker)
        if isinstance(item, pytest.Function) and DOWNLOADS & set(item.fixturenames):
            item.add_marker("network")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """Return the directory of MiniLM; skip the test unless in CI or cached."""
    return packages.minilm()


@pytest.fixture(scope="session")
def unpack(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function of a package and patterns: a directory with the matching files of the package."""
    return lambda package, *patterns: packages.unpack(package, patterns, tmp_path_factory.mktemp(package.name))


@pytest.fixture(scope="session")
def sentencepiece_models(unpack: Callable[..., Path]) -> Path:
    """Return the directory with the test models of SentencePiece, and the text of one."""
    return unpack(packages.SENTENCEPIECE, "*/test/*.model", "*/test/botchan.txt")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print why tests were skipped: one line per reason, with the number of tests."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section(f"{len(skipped)} tests were skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count} of them: {reason}")
