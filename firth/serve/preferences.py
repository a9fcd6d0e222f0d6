"""Judgments of people on answers to prompts, and the files that they become.

    preferences.jsonl                 rankings and preferences, to train on
    preferences.corrections.jsonl     corrected answers, as prompts with completions
    preferences.events.jsonl          what annotators did, one event a line

All three are only ever appended to. The first two are made of the events, whose ids their rows have. An event is on the disk before
the annotator gets the next prompt. A line that a killed process left incomplete is removed, and rows that are missing are appended.
`undo` is an event too: it revokes an earlier one, by its id. In the first two files it is a row {"id": 10, "undo": 7, "annotator":
"ann"}, which every reader of records skips together with the row that it takes back (`firth.corpora.readers`).

    {"id": 7, "event": "judgment", "item", "annotator", "token", "ranks": [1, 2, 2], "prompt", "answers", "runs", "sampling", ...}
    {"id": 8, "event": "skip", ...}   {"id": 9, "event": "correction", "answer": 0, "text", ...}   {"id": 10, "event": "undo", "of": 7, ...}

What is shown has a token. A judgment, skip or correction that brings another one is refused (`StaleError`): the annotator has judged
the item since, in another window, and sees the answers in another order now. A repeated request is recorded once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from firth.io.atomic import make_directory, refusals
from firth.io.json_files import read_rows, row_line
from firth.tokenizer.vocab import replace_lone_surrogates
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


RowOf = Callable[[Mapping[str, Any]], dict[str, Any] | None]
"""Returns the record for `train` of an event; None for an event without one."""
LEASE_SECONDS = 900.0
"""How long a prompt is reserved for the annotator who has it on the screen."""
STALE = "this prompt was judged, skipped or undone in the meantime, perhaps in another window: nothing was recorded"


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

    @cached_property
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
        named = runs.setdefault(replace_lone_surrogates(text).strip(), [])
        if run not in named:
            named.append(run)
    answers = tuple(WrittenAnswer(text, tuple(named)) for text, named in runs.items())
    return JudgedItem(prompt, answers) if len(answers) > 1 else None


class StaleError(UserError):
    """What an annotator saw is not what there is now."""


@dataclass(frozen=True)
class ShownItem:
    """An item as an annotator sees it.

    Args:
        item: The item.
        order: The answer in each place.
        token: Names what is shown; a judgment, skip or correction must bring it back.
    """

    item: JudgedItem
    order: tuple[int, ...]
    token: str

    @property
    def answers(self) -> list[str]:
        """The texts in the order shown."""
        return [self.item.answers[i].text for i in self.order]


class Preferences:
    """Prompts to judge, who gets which, and the judgments. All methods may be called from several threads.

    Args:
        out: The file of rankings and preferences.
        twice: Share of the prompts that two annotators get; one who works alone gets them again at the end.
        seed: Seed of the order in which answers are shown, and of which prompts are given twice.
        sampling: Names how the answers are sampled; see `known`.

    Raises:
        UserError: A file is one of something else, or another process writes it.
    """

    def __init__(self, out: Path, twice: float = 0.1, seed: int = 0, sampling: str = "") -> None:
        self.out, self.twice, self.seed, self.sampling = out, twice, seed, sampling
        self.corrections = out.with_name(f"{out.stem}.corrections{out.suffix}")
        self.journal = Journal(out.with_name(f"{out.stem}.events{out.suffix}"))
        self.items: dict[str, JudgedItem] = {}
        self._leases: dict[str, tuple[str, float]] = {}
        self._lock = threading.RLock()
        self._sizes = {out: -1, self.corrections: -1}  # bytes as they were left; another number: see what the file has
        self._published = {out: 0, self.corrections: 0}  # events whose rows the file has
        try:
            for path, kind in ((out, JUDGMENT), (self.corrections, CORRECTION)):
                own = any(event["event"] == kind for event in self.journal.events)
                if not own and path.is_file() and path.stat().st_size:
                    raise UserError(f"{path}: this file was not written by `firth annotate`: give another --out")
            self._publish()
        except BaseException:
            self.journal.close()
            raise

    def known(self) -> dict[str, list[JudgedItem]]:
        """Return the items of each prompt that were shown before and whose answers were sampled in the same way."""
        found: dict[str, dict[str, JudgedItem]] = {}
        for event in self.journal.events:
            if event.get("sampling") == self.sampling and event["event"] != UNDO:
                written = zip(event["answers"], event["runs"], strict=True)
                item = JudgedItem(event["prompt"], tuple(WrittenAnswer(text, tuple(runs)) for text, runs in written))
                found.setdefault(item.prompt, {})[item.id] = item
        return {prompt: list(items.values()) for prompt, items in found.items()}

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

    def shown(self, item: JudgedItem, annotator: str) -> ShownItem:
        """Return an item as an annotator sees it now."""
        with self._lock:
            order = tuple(self.order(item, annotator))
            turn = self.journal.turns[annotator, item.id]
            text = json.dumps([self.seed, annotator, item.id, turn, [item.answers[i].text for i in order]])
            return ShownItem(item, order, hashlib.sha256(text.encode()).hexdigest()[:16])

    def judge(
        self, annotator: str, id: str, token: str, shown_ranks: Sequence[int], comment: str = "", seconds: float = 0.0
    ) -> None:
        """Record a ranking.

        Args:
            annotator: Who judged.
            id: The item.
            token: The token of what was shown.
            shown_ranks: The rank of each answer in the order in which they were shown; 1 is the best, equal ranks are a tie.
            comment: A remark.
            seconds: Time that it took.

        Raises:
            UserError: There is no such item, or the ranks are not one for each of its answers.
            StaleError: The token is of something else.
        """
        with self._lock:
            item = self._item(id)
            if len(shown_ranks) != len(item.answers) or not all(1 <= rank <= len(item.answers) for rank in shown_ranks):
                raise UserError(
                    f"ranks: give each of the {len(item.answers)} answers a rank from 1 to {len(item.answers)}"
                )
            content = {"shown_ranks": list(shown_ranks), "comment": comment}
            if self._is_new(JUDGMENT, annotator, item, token, content):
                ranks = [0] * len(item.answers)
                for place, answer in enumerate(self.order(item, annotator)):
                    ranks[answer] = shown_ranks[place]
                self._record(
                    JUDGMENT, annotator, item, {"token": token, "ranks": ranks, **content, "seconds": round(seconds, 1)}
                )

    def skip(self, annotator: str, id: str, token: str) -> None:
        """Record that an annotator does not judge a prompt; others still get it."""
        with self._lock:
            item = self._item(id)
            if self._is_new(SKIP, annotator, item, token, {}):
                self._record(SKIP, annotator, item, {"token": token})

    def correct(self, annotator: str, id: str, token: str, place: int, text: str) -> None:
        """Record how an answer should read.

        Args:
            annotator: Who corrected it.
            id: The item.
            token: The token of what was shown.
            place: The place of the answer in the order in which they were shown, from 0.
            text: The corrected answer.

        Raises:
            UserError: There is no such item or answer, or the text is blank.
            StaleError: The token is of something else.
        """
        with self._lock:
            item = self._item(id)
            if not 0 <= place < len(item.answers) or not text.strip():
                raise UserError("a correction needs one of the answers and a text")
            content = {"place": place, "text": text.strip()}
            if self._is_new(CORRECTION, annotator, item, token, content):
                answer = self.order(item, annotator)[place]
                self._record(CORRECTION, annotator, item, {"token": token, "answer": answer, **content})

    def last(self, annotator: str) -> int | None:
        """Return the id of the last event of an annotator that was not undone; None if there is none."""
        with self._lock:
            active = self.journal.active
            return next((id for id in reversed(active) if active[id]["annotator"] == annotator), None)

    def undo(self, annotator: str, id: int | None = None) -> dict[str, Any] | None:
        """Revoke the last event of an annotator and return it; None if there is none.

        Args:
            annotator: Who undoes.
            id: The event that must be the last one, or that was undone already; None for whichever is the last.

        Raises:
            StaleError: It is not the last one.
        """
        with self._lock:
            of = self.last(annotator)
            if id is not None and id != of:
                undone = {event["of"] for event in self.journal.events if event["event"] == UNDO}
                named = [
                    event for event in self.journal.events if event["id"] == id and event["annotator"] == annotator
                ]
                if not named or id not in undone:
                    raise StaleError(
                        "something else was recorded in the meantime, perhaps in another window: nothing was undone"
                    )
                self._publish()
                return named[0]
            if of is None:
                return None
            event = self.journal.active[of]
            self.journal.append(
                {"event": UNDO, "item": event["item"], "annotator": annotator, "of": of, "time": _now()}
            )
            if event["item"] in self.items:
                self._leases[event["item"]] = annotator, time.monotonic() + LEASE_SECONDS
            self._publish()
            return event

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

    def _is_new(self, kind: str, annotator: str, item: JudgedItem, token: str, content: Mapping[str, Any]) -> bool:
        """Return whether a request is to be recorded, and not one that is recorded already; raise a StaleError if its token is old."""
        for event in reversed(self.journal.active.values()):
            about = event["event"], event["annotator"], event["item"], event["token"]
            if about == (kind, annotator, item.id, token) and content == {name: event[name] for name in content}:
                self._publish()  # which may be what failed the first time
                return False
        if token != self.shown(item, annotator).token:
            raise StaleError(STALE)
        return True

    def _record(self, kind: str, annotator: str, item: JudgedItem, values: Mapping[str, Any]) -> None:
        about = {
            "prompt": item.prompt, "answers": [one.text for one in item.answers], "runs": [list(one.runs) for one in item.answers],
            "sampling": self.sampling,
        }  # fmt: skip
        self.journal.append({"event": kind, "item": item.id, "annotator": annotator, **values, **about, "time": _now()})
        if kind != CORRECTION:
            self._leases.pop(item.id, None)
        self._publish()

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

    def _publish(self) -> None:
        """Append to the two other files the rows of the events that they do not have."""
        for path, kind, row_of in (
            (self.out, JUDGMENT, preference_row),
            (self.corrections, CORRECTION, correction_row),
        ):
            with refusals(path):
                self._publish_one(path, kind, row_of)

    def _publish_one(self, path: Path, kind: str, row_of: RowOf) -> None:
        exists = path.exists()
        if self._sizes[path] != (path.stat().st_size if exists else 0):
            newest = self.journal.events[-1]["id"] if self.journal.events else -1
            last = drop_unknown_rows(path, newest) if exists else -1
            self._published[path] = sum(event["id"] <= last for event in self.journal.events)
        new = self.journal.events[self._published[path] :]
        rows = [row for event in new if (row := self._row(event, kind, row_of)) is not None]
        if rows or (kind == JUDGMENT and not exists):
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            with path.open("ab", buffering=0) as file:
                self._sizes[path] = -1  # stays if the next line fails
                append_bytes(file.fileno(), lines.encode())
        self._sizes[path] = path.stat().st_size if path.exists() else 0
        self._published[path] = len(self.journal.events)

    def _row(self, event: Mapping[str, Any], kind: str, row_of: RowOf) -> dict[str, Any] | None:
        """Return the row of an event in the file of a kind of events; None if it has none."""
        if event["event"] == UNDO:
            of = self.journal.by_id[event["of"]]
            if of["event"] != kind or row_of(of) is None:
                return None
            return {"id": event["id"], "undo": of["id"], "annotator": event["annotator"]}
        row = row_of(event) if event["event"] == kind else None
        return None if row is None else {"id": event["id"], **row}


def drop_unknown_rows(path: Path, newest: int) -> int:
    """Remove a last line that a killed process left incomplete, and rows of events that are lost; return the last id, -1 for none.

    Args:
        path: The file.
        newest: The id of the last event.

    Raises:
        UserError: The last line has no id.
    """
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    last = -1
    while lines:
        try:
            last = int(json.loads(lines[-1])["id"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(
                f"{path}: the last line is not one of `firth annotate`: remove it, or move the file, which is then written again"
            ) from None
        if last <= newest:
            break
        lines.pop()
    size = sum(map(len, lines))
    if size < len(whole):
        os.truncate(path, size)
    return last if lines else -1


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
