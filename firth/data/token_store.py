"""The token store: a corpus as one memory-mapped array of token ids, with the offsets of its documents.

    store/tokens.bin       uint16 (uint32 from 65537 ids on), every document as [bos] text [eos]
    store/offsets.bin      int64 (documents + 1,): document i is tokens[offsets[i]:offsets[i+1]]
    store/bytes.bin        int64 (documents,): UTF-8 bytes of its text, so that bits per byte are exact
    store/manifest.json    tokenizer, dtype, counts, content hashes, and its own digest; written last

A store is built in `store.partial` and renamed when it is complete, so a directory that exists is complete. An interrupted
build resumes (see `_Build`). bos is left out if the tokenizer has none, as T5's, or is configured not to add it, as GPT-2's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from firth.corpora.readers import Document
from firth.corpora.remote import Address
from firth.data.stored_arrays import RemoteStoredFile, StoredArray, StoredFile, StoredOffsets, block_hashes
from firth.io.atomic import FULL
from firth.io.integrity import check_digest, digest, with_digest
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.workers import WORTH_CHARACTERS, Encode, Workers, cores
from firth.types import UserError

FORMAT = 2
FILES = ("tokens.bin", "offsets.bin", "bytes.bin")
STAMPS_FILE = "stamps.bin"
STAMP_BYTES = 16
PART_CHARACTERS = 1 << 18
"""Characters encoded as one text. A longer document is split before a space, so a 50 MB line costs what a short one does;
byte-level tokenizers split there anyway, others may split one word in a quarter of a million differently.
"""
CHUNK_CHARACTERS = 1 << 21
"""Characters encoded at once: enough to keep all cores busy, while the tokenizer's memory stays within 200 MB."""
WORKER_CHUNK_CHARACTERS = 1 << 19
"""Characters that a worker process encodes at once: a tenth of a second, so that all workers end at about the same time."""

LENGTHS_READ = 1 << 16
"""Documents whose lengths are read at once."""

TOKENS_COUNTED = 1 << 20
"""Tokens that are counted at once."""

Chunk = list[tuple[str, bool]]
"""Texts that are encoded at once: (part of a document, whether it is the last part)."""


REBUILD = "delete {}, and the next run builds it again"
"""Advice in errors about a damaged store."""


@dataclass(frozen=True)
class StorePart:
    """One part of a token store: a directory with the files of `FILES` and their manifest.

    Args:
        directory: The directory.
        facts: "documents", "tokens", "bytes", "dtype", "opened" and "content" (a digest) of its manifest.
        advice: What the user can do if it is damaged.
    """

    directory: Path | Address
    facts: Mapping[str, Any]
    advice: str

    @classmethod
    def open(cls, directory: Path, advice: str) -> StorePart:
        """Open the part in a directory by its manifest."""
        return cls(directory, read_manifest(directory, advice), advice)

    @property
    def lengths(self) -> dict[str, int]:
        """Numbers in each file."""
        documents = self.facts["documents"]
        return dict(zip(FILES, (self.facts["tokens"], documents + 1, documents), strict=True))

    def check_sizes(self) -> None:
        """Raise a UserError if a file is missing, or is longer or shorter than it was written.

        In an object store that is found when the file is read.
        """
        if isinstance(self.directory, Address):
            return
        for name, length in self.lengths.items():
            file, size = self.directory / name, length * self.dtype(name).itemsize
            if not file.exists() or file.stat().st_size != size:
                raise UserError(f"{file} does not have the {size} bytes that were written: {self.advice}")

    def dtype(self, name: str) -> np.dtype:
        """Return the type of the numbers in a file."""
        return np.dtype(self.facts["dtype"] if name == FILES[0] else np.int64)

    def file(self, name: str) -> StoredFile:
        """Return one of its files, which is mapped when it is first read."""
        facts = self.dtype(name), self.lengths[name], lambda: self._hashes(name), self.advice
        place = self.directory / name
        return RemoteStoredFile(place, *facts) if isinstance(place, Address) else StoredFile(place, *facts)

    def _hashes(self, name: str) -> list[str]:
        """Return the block hashes of a file.

        Raises:
            UserError: The manifest is damaged, or is that of another content.
        """
        blocks = self.facts.get("blocks")
        if blocks is None:
            manifest = read_manifest(self.directory, self.advice)
            blocks = manifest["blocks"]
            if manifest["content"] != self.facts["content"]:
                raise UserError(f"{self.directory} does not have the content that was written: {self.advice}")
        found: list[str] = blocks[name]
        return found


def read_manifest(directory: Path | Address, advice: str) -> dict[str, Any]:
    """Return the manifest of a token store.

    Args:
        directory: The store.
        advice: What the user can do if it is damaged.

    Raises:
        UserError: The manifest is missing, damaged or of another version.
    """
    path = directory / "manifest.json"
    if not path.exists():
        raise UserError(f"{directory} is not a token store (it has no manifest.json): build it first")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise UserError(f"{path} is truncated or damaged: {advice}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} does not have store format {FORMAT}, which this version of firth reads: {advice}")
    check_digest(manifest, path, advice)
    return manifest


class TokenStore:
    """An open store of one part or several. tokens (n,), offsets (documents + 1,) and bytes (documents,) are read-only.

    Memory does not depend on the number of documents: all three are read from their files.

    Args:
        directory: The store, for messages.
        manifest: "tokenizer", "dtype", "opened", "documents", "tokens", "bytes", "counts" and "content" of all parts.
        parts: The parts, in order; a store that is not a corpus has one.
    """

    def __init__(self, directory: Path | Address, manifest: Mapping[str, Any], parts: Sequence[StorePart]) -> None:
        self.directory, self.manifest = directory, manifest
        tokens, offsets, sizes = ([part.file(name) for part in parts] for name in FILES)
        self.tokens = StoredArray(tokens)
        self.offsets = StoredOffsets(offsets, [part.facts["tokens"] for part in parts])
        self.bytes = StoredArray(sizes)

    def __len__(self) -> int:
        """Number of documents."""
        return int(self.manifest["documents"])

    @property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text of all documents."""
        return int(self.manifest["bytes"])

    @property
    def opened(self) -> bool:
        """Whether every document begins with bos."""
        return bool(self.manifest["opened"])

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Yield the tokens of the text of each document, without special ones, LENGTHS_READ documents at a time."""
        for start in range(0, len(self), LENGTHS_READ):
            yield np.diff(self.offsets[start : start + LENGTHS_READ + 1]) - self.opened - 1

    def count_tokens(self, size: int) -> np.ndarray:
        """Return the count of each id, (size,) int64; the tokens are read in stretches."""
        counts = np.zeros(size, np.int64)
        for start in range(0, len(self.tokens), TOKENS_COUNTED):
            counts += np.bincount(self.tokens[start : start + TOKENS_COUNTED], minlength=size)
        return counts

    @classmethod
    def open(cls, directory: Path | str, tokenizer: Tokenizer | None = None) -> TokenStore:
        """Open a complete store.

        Args:
            directory: The store.
            tokenizer: If given, the tokenizer that the store must have been built with.

        Raises:
            UserError: The store is missing, damaged, or built with another tokenizer.
        """
        directory = Path(directory)
        part = StorePart.open(directory, REBUILD.format(directory))
        if tokenizer is not None:
            check_store_tokenizer(directory, part.facts["tokenizer"], tokenizer)
        part.check_sizes()
        return cls(directory, part.facts, [part])

    @classmethod
    def build(
        cls,
        documents: Iterable[Document],
        tokenizer: Tokenizer,
        directory: Path | str,
        *,
        stats: Callable[[], Mapping[str, int]] = dict,
        progress: Callable[[int], None] | None = None,
        workers: int | None = None,
    ) -> TokenStore:
        """Encode all documents into `directory`, which must not exist yet.

        Args:
            documents: Documents to encode; they are read once, in order.
            tokenizer: The tokenizer.
            directory: Directory of the store.
            stats: Returns the reader's counts after everything has been read.
            progress: Receives the number of bytes so far.
            workers: Number of worker processes, None: one per core. The files are the same for any number; a text of less than
                WORTH_CHARACTERS is encoded by this process.

        Raises:
            UserError: The directory exists, another process builds the store, the disk is full, or there are no documents.
        """
        directory = Path(directory)
        if directory.exists():
            raise UserError(f"{directory} exists already: open it, or delete it to build it again")
        try:
            with _Build(directory, tokenizer, cores() if workers is None else workers) as build:
                build.extend(documents, progress or _silent)
                build.finish(stats())
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(
                f"{directory}: the store could not be written ({error.strerror}): free disk space and start again; "
                "the build will resume"
            ) from None
        return cls.open(directory, tokenizer)


def check_store_tokenizer(directory: Path | Address, built_with: str, tokenizer: Tokenizer) -> None:
    """Raise a UserError if a store was built with another tokenizer (a digest) than the given one."""
    if built_with != tokenizer.digest:
        raise UserError(
            f"{directory}: the store was built with another tokenizer ({built_with[:12]}, not {tokenizer.digest[:12]}): "
            "build the store again, or use the tokenizer it was built with"
        )


class _Build:
    """The files of a store that is being built. Each document also has a stamp: 8 bytes of hash of its text and of its ids.

    So an interrupted build needs no journal: the leading documents whose text is unchanged, and whose ids on disk match their
    stamps, are kept; the files are truncated after them and the rest is encoded.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, workers: int = 1) -> None:
        self.directory, self.tokenizer, self.workers = directory, tokenizer, workers
        self.partial = directory.with_name(directory.name + ".partial")
        roles, size = tokenizer.vocab.roles, tokenizer.vocab.size
        self.dtype = np.dtype(np.uint16 if size <= 1 << 16 else np.uint32)
        begins = "bos" in roles and tokenizer.bos is not False
        self.before = np.array([roles["bos"]] if begins else [], self.dtype)
        self.after = np.array([tokenizer.vocab.eos], self.dtype)
        self.documents = self.tokens = self.bytes = 0

    def __enter__(self) -> _Build:
        self.partial.mkdir(parents=True, exist_ok=True)
        self._lock = (self.partial / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(f"{self.partial}: another process is building this store: wait for it to end") from None
        return self

    def __exit__(self, *raised: object) -> None:
        self._lock.close()

    def extend(self, documents: Iterable[Document], progress: Callable[[int], None]) -> None:
        """Append the documents, except those that an earlier build has left."""
        rest = self._resume(iter(documents))
        progress(self.bytes)
        files = {name: (self.partial / name).open("ab") for name in (*FILES, STAMPS_FILE)}
        try:
            ids, raw = [self.before], bytearray()
            with closing(self._encoded(rest)) as encoded:
                for chunk, found in encoded:
                    for (text, last), some in zip(chunk, found, strict=True):
                        ids.append(some.astype(self.dtype))
                        raw += text.encode()
                        if last:
                            row = np.concatenate((*ids, self.after))
                            self._count(len(row), len(raw))
                            files["tokens.bin"].write(row.tobytes())
                            files["offsets.bin"].write(np.int64(self.tokens).tobytes())
                            files["bytes.bin"].write(np.int64(len(raw)).tobytes())
                            files[STAMPS_FILE].write(_stamp(raw) + _stamp(row.tobytes()))
                            ids, raw = [self.before], bytearray()
                    progress(self.bytes)
        finally:
            for file in files.values():
                file.close()

    def _encoded(self, documents: Iterator[Document]) -> Generator[tuple[Chunk, list[np.ndarray]]]:
        """Yield chunks of the documents' texts with their ids, in order.

        Text after the first WORTH_CHARACTERS is encoded by worker processes.
        """
        parts = (part for document in documents for part in _parts(document.text))
        encoded_here = 0
        while chunk := _chunk(parts, CHUNK_CHARACTERS):
            if self.workers > 1 and encoded_here >= WORTH_CHARACTERS:
                break
            yield chunk, self.tokenizer.encode_batch([text for text, _ in chunk])
            encoded_here += sum(len(text) for text, _ in chunk)
        else:
            return
        sent: deque[Chunk] = deque()

        def texts() -> Iterator[list[str]]:
            more = chunk
            while more:
                sent.append(more)
                yield [text for text, _ in more]
                more = _chunk(parts, WORKER_CHUNK_CHARACTERS)

        with Workers(Encode(self.tokenizer), self.workers) as workers:
            for found in workers.map(texts()):
                yield sent.popleft(), found

    def _count(self, tokens: int, size: int) -> None:
        self.documents += 1
        self.tokens += tokens
        self.bytes += size

    def _resume(self, documents: Iterator[Document]) -> Iterator[Document]:
        """Truncate the files to what is valid of an earlier build; return the documents that remain to be encoded."""
        tokenizer_file, paths = self.partial / "tokenizer", [self.partial / name for name in (*FILES, STAMPS_FILE)]
        if not (tokenizer_file.exists() and tokenizer_file.read_text("utf-8") == self.tokenizer.digest):
            for path in paths:
                path.write_bytes(np.int64(0).tobytes() if path.name == "offsets.bin" else b"")
            tokenizer_file.write_text(self.tokenizer.digest, "utf-8")  # last: without it the build starts over
        offsets, sizes = (
            np.frombuffer(path.read_bytes()[: path.stat().st_size // 8 * 8], np.int64) for path in paths[1:3]
        )
        stamps = paths[3].read_bytes()
        existing = min(len(offsets) - 1, len(sizes), len(stamps) // STAMP_BYTES)
        with paths[0].open("rb") as tokens:
            for document in documents:
                i, raw = self.documents, document.text.encode()
                row = b""
                if i < existing and sizes[i] == len(raw) and offsets[i] == self.tokens:
                    row = tokens.read(max(int(offsets[i + 1] - offsets[i]), 0) * self.dtype.itemsize)
                if not row or stamps[STAMP_BYTES * i :][:STAMP_BYTES] != _stamp(raw) + _stamp(row):
                    documents = chain([document], documents)
                    break
                self._count(len(row) // self.dtype.itemsize, len(raw))
        item = (
            self.dtype.itemsize * self.tokens,
            8 * (self.documents + 1),
            8 * self.documents,
            STAMP_BYTES * self.documents,
        )
        for path, size in zip(paths, item, strict=True):
            os.truncate(path, size)
        return documents

    def finish(self, counts: Mapping[str, int]) -> None:
        """Write the manifest and rename the store."""
        if not self.documents:
            raise UserError(
                f"{self.directory}: there are no documents to build a store from; the counts are {dict(counts)}"
            )
        blocks = {name: block_hashes(self.partial / name) for name in FILES}
        manifest = {
            "format": FORMAT,
            "tokenizer": self.tokenizer.digest,
            "dtype": self.dtype.name,
            "opened": bool(len(self.before)),
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "counts": dict(counts),
            "sizes": {name: (self.partial / name).stat().st_size for name in FILES},
            "content": digest(blocks),
            "blocks": blocks,
        }
        (self.partial / "manifest.json").write_text(json.dumps(with_digest(manifest)) + "\n", "utf-8")
        for name in (*FILES, "manifest.json"):
            with (self.partial / name).open("rb") as file:
                os.fsync(file.fileno())
        for name in (STAMPS_FILE, "tokenizer", "lock"):
            (self.partial / name).unlink()
        if self.directory.exists():
            raise UserError(f"{self.directory}: another process has built this store meanwhile: open it")
        os.replace(self.partial, self.directory)


def _silent(read: int) -> None:
    """Progress callback that does nothing."""


def _chunk(parts: Iterator[tuple[str, bool]], characters: int) -> Chunk:
    """Return the next parts, of about `characters` characters together; [] at the end."""
    chunk: Chunk = []
    size = 0
    while size < characters and (part := next(parts, None)) is not None:
        chunk.append(part)
        size += len(part[0])
    return chunk


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Split a text into parts of at most PART_CHARACTERS, before white space if there is any in the second half."""
    start = 0
    while len(text) - start > PART_CHARACTERS:
        lowest, highest = start + PART_CHARACTERS // 2, start + PART_CHARACTERS
        cut = max(text.rfind(" ", lowest, highest), text.rfind("\n", lowest, highest))
        while cut > lowest and text[cut - 1].isspace():  # a run of white space is tokenized as a whole
            cut -= 1
        cut = cut if cut > lowest else highest
        yield text[start:cut], False
        start = cut
    yield text[start:], True


def _stamp(raw: bytes | bytearray) -> bytes:
    return hashlib.blake2b(raw, digest_size=8).digest()
