"""Judgments of people on answers to prompts, and the files that they become.

    preferences.jsonl                 rankings and preferences, to train on
    preferences.corrections.jsonl     corrected answers, as prompts with completions
    preferences.events.jsonl          what annotators did, one event a line, only ever appended to

The two other files are made of the events. An event is on the disk before the annotator gets the next prompt, and a line that a
killed process left incomplete is removed. `undo` is an event too: it revokes an earlier one.

    {"event": "judgment", "item", "annotator", "ranks": [1, 2, 2], "prompt", "answers", "runs", "comment", "seconds", "time"}
    {"event": "skip", "item", "annotator", ...}   {"event": "correction", ..., "answer": 0, "text"}   {"event": "undo", "of": 3, ...}
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firth.io.atomic import make_directory, refusals
from firth.io.json_files import read_rows, row_line
from firth.pipelines.records import write_records
from firth.types import UserError

LEASE_SECONDS = 900.0
"""How long a prompt is reserved for the annotator who has it on the screen."""
JUDGMENT, SKIP, CORRECTION, UNDO = "judgment", "skip", "correction", "undo"


@dataclass(frozen=True)
class WrittenAnswer:
    """An answer to a prompt.

    Args:
        text: Its text.
        runs: The runs that wrote it; several if they wrote the same text.
    """

    text: str
    runs: tuple[str, ...]


@dataclass(frozen=True)
class JudgedItem:
    """A prompt with answers that are all different.

    Args:
        prompt: The prompt.
        answers: The answers, at least two.
    """

    prompt: str
    answers: tuple[WrittenAnswer, ...]

    @property
    def id(self) -> str:
        """A hash of the prompt and the answers."""
        texts = json.dumps([self.prompt, sorted(answer.text for answer in self.answers)])
        return hashlib.sha256(texts.encode()).hexdigest()[:16]


def make_item(prompt: str, written: Sequence[tuple[str, str]]) -> JudgedItem | None:
    """Return the item of a prompt; None if fewer than two answers are different.

    Args:
        prompt: The prompt.
        written: Run and text of each answer.
    """
    runs: dict[str, list[str]] = {}
    for run, text in written:
        named = runs.setdefault(text.strip(), [])
        if run not in named:
            named.append(run)
    answers = tuple(WrittenAnswer(text, tuple(named)) for text, named in runs.items())
    return JudgedItem(prompt, answers) if len(answers) > 1 else None


class Journal:
    """The events, in a file that is appended to. One process at a time has it open.

    Args:
        path: The file.

    Raises:
        UserError: Another process has it open, or it is damaged.
    """

    def __init__(self, path: Path) -> None:
        make_directory(path.parent)
        with refusals(path):
            self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UserError(
                f"{path}: another process collects preferences into this file: stop it, or give another --out"
            ) from None
        whole = path.read_bytes()
        self._file.truncate(whole.rfind(b"\n") + 1)  # an incomplete last line, whose event nobody was shown as recorded
        self.events = read_rows(path, {"event": str, "annotator": str}, "remove the line")

    def append(self, event: Mapping[str, Any]) -> None:
        """Append an event; it is on the disk on return."""
        self._file.write(row_line(event, ascii_only=False).encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.events.append(dict(event))

    @property
    def active(self) -> dict[int, dict[str, Any]]:
        """The events that were not undone, by their number."""
        undone = {event["of"] for event in self.events if event["event"] == UNDO}
        return {i: one for i, one in enumerate(self.events) if one["event"] != UNDO and i not in undone}

    def close(self) -> None:
        """Close the file and give up its lock."""
        self._file.close()


class Preferences:
    """Prompts to judge, who gets which, and the judgments. All methods may be called from several threads.

    Args:
        out: The file of rankings and preferences.
        twice: Share of the prompts that two annotators get; one who works alone gets them again at the end.
        seed: Seed of the order in which answers are shown, and of which prompts are given twice.

    Raises:
        UserError: `out` is a file of something else, or another process writes it.
    """

    def __init__(self, out: Path, twice: float = 0.1, seed: int = 0) -> None:
        self.out, self.twice, self.seed = out, twice, seed
        self.corrections = out.with_name(f"{out.stem}.corrections{out.suffix}")
        self.journal = Journal(out.with_name(f"{out.stem}.events{out.suffix}"))
        self.items: dict[str, JudgedItem] = {}
        self._leases: dict[str, tuple[str, float]] = {}
        self._lock = threading.RLock()
        if not self.journal.events and out.is_file() and out.stat().st_size:
            raise UserError(f"{out}: this file was not written by `firth annotate`: give another --out")
        self._write()

    def add(self, items: Sequence[JudgedItem]) -> None:
        """Add prompts to judge."""
        with self._lock:
            self.items |= {item.id: item for item in items}

    def next(self, annotator: str) -> JudgedItem | None:
        """Return the prompt that an annotator gets next, and reserve it; None if there is none now."""
        with self._lock:
            self._leases = {id: lease for id, lease in self._leases.items() if lease[0] != annotator}
            judged, skipped = self._judges(), self._skips()
            again = None
            for id, item in self.items.items():
                names, leased = judged.get(id, []), self._leases.get(id)
                others = leased is not None and time.monotonic() < leased[1]
                if len(names) + others >= self.wanted(id) or annotator in skipped.get(id, ()):
                    continue
                if annotator not in names:
                    self._leases[id] = annotator, time.monotonic() + LEASE_SECONDS
                    return item
                again = again or item
            return again if again is not None and set().union(*judged.values()) == {annotator} else None

    def wanted(self, id: str) -> int:
        """Return how many judgments a prompt gets: 1, or 2 for a share of them."""
        drawn = int(hashlib.sha256(f"{self.seed} {id}".encode()).hexdigest()[:8], 16) / 16**8
        return 2 if drawn < self.twice else 1

    def order(self, item: JudgedItem, annotator: str) -> list[int]:
        """Return the order in which an annotator sees the answers; it differs between annotators, and the second time."""
        with self._lock:
            times = self._judges().get(item.id, []).count(annotator)
        text = f"{self.seed} {item.id} {annotator} {times}"
        rng = np.random.default_rng(int(hashlib.sha256(text.encode()).hexdigest()[:16], 16))
        return [int(i) for i in rng.permutation(len(item.answers))]

    def judge(
        self, annotator: str, id: str, shown_ranks: Sequence[int], comment: str = "", seconds: float = 0.0
    ) -> None:
        """Record a ranking.

        Args:
            annotator: Who judged.
            id: The item.
            shown_ranks: The rank of each answer in the order in which they were shown; 1 is the best, equal ranks are a tie.
            comment: A remark.
            seconds: Time that it took.

        Raises:
            UserError: There is no such item, or the ranks are not one for each of its answers.
        """
        with self._lock:
            item = self._item(id)
            if len(shown_ranks) != len(item.answers) or not all(1 <= rank <= len(item.answers) for rank in shown_ranks):
                raise UserError(
                    f"ranks: give each of the {len(item.answers)} answers a rank from 1 to {len(item.answers)}"
                )
            ranks = [0] * len(item.answers)
            for place, answer in enumerate(self.order(item, annotator)):
                ranks[answer] = shown_ranks[place]
            self._record(JUDGMENT, annotator, item, {"ranks": ranks, "comment": comment, "seconds": round(seconds, 1)})

    def skip(self, annotator: str, id: str) -> None:
        """Record that an annotator does not judge a prompt; others still get it."""
        with self._lock:
            self._record(SKIP, annotator, self._item(id), {})

    def correct(self, annotator: str, id: str, place: int, text: str) -> None:
        """Record how an answer should read.

        Args:
            annotator: Who corrected it.
            id: The item.
            place: The place of the answer in the order in which they were shown, from 0.
            text: The corrected answer.

        Raises:
            UserError: There is no such item or answer, or the text is blank.
        """
        with self._lock:
            item = self._item(id)
            if not 0 <= place < len(item.answers) or not text.strip():
                raise UserError("a correction needs one of the answers and a text")
            self._record(
                CORRECTION, annotator, item, {"answer": self.order(item, annotator)[place], "text": text.strip()}
            )

    def undo(self, annotator: str) -> JudgedItem | None:
        """Revoke the last event of an annotator and return its prompt; None if there is none."""
        with self._lock:
            own = [i for i, event in self.journal.active.items() if event["annotator"] == annotator]
            if not own:
                return None
            event = self.journal.events[own[-1]]
            self.journal.append({"event": UNDO, "annotator": annotator, "of": own[-1], "time": _now()})
            self._write()
            item = self.items.get(event["item"])
            if item is not None:
                self._leases[item.id] = annotator, time.monotonic() + LEASE_SECONDS
            return item

    def close(self) -> None:
        """Close the journal."""
        self.journal.close()

    def judgments(self) -> list[dict[str, Any]]:
        """Return the judgments that were not undone, in order."""
        with self._lock:
            return [event for event in self.journal.active.values() if event["event"] == JUDGMENT]

    def _item(self, id: str) -> JudgedItem:
        if id not in self.items:
            raise UserError("this prompt is not among those that are collected: reload the page")
        return self.items[id]

    def _record(self, kind: str, annotator: str, item: JudgedItem, values: Mapping[str, Any]) -> None:
        about = {
            "prompt": item.prompt, "answers": [one.text for one in item.answers], "runs": [list(one.runs) for one in item.answers],
        }  # fmt: skip
        self.journal.append({"event": kind, "item": item.id, "annotator": annotator, **values, **about, "time": _now()})
        if kind != CORRECTION:
            self._leases.pop(item.id, None)
        self._write()

    def _judges(self) -> dict[str, list[str]]:
        """Return who judged each item, in order."""
        found: dict[str, list[str]] = {}
        for event in self.judgments():
            found.setdefault(event["item"], []).append(event["annotator"])
        return found

    def _skips(self) -> dict[str, set[str]]:
        found: dict[str, set[str]] = {}
        for event in self.journal.active.values():
            if event["event"] == SKIP:
                found.setdefault(event["item"], set()).add(event["annotator"])
        return found

    def _write(self) -> None:
        """Write the files that are made of the events."""
        write_records(self.out, [row for event in self.judgments() if (row := preference_row(event)) is not None])
        corrected = [event for event in self.journal.active.values() if event["event"] == CORRECTION]
        if corrected or self.corrections.exists():
            write_records(self.corrections, [correction_row(event) for event in corrected])


def preference_row(event: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return a judgment as a record for `train`: a ranking, the best first, and the best and the worst answer; None for a tie of all."""
    ranks, answers, runs = event["ranks"], event["answers"], event["runs"]
    order = sorted(range(len(ranks)), key=lambda i: ranks[i])
    if ranks[order[0]] == ranks[order[-1]]:
        return None
    row = {
        "prompt": event["prompt"], "answers": [answers[i] for i in order], "ranks": [ranks[i] for i in order],
        "chosen": answers[order[0]], "rejected": answers[order[-1]], "runs": [runs[i] for i in order],
        "annotator": event["annotator"],
    }  # fmt: skip
    return row | ({"comment": event["comment"]} if event.get("comment") else {})


def correction_row(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return a correction as a record for `train sft`."""
    return {
        "prompt": event["prompt"], "completion": event["text"], "original": event["answers"][event["answer"]],
        "annotator": event["annotator"],
    }  # fmt: skip


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
