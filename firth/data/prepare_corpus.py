"""Prepare a corpus in parts, in parallel worker processes: `firth prepare TEXT... --out DIR --workers N`.

`plan.json` says which pieces of which files are in which part. The same call again continues: a part whose part.json fits its files and the
settings is kept. Files that are new make parts of their own; a part with a file that has changed or is gone is replaced by new parts.

    1. scan     (with filters) fingerprint the documents of each part; then compare those of all parts, in order
    2. build    encode the documents of each part that are kept
    3. corpus.json
"""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

import numpy as np

from firth.corpora import readers
from firth.corpora.input_files import ReadStats, many
from firth.data import filters
from firth.data.corpus import PART_FILE, PARTS, TOKENIZER, PreparedCorpus, part_directory, total, write_manifest
from firth.data.pieces import Piece, group, list_pieces
from firth.data.prepare_part import DROPPED, EXAMPLES, SCAN, Part, PartSettings
from firth.io.atomic import make_directory, refusals
from firth.io.integrity import read_record, write_record
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.train import train
from firth.tokenizer.workers import WORKER_ENVIRONMENT, cores
from firth.types import LOGGER, LogLine, UserError

PLAN = "plan.json"
TRAINED = "trained.json"
"""File in the directory of a tokenizer that was trained for a corpus, with its algorithm and size."""

BOOT = "import sys; sys.path.insert(0, sys.argv[1]); from firth.data.prepare_part import serve; serve()"
PROGRESS_SECONDS = 10.0


@dataclass(frozen=True)
class TokenizerChoice:
    """The tokenizer of a new corpus.

    Args:
        path: A tokenizer, model or run directory; empty trains one.
        algorithm: Training algorithm (`firth.tokenizer.train`).
        vocab_size: Number of ids.
        sample_bytes: Bytes of text to train on, from all pieces alike.
    """

    path: str = ""
    algorithm: str = "byte-bpe"
    vocab_size: int = 8192
    sample_bytes: int = 50_000_000


def prepare_corpus(
    texts: Sequence[str],
    out: Path,
    *,
    settings: PartSettings,
    tokenizer: TokenizerChoice,
    workers: int | None = None,
    log: LogLine = LOGGER.info,
) -> PreparedCorpus:
    """Prepare text into a corpus, or continue or extend one.

    Args:
        texts: Files, directories and globs.
        out: The directory of the corpus.
        settings: What the parts depend on; `tokenizer` is filled in.
        tokenizer: The tokenizer of a new corpus.
        workers: Number of worker processes; None for one per core.
        log: Receives messages.

    Raises:
        UserError: The text cannot be read, the directory holds a corpus with other settings, the disk is full, or a worker died.
    """
    if readers.is_url(str(out).replace(":/", "://", 1)):
        raise UserError(
            f"{out}: a corpus is written to a file system: choose a directory, and copy it to the store afterwards"
        )
    for text in texts:
        if text.startswith("memory://"):
            raise UserError(
                f"{text}: what is in the memory of a process cannot be read by those that prepare it: name files"
            )
        if out.resolve().is_relative_to(Path(text).expanduser().resolve()):
            raise UserError(
                f"{out} is inside of {text}, all of whose files are prepared: choose an --out outside of it"
            )
    make_directory(out)
    with _locked(out):
        counts = ReadStats()
        pieces = list_pieces(texts, settings.part_bytes, counts)
        if counts.skipped:
            log(
                f"{many(counts.skipped, 'table')} skipped, read as text only where named; the first is {counts.at['skipped']}"
            )
        chosen = _tokenizer(out, tokenizer, pieces, settings, log)
        language_by = settings.filters.language_by or filters.language_method(settings.filters.language)
        settings = replace(
            settings, tokenizer=chosen.digest, filters=replace(settings.filters, language_by=language_by)
        )
        parts = _plan(out, pieces, settings, log)
        todo = {part.directory for part in parts if not part.record()}
        if len(todo) < len(parts):
            log(f"{out}: {many(len(parts) - len(todo), 'part')} of {len(parts)} are complete")
        workers = workers or cores()
        if settings.filters.any:
            unread = [
                part for part in parts if part.directory in todo or not (part.directory / SCAN / "scan.json").is_file()
            ]
            _work("scan", unread, workers, log)
            scans = [part.directory / SCAN for part in parts]
            with refusals(out):
                for part, rules in zip(parts, filters.dropped(scans, settings.filters), strict=True):
                    file = part.directory / DROPPED
                    if part.directory not in todo and not np.array_equal(np.load(file), rules):
                        # An earlier document has gone, of which this part has a copy.
                        (part.directory / PART_FILE).unlink()
                        todo.add(part.directory)
                    if part.directory in todo:
                        np.save(file, rules)
        _work("build", [part for part in parts if part.directory in todo], workers, log)
        return _finish(out, parts, chosen, settings, log)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the lock of a corpus directory."""
    with refusals(out):
        lock = (out / "lock").open("w")
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{out}: another process is preparing this corpus: wait for it to end") from None
        yield


def _tokenizer(
    out: Path, choice: TokenizerChoice, pieces: Sequence[Piece], settings: PartSettings, log: LogLine
) -> Tokenizer:
    """Return the tokenizer of the corpus: the one it has, a copy of the given one, or one trained on a sample of the pieces.

    Raises:
        UserError: The corpus has another tokenizer than the given one, or than the one to train.
    """
    own = out / TOKENIZER
    trained = {"algorithm": choice.algorithm, "vocab_size": choice.vocab_size}
    given = Tokenizer.load(choice.path) if choice.path else None
    if (own / "tokenizer.json").is_file():
        found = Tokenizer.load(own)
        if given is not None and given.digest != found.digest:
            raise UserError(f"{out} was prepared with another tokenizer than {choice.path}: choose another --out")
        before = read_record(own / TRAINED) if given is None and (own / TRAINED).is_file() else trained
        if before != trained:
            raise UserError(
                f"{out} has a tokenizer of --algorithm {before['algorithm']} --vocab-size {before['vocab_size']}: repeat these "
                "options, or choose another --out"
            )
        return found
    train_one = given is None
    if given is None:
        share = choice.sample_bytes / max(1, len(pieces))
        texts = (text for piece in pieces for text in _beginning(piece, settings, share, out))
        given = train(texts, choice.algorithm, choice.vocab_size, sample_bytes=choice.sample_bytes, log=log)
        log(f"{choice.algorithm} tokenizer of {given.vocab.size:,} ids from a sample of the text: {own}")
    shutil.rmtree(own, ignore_errors=True)
    partial = out / f"{TOKENIZER}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    with refusals(out):
        given.save(partial)
        if train_one:
            write_record(partial / TRAINED, trained)
        os.replace(partial, own)
    return Tokenizer.load(own)


def _beginning(piece: Piece, settings: PartSettings, limit: float, out: Path) -> Iterator[str]:
    """Yield the first training documents of a piece, of `limit` bytes together.

    Of lines in an object store twice as many bytes are copied at first, and more if that does not do.
    """
    start, stop = piece.span or (0, piece.size)
    copied, read, size = max(1 << 20, round(2 * limit)), 0, 0
    while True:
        with piece.copied(out, copied) as here:
            found = here.documents(settings.text_field, settings.split_by, ReadStats())
            for document in itertools.islice(found, read, None):
                if size >= limit:
                    return
                read += 1
                if not settings.holds_out(document):
                    yield document.text
                size += len(document.text.encode())
        if not here.copy or not readers.is_lines(Path(piece.path)) or copied >= stop - start:
            return
        copied *= 4


def _plan(out: Path, pieces: Sequence[Piece], settings: PartSettings, log: LogLine) -> list[Part]:
    """Return the parts of the corpus, and write them into plan.json; remove parts of files that have changed.

    Raises:
        UserError: The corpus was prepared with other settings.
    """
    file = out / PLAN
    before = read_record(file, {"settings": dict, "parts": dict}, f"delete {out}") if file.is_file() else {}
    if before and before["settings"] != settings.to_dict():
        names = [name for name, value in settings.to_dict().items() if before["settings"].get(name) != value]
        raise UserError(
            f"{out} was prepared with other settings ({', '.join(names)}): choose another --out, or delete it"
        )
    present = {piece.identity: piece for piece in pieces}
    kept: dict[int, list[Piece]] = {}
    for number, fields in (before["parts"] if before else {}).items():
        some = [Piece.from_dict(one).identity for one in fields]
        if all(identity in present for identity in some):
            kept[int(number)] = [present[identity] for identity in some]
    used = {piece.identity for some in kept.values() for piece in some}
    new = group([piece for piece in pieces if piece.identity not in used], settings.part_bytes)
    lost = sorted(set(map(int, before["parts"] if before else {})) - kept.keys())
    first = max([-1, *kept, *lost]) + 1
    if lost:
        log(f"{out}: {many(len(lost), 'part')} of files that have changed or are gone will be replaced")
    kept |= dict(enumerate(new, first))
    with refusals(out):
        plan = {str(number): [piece.to_dict() for piece in some] for number, some in sorted(kept.items())}
        write_record(file, {"settings": settings.to_dict(), "parts": plan})
    return [Part(part_directory(out, number), tuple(some), settings) for number, some in sorted(kept.items())]


class _Worker:
    """A worker process (`firth.data.prepare_part.serve`), and the part that it works on."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", "-c", BOOT, str(Path(__file__).parents[2])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | WORKER_ENVIRONMENT, process_group=0
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._input, self.output = self.process.stdin, self.process.stdout
        self.part: Part | None = None
        self._received = b""

    def send(self, task: str, part: Part | None) -> None:
        """Send the next part; None if there is none."""
        self.part = part
        if part is not None:
            pieces = [piece.to_dict() for piece in part.pieces]
            job = {
                "task": task,
                "directory": str(part.directory),
                "pieces": pieces,
                "settings": part.settings.to_dict(),
            }
            try:
                self._input.write(json.dumps(job).encode() + b"\n")
                self._input.flush()
            except OSError:
                raise self._died() from None

    def receive(self) -> list[dict[str, Any]]:
        """Return the messages that have arrived."""
        raw = os.read(self.output.fileno(), 1 << 16)
        if not raw:
            raise self._died()
        *lines, self._received = (self._received + raw).split(b"\n")
        return [json.loads(line) for line in lines]

    def end(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        for stream in (self._input, self.output):
            with suppress(OSError):  # a message that it did not read
                stream.close()

    def _died(self) -> UserError:
        """Return the error for a process that ended."""
        code = self.process.wait()
        how = f"killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
        return UserError(
            f"a process that prepares text was {how}, most often because memory ran out: free some and run the same command again"
        )


def _work(task: str, parts: Sequence[Part], workers: int, log: LogLine) -> None:
    """Do a job for each part in worker processes.

    Raises:
        UserError: A part cannot be built, or a worker died. The others are stopped; the next call continues.
    """
    waiting = list(reversed(parts))
    weights = {part: sum(piece.weight for piece in part.pieces) for part in parts}
    done = dict.fromkeys(parts, 0)
    started = shown = time.monotonic()
    pool: list[_Worker] = []
    with DefaultSelector() as selector:
        try:
            for _ in range(min(workers, len(parts))):
                pool.append(_Worker())
                selector.register(pool[-1].output, EVENT_READ, pool[-1])
                pool[-1].send(task, waiting.pop())
            while any(worker.part is not None for worker in pool):
                for key, _ in selector.select():
                    worker: _Worker = key.data
                    for message in worker.receive():
                        if "error" in message:
                            raise UserError(message["error"])
                        assert worker.part is not None
                        done[worker.part] = weights[worker.part] if "done" in message else message["bytes"]
                        if "done" in message:
                            worker.send(task, waiting.pop() if waiting else None)
                if time.monotonic() - shown > PROGRESS_SECONDS:
                    shown = time.monotonic()
                    log(_progress(task, sum(done.values()), sum(weights.values()), shown - started))
        finally:
            for worker in pool:
                worker.end()


def _progress(task: str, done: int, whole: int, seconds: float) -> str:
    """Return a line of progress.

    >>> _progress("build", 30_000_000, 90_000_000, 10.0)
    'build: 30 of about 90 MB, 3.0 MB/s, about 1 min left'
    """
    speed = max(done / seconds, 1.0)
    left = max(0.0, (whole - done) / speed) / 60
    return f"{task}: {done / 1e6:,.0f} of about {whole / 1e6:,.0f} MB, {speed / 1e6:.1f} MB/s, about {max(1, round(left))} min left"


def _finish(
    out: Path, parts: Sequence[Part], tokenizer: Tokenizer, settings: PartSettings, log: LogLine
) -> PreparedCorpus:
    """Write corpus.json, remove what no part needs, and report.

    Raises:
        UserError: No document is kept.
    """
    records = [read_record(part.directory / PART_FILE, None, f"delete {part.directory}") for part in parts]
    examples: dict[str, list[str]] = {}
    for record in records:
        for rule, found in record["examples"].items():
            examples[rule] = (examples.get(rule, []) + found)[:EXAMPLES]
    dropped = total(record["dropped"] for record in records)
    numbers = [int(part.directory.name) for part in parts]
    stored = [
        number for number in numbers if any((part_directory(out, number) / s).is_dir() for s in ("train", "valid"))
    ]
    if not stored:
        why = f"; dropped: {', '.join(f'{n:,} {rule}' for rule, n in dropped.items())}" if dropped else ""
        raise UserError(f"{out}: no document is left to write{why}")
    with refusals(out):
        corpus = write_manifest(out, stored, tokenizer, asdict(settings), {"dropped": dropped, "examples": examples})
        for place in (out / PARTS).iterdir():
            if place.name not in {part.directory.name for part in parts}:
                shutil.rmtree(place, ignore_errors=True)
    for line in describe(corpus):
        log(line)
    return corpus


def describe(corpus: PreparedCorpus) -> list[str]:
    """Return what a corpus holds and what was dropped, as lines."""
    manifest = corpus.manifest
    documents = {
        split: sum(part[split]["documents"] for part in manifest["parts"] if part[split])
        for split in ("train", "valid")
    }
    lines = [
        f"{corpus.directory}: {many(len(manifest['parts']), 'part')}, {many(manifest['documents'], 'document')}, "
        f"{manifest['bytes']:,} bytes, {manifest['tokens']:,} tokens; {documents['valid']:,} documents are held out"
    ]
    kept: dict[str, Any] = manifest["examples"]
    for rule, number in manifest["dropped"].items():
        lines.append(f"dropped, {rule}: {many(number, 'document')}")
        lines += [f"  {example}" for example in kept.get(rule, [])]
    counts = total(part[s]["counts"] for part in manifest["parts"] for s in ("train", "valid") if part[s])
    repaired = {name: n for name, n in counts.items() if name not in ("files", "documents", "bytes")}
    if repaired:
        lines.append("while reading: " + ", ".join(f"{n:,} {name}" for name, n in repaired.items()))
    return lines
