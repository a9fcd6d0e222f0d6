"""The end of a test run lists what was skipped and why."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from firth.corpora import catalog
from tests.conftest import pytest_terminal_summary
from tests.support.packages import LLAMA, large, minilm


class Lines:
    """A terminal reporter that stores its lines."""

    def __init__(self, reasons: list[str]) -> None:
        self.stats = {"skipped": [SimpleNamespace(longrepr=("file", 1, f"Skipped: {reason}")) for reason in reasons]}
        self.lines: list[str] = []

    def section(self, title: str) -> None:
        self.lines.append(title)

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_skips_are_counted_by_their_reason() -> None:
    reporter = Lines(["no network", "no data", "no data"])
    pytest_terminal_summary(reporter)  # type: ignore[arg-type]
    assert reporter.lines == ["3 tests were skipped", "2 of them: no data", "1 of them: no network"]
    silent = Lines([])
    pytest_terminal_summary(silent)  # type: ignore[arg-type]
    assert silent.lines == []


def test_a_skip_for_data_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(catalog, "cache_directory", lambda: tmp_path)
    for get in (minilm, lambda: large(LLAMA)):
        with pytest.raises(pytest.skip.Exception, match=r"data that only CI fetches: run .*`CI=1 make test` once"):
            get()
