"""A journal: events in a file that is only ever appended to, each on the disk before it counts."""

from __future__ import annotations

import fcntl
import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from firth.io.atomic import make_directory, refusals
from firth.io.json_files import read_rows, row_line
from firth.types import UserError

JUDGMENT, SKIP, CORRECTION, UNDO = "judgment", "skip", "correction", "undo"


class Journal:
    """The events, in a file that is appended to. One process at a time has it open.

    Args:
        path: The file.

    Raises:
        UserError: Another process has it open, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        make_directory(path.parent)
        self.path = path
        with refusals(path):
            self._file = path.open("ab", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            whole = path.read_bytes()
            self._size = whole.rfind(b"\n") + 1  # without a cut last line, whose event nobody was shown as recorded
            self._file.truncate(self._size)
            self.events = read_rows(path, {"id": int, "event": str, "annotator": str, "item": str}, "remove the line")
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{path}: another process collects preferences into this file: stop it, or give another --out"
            ) from None
        except BaseException:
            self._file.close()
            raise
        self.by_id: dict[int, dict[str, Any]] = {}
        """All events."""
        self.active: dict[int, dict[str, Any]] = {}
        """The events that were not undone, by their ids."""
        self.turns: Counter[tuple[str, str]] = Counter()
        """How often an annotator was done with an item, or had it back: judgments, skips and undos."""
        for event in self.events:
            self._count(event)

    def append(self, event: Mapping[str, Any]) -> dict[str, Any]:
        """Append an event and return it with its id; it is on the disk on return.

        Raises:
            UserError: It cannot be written; then the file is as before.
        """
        added = {"id": max((one["id"] for one in self.events[-1:]), default=-1) + 1, **event}
        with refusals(self.path):
            os.ftruncate(self._file.fileno(), self._size)  # of no effect, unless that failed after a failed write
            self._size += append_bytes(self._file.fileno(), row_line(added, ascii_only=False).encode(), sync=True)
        self.events.append(added)
        self._count(added)
        return added

    def _count(self, event: dict[str, Any]) -> None:
        self.by_id[event["id"]] = event
        if event["event"] != CORRECTION:
            self.turns[event["annotator"], event["item"]] += 1
        if event["event"] == UNDO:
            self.active.pop(event["of"], None)
        else:
            self.active[event["id"]] = event

    def close(self) -> None:
        """Close the file and give up its lock."""
        self._file.close()


def append_bytes(descriptor: int, data: bytes, *, sync: bool = False) -> int:
    """Append to a file, all or nothing, and return the number of bytes; `sync`: they are on the disk then."""
    size, rest = os.fstat(descriptor).st_size, data
    try:
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        if sync:
            os.fsync(descriptor)
    except BaseException:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise
    return len(data)
