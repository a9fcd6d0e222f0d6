"""Build one part of a prepared corpus, in a worker process: fingerprint its documents, and encode those that are kept.

`serve` is the worker: it reads jobs as lines of JSON from its standard input, and writes progress, results and errors as lines of
JSON. A part is a function of the bytes of its pieces, the settings and the documents to drop, so who builds it does not matter.
"""

from __future__ import annotations

import itertools
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firth.corpora.input_files import ReadStats
from firth.corpora.readers import Document
from firth.data.corpus import PART_FILE, SPLITS
from firth.data.filters import RULES, FilterConfig, Filters, Fingerprints
from firth.data.pieces import Piece
from firth.data.split import content_key, place
from firth.data.stored_arrays import block_hash
from firth.data.token_store import TokenStore
from firth.io.atomic import refusals, write_text
from firth.io.integrity import digest, read_record, write_record
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

BUILDING = "building.json"
"""The key of a part that is being built."""

SCAN = "scan"
"""Directory of a part with the fingerprints of its documents."""

DROPPED = "dropped.npy"
"""File of a part: for each document the number of the rule that drops it, or 0."""

PROGRESS_BYTES = 1 << 20
"""Bytes of text between two messages of a worker."""

EXAMPLES = 3
"""Dropped documents of each rule that a part keeps for the report."""


@dataclass(frozen=True)
class PartSettings:
    """What a part depends on besides its text.

    Args:
        tokenizer: Digest of the tokenizer.
        text_field: The field of a record that holds the text.
        split_by: What a document of a text file is ("file", "blank", "line").
        validation_fraction: Fraction of the documents to hold out.
        part_bytes: Bytes of text in a part, about.
        filters: Which documents are dropped.
    """

    tokenizer: str
    text_field: str = "text"
    split_by: str = "file"
    validation_fraction: float = 0.0
    part_bytes: int = 1 << 27
    filters: FilterConfig = FilterConfig()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        found: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return found

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> PartSettings:
        """Return the settings with these fields."""
        return cls(**{**fields, "filters": FilterConfig(**fields["filters"])})

    def holds_out(self, document: Document) -> bool:
        """Return whether a document is held out: by its own name if its record has one, else by its content."""
        if not self.validation_fraction:
            return False
        key = document.name if document.named else f"{content_key(document.text):016x}"
        return place(key) < self.validation_fraction


@dataclass(frozen=True)
class Part:
    """A part of a corpus that is prepared.

    Args:
        directory: The directory of the part.
        pieces: What it is made of.
        settings: The settings.
    """

    directory: Path
    pieces: tuple[Piece, ...]
    settings: PartSettings

    def documents(self, counts: ReadStats) -> Iterator[Document]:
        """Yield all documents of its pieces."""
        for piece in self.pieces:
            yield from piece.documents(self.settings.text_field, self.settings.split_by, counts)

    def record(self) -> dict[str, Any]:
        """Return the content of part.json; {} if the part is not complete, or was made of other files or settings.

        A file that has another modification time is hashed.
        """
        file = self.directory / PART_FILE
        if not file.is_file():
            return {}
        record = read_record(file, {"pieces": list, "settings": str}, f"delete {self.directory}")
        if record["settings"] != digest(self.settings.to_dict()):
            return {}
        if record.get("stamps") == [piece.modified for piece in self.pieces]:
            return record if record["pieces"] == self._identities() else {}
        if record["digests"] != [piece.digest() for piece in self.pieces] or record["pieces"] != self._identities():
            return {}
        record |= {"stamps": [piece.modified for piece in self.pieces]}
        write_record(file, record)
        return record

    def _identities(self) -> list[Any]:
        found: list[Any] = json.loads(json.dumps([piece.identity for piece in self.pieces]))
        return found

    def scan(self, progress: Callable[[int], None]) -> None:
        """Apply the rules that concern one document, and write the fingerprints of the others."""
        place, digests = self.directory / SCAN, self._digests()
        key = digest({"digests": digests, "settings": self.settings.to_dict()})
        file = place / "scan.json"
        if file.is_file() and read_record(file, {"key": str}, f"delete {self.directory}")["key"] == key:
            return
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        filters, counts = Filters(self.settings.filters), ReadStats()
        fingerprints = Fingerprints(self.settings.filters)
        for document in self.documents(counts):
            fingerprints.add(document.text, filters.rule(document.text))
            progress(counts.bytes)
        with refusals(place):
            fingerprints.write(place)
            write_record(file, {"key": key})

    def build(self, progress: Callable[[int], None]) -> None:
        """Encode the documents that are kept, and write part.json last."""
        digests = self._digests()
        drops = self.directory / DROPPED
        dropped = np.load(drops) if drops.is_file() else None
        key = digest(
            {
                "digests": digests,
                "settings": self.settings.to_dict(),
                "drops": "" if dropped is None else block_hash(dropped.tobytes()),
            }
        )
        if not self._continues(key):
            (self.directory / PART_FILE).unlink(missing_ok=True)
            for split in SPLITS:
                shutil.rmtree(self.directory / split, ignore_errors=True)
                shutil.rmtree(self.directory / f"{split}.partial", ignore_errors=True)
            write_text(self.directory / BUILDING, json.dumps({"key": key}))
        tokenizer = Tokenizer.load(self.directory.parents[1] / "tokenizer")
        examples: dict[str, list[str]] = self._examples(dropped)
        counted = False
        for split in SPLITS:
            counts = ReadStats()
            documents = self._kept(counts, dropped, split)
            first = next(documents, None)
            if first is not None and not (self.directory / split).exists():
                TokenStore.build(
                    itertools.chain([first], documents), tokenizer, self.directory / split,
                    stats=dict if counted else counts.rows, progress=progress, workers=1,
                )  # fmt: skip
            counted = counted or first is not None
        for piece in self.pieces:
            piece.check_unchanged()
        numbers = {} if dropped is None else {RULES[i]: int(n) for i, n in enumerate(np.bincount(dropped)) if i and n}
        (self.directory / BUILDING).unlink()
        write_record(
            self.directory / PART_FILE,
            {
                "pieces": self._identities(), "digests": digests, "stamps": [piece.modified for piece in self.pieces],
                "settings": digest(self.settings.to_dict()), "dropped": numbers, "examples": examples,
            },
        )  # fmt: skip

    def _digests(self) -> list[str]:
        self.directory.mkdir(parents=True, exist_ok=True)
        for piece in self.pieces:
            piece.check_unchanged()
        return [piece.digest() for piece in self.pieces]

    def _continues(self, key: str) -> bool:
        """Return whether an interrupted build of the same content left something."""
        file = self.directory / BUILDING
        try:
            return file.is_file() and json.loads(file.read_text("utf-8")).get("key") == key
        except ValueError:
            return False

    def _kept(self, counts: ReadStats, dropped: np.ndarray | None, split: str) -> Iterator[Document]:
        for number, document in enumerate(self.documents(counts)):
            if (dropped is None or not dropped[number]) and self.settings.holds_out(document) == (split == "valid"):
                yield document

    def _examples(self, dropped: np.ndarray | None) -> dict[str, list[str]]:
        """Return the beginnings of the first documents that each rule drops."""
        if dropped is None or not dropped.any():
            return {}
        last = max(int(np.flatnonzero(dropped == rule)[:EXAMPLES].max()) for rule in np.unique(dropped[dropped > 0]))
        examples: dict[str, list[str]] = {}
        for number, document in enumerate(itertools.islice(self.documents(ReadStats()), last + 1)):
            if dropped[number]:
                _note(examples, RULES[dropped[number]], document)
        return examples


def _note(examples: dict[str, list[str]], rule: str, document: Document) -> None:
    """Add a document to the examples of a rule, as its name and the beginning of its text."""
    found = examples.setdefault(rule, [])
    if len(found) < EXAMPLES:
        found.append(f"{document.name}: {' '.join(document.text[:300].split())[:100]}")


def serve() -> None:
    """Run a worker: do the jobs that come as lines of JSON, until the input is closed."""
    with suppress(BrokenPipeError):  # the process that sends the jobs has ended
        for line in sys.stdin:
            _do(json.loads(line))


def _do(job: Mapping[str, Any]) -> None:
    """Do one job and write its messages."""
    pieces, settings = tuple(map(Piece.from_dict, job["pieces"])), PartSettings.from_dict(job["settings"])
    directory = Path(job["directory"])
    reported = 0

    def progress(size: int) -> None:
        nonlocal reported
        if size - reported >= PROGRESS_BYTES:
            reported = size
            print(json.dumps({"bytes": size}), flush=True)

    try:
        with refusals(directory), ExitStack() as copies:
            directory.mkdir(parents=True, exist_ok=True)
            part = Part(directory, tuple(copies.enter_context(piece.copied(directory)) for piece in pieces), settings)
            (part.scan if job["task"] == "scan" else part.build)(progress)
    except UserError as error:
        print(json.dumps({"error": str(error)}), flush=True)
    else:
        print(json.dumps({"done": True}), flush=True)
