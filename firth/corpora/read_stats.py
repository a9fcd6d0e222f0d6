"""What a reader read, mended and left out, with the place of the first of each.

>>> counts = ReadStats()
>>> counts.note("bad_utf8", "a.csv:3"), counts.note("bad_utf8", "a.csv:9"), counts.note("nul", "a.csv:4", 0)
(None, None, None)
>>> counts.rows(), counts.at
({'bad_utf8': 2}, {'bad_utf8': 'a.csv:3'})
"""

from __future__ import annotations

from dataclasses import dataclass, field


def many(n: int, what: str) -> str:
    """So many of something.

    >>> many(1, "row"), many(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{n:,} {what}{'s' * (n != 1)}"


@dataclass
class ReadStats:
    """What was read and what was mended or left out, for the report. at: of each kind that was noted, where the first is."""

    files: int = 0
    documents: int = 0
    bytes: int = 0
    bad_utf8: int = 0
    nul: int = 0
    empty: int = 0
    cut: int = 0
    too_long: int = 0
    mismatched: int = 0
    unnamed_columns: int = 0
    skipped: int = 0
    at: dict[str, str] = field(default_factory=dict)

    def note(self, kind: str, place: str, count: int = 1) -> None:
        """Count something that was met at a place (file:line); the first place of each kind is kept."""
        if count:
            setattr(self, kind, getattr(self, kind) + count)
            self.at.setdefault(kind, place)

    def rows(self) -> dict[str, int]:
        """The counts that are not zero, by name."""
        return {name: n for name, n in vars(self).items() if n and name != "at"}
