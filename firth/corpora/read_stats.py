"""Count what a reader read, repaired and skipped, with the first occurrence of each.

>>> counts = ReadStats()
>>> counts.note("bad_utf8", "a.csv:3"), counts.note("bad_utf8", "a.csv:9"), counts.note("nul", "a.csv:4", 0)
(None, None, None)
>>> counts.rows(), counts.at
({'bad_utf8': 2}, {'bad_utf8': 'a.csv:3'})
"""

from __future__ import annotations

from dataclasses import dataclass, field


def many(n: int, what: str) -> str:
    """Return a number and a noun, in the plural if needed.

    >>> many(1, "row"), many(2000, "row")
    ('1 row', '2,000 rows')
    """
    return f"{n:,} {what}{'s' * (n != 1)}"


@dataclass
class ReadStats:
    """Counts of what was read, repaired and skipped, for the report.

    Args:
        files: Files read.
        documents: Documents read.
        bytes: Bytes of text read.
        bad_utf8: Invalid bytes or lone surrogates, read as U+FFFD.
        nul: NUL characters removed.
        empty: Empty files or records skipped.
        cut: Documents split because of their length.
        too_long: Records skipped because of their length.
        mismatched: Table rows skipped because of their number of cells.
        unnamed_columns: Table columns without a name.
        skipped: Tables in a directory that were not read as text.
        at: Kind of count -> its first occurrence (file:line).
    """

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
        """Add to a count; the first place (file:line) of each kind is kept."""
        if count:
            setattr(self, kind, getattr(self, kind) + count)
            self.at.setdefault(kind, place)

    def rows(self) -> dict[str, int]:
        """Return the counts that are not zero, by name."""
        return {name: n for name, n in vars(self).items() if n and name != "at"}
