"""What a run of the tests prints at its end."""

from __future__ import annotations

from collections import Counter

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print why tests were skipped: one line for each reason, with how many tests it concerns and what cures it."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(report.longrepr[2].removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.section(f"{len(skipped)} tests were skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"{count} of them: {reason}")
