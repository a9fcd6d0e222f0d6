"""Read-only arrays that are stored as files, one file per part: memory-mapped, and verified in blocks when they are first read.

    tokens = StoredArray([StoredFile(part / "tokens.bin", np.dtype(np.uint16), 1000, hashes) for part in parts])
    tokens[990:1010]                     # the end of the first part and the beginning of the second

Positions count over all parts. Nothing per element is held in memory: a file that has been read costs 17 bytes per MB, its block hashes and
which blocks have been checked, and at most MAX_OPEN_FILES files are mapped at once.

Blocks of files in an object store are copied to the disk, and verified, when they are first read. The copy of a file is a temporary
one without a name, so nothing is left when the process ends or is killed. All copies of a process take at most CACHE_BYTES of the
directory of temporary files (TMPDIR), or one file if that is larger; beyond, the copy that was used longest ago is given up.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from firth.corpora.remote import Address
from firth.io.atomic import refusals
from firth.types import UserError

BLOCK_BYTES = 1 << 20
"""Bytes per hash: a first read hashes up to two blocks, 1 ms each, and 100 GB have 4 MB of hashes."""

MAX_OPEN_FILES = 256
"""Files that are mapped at once: a mapped file holds a file descriptor, and a process has 1,024 by default."""


HASH_BYTES = 16


def block_hash(raw: bytes | memoryview) -> str:
    """Return the content hash of a block: BLAKE2b, about 1 GB/s on any CPU (SHA-256 needs special instructions for that)."""
    return hashlib.blake2b(raw, digest_size=HASH_BYTES).hexdigest()


def block_hashes(file: Path) -> list[str]:
    """Return the content hash of each block of a file."""
    with file.open("rb") as opened:
        return [block_hash(block) for block in iter(lambda: opened.read(BLOCK_BYTES), b"")]


class BlockHashes:
    """The content hashes of the blocks of a file, HASH_BYTES each.

    Args:
        file: The file, for messages.
        hashes: Its hashes in hexadecimal.
        advice: What the user can do about a damaged file.
    """

    def __init__(self, file: str, hashes: Sequence[str], advice: str) -> None:
        self._file, self._advice = file, advice
        self._hashes = bytes.fromhex("".join(hashes))

    def __len__(self) -> int:
        return len(self._hashes) // HASH_BYTES

    def check(self, number: int, raw: bytes | memoryview) -> None:
        """Raise a UserError if a block does not have its hash."""
        if block_hash(raw) != self._hashes[number * HASH_BYTES : (number + 1) * HASH_BYTES].hex():
            raise UserError(
                f"{self._file}: block {number} of {len(self)} is damaged (its content hash differs): {self._advice}"
            )


class StoredFile:
    """One file of numbers, mapped when it is first read.

    Args:
        path: The file.
        dtype: Type of its numbers.
        length: How many there are.
        hashes: Returns the content hash of each block.
        advice: What the user can do about a damaged file.
    """

    def __init__(
        self, path: Path, dtype: np.dtype, length: int, hashes: Callable[[], Sequence[str]], advice: str
    ) -> None:
        self.path, self.dtype, self.length = path, dtype, length
        self._hashes, self._advice = hashes, advice
        self._array: np.ndarray | None = None
        self._expected: BlockHashes | None = None
        self._checked = bytearray()
        self._marks: np.ndarray | None = None

    @property
    def disk_bytes(self) -> int:
        """Bytes on the disk that `close` frees."""
        return 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the numbers from `start` to `stop`, verified: a view of the file."""
        array = self._opened()
        self._verify(start, stop)
        return array[start:stop]

    def take(self, places: np.ndarray) -> np.ndarray:
        """Return the numbers at some positions: (n,) -> (n,)."""
        array = self._opened()
        for block in np.unique(places * self.dtype.itemsize // BLOCK_BYTES).tolist():
            if not self._checked[block]:
                per_block = BLOCK_BYTES // self.dtype.itemsize
                self._verify(block * per_block, (block + 1) * per_block)
        found: np.ndarray = array[places]
        return found

    def rank(self, value: int) -> int:
        """Return how many numbers of an ascending file are at most `value`."""
        per_block = BLOCK_BYTES // self.dtype.itemsize
        if self._marks is None:
            self._marks = np.array(self.read(0, self.length)[::per_block])
        block = max(int(self._marks.searchsorted(value, "right")) - 1, 0)
        start = block * per_block
        return start + int(self.read(start, min(start + per_block, self.length)).searchsorted(value, "right"))

    def close(self) -> None:
        """Unmap the file; the next read maps it again. Views that are in use stay valid."""
        self._array = None

    def _opened(self) -> np.ndarray:
        array = self._array
        if array is None:
            if self._expected is None:
                self._expected = BlockHashes(str(self.path), self._hashes(), self._advice)
                self._checked = bytearray(len(self._expected))
            array = np.memmap(self.path, self.dtype, "r", shape=(self.length,)).view(np.ndarray)
            self._array = array
            limit_open_files(self)
        return array

    def _verify(self, start: int, stop: int) -> None:
        """Check the blocks that hold the numbers from `start` to `stop` and have not been checked."""
        size = self.dtype.itemsize
        first, last = start * size // BLOCK_BYTES, -(-stop * size // BLOCK_BYTES)
        if 0 not in self._checked[first:last]:
            return
        assert self._expected is not None
        with self.path.open("rb", buffering=0) as file:  # mapped pages would count as memory of the process
            for i in range(first, min(last, len(self._checked))):
                if not self._checked[i]:
                    file.seek(i * BLOCK_BYTES)
                    self._expected.check(i, file.read(BLOCK_BYTES))
                    self._checked[i] = 1


_open_files: OrderedDict[StoredFile, None] = OrderedDict()
_open_lock = threading.Lock()


def limit_open_files(file: StoredFile, disk_bytes: int = 0) -> None:
    """Note that a file was mapped; unmap others, oldest first, if there are too many, or if they take more than `disk_bytes`."""
    with _open_lock:
        _open_files[file] = None
        _open_files.move_to_end(file)
        held = sum(one.disk_bytes for one in _open_files) if disk_bytes else 0
        while len(_open_files) > MAX_OPEN_FILES or (held > disk_bytes and len(_open_files) > 1):
            oldest = _open_files.popitem(last=False)[0]
            held -= oldest.disk_bytes
            oldest.close()


class StoredArray:
    """The numbers of several files in sequence: an array (n,) that can be sliced, indexed and converted to NumPy.

    Args:
        files: The files, one per part.
    """

    def __init__(self, files: Sequence[StoredFile]) -> None:
        self._files = tuple(files)
        self._starts = list(accumulate(self._lengths(), initial=0))
        """Position of the first number of each file, and the total."""
        self.dtype = self._files[0].dtype

    def _lengths(self) -> list[int]:
        return [file.length for file in self._files]

    @property
    def nbytes(self) -> int:
        """Bytes of all numbers."""
        return len(self) * self.dtype.itemsize

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: slice | int | np.integer | np.ndarray) -> Any:
        if isinstance(index, np.ndarray):
            return self.take(index)
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step < 1:
                raise IndexError(f"a stored array is read forwards, not with step {step}")
            return self.read(start, max(start, stop))[::step]
        at = int(index)
        if not 0 <= at < len(self):
            raise IndexError(f"{at} is not from 0 to {len(self) - 1}: negative indices are not supported")
        return self.read(at, at + 1)[0]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the numbers from `start` to `stop`: a view of a file if they are in one, else a copy."""
        part = self._part(start)
        if stop <= self._starts[part + 1]:
            return self._read(part, start - self._starts[part], stop - self._starts[part])
        pieces = []
        while start < stop:
            first, end = self._starts[part], min(stop, self._starts[part + 1])
            pieces.append(self._read(part, start - first, end - first))
            start, part = end, part + 1
        return np.concatenate(pieces)

    def take(self, places: np.ndarray) -> np.ndarray:
        """Return the numbers at some positions: (n,) -> (n,)."""
        if len(self._files) == 1:
            return self._take(0, places)
        found = np.empty(places.shape, self.dtype)
        parts = np.searchsorted(self._starts, places, "right") - 1
        for part in np.unique(parts).tolist():
            at = parts == part
            found[at] = self._take(part, places[at] - self._starts[part])
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.read(0, len(self)), dtype, copy=copy)

    def _part(self, position: int) -> int:
        """Return the file that holds a position; the last one for the end."""
        return min(bisect_right(self._starts, position), len(self._files)) - 1

    def _read(self, part: int, start: int, stop: int) -> np.ndarray:
        return self._files[part].read(start, stop)

    def _take(self, part: int, places: np.ndarray) -> np.ndarray:
        return self._files[part].take(places)


class StoredOffsets(StoredArray):
    """Where each document begins and the last one ends, (documents + 1,) int64, over the offsets of several parts.

    The file of a part has the offsets within the part: its documents + 1.

    Args:
        files: The files, one per part.
        tokens: Tokens of each part.
    """

    def __init__(self, files: Sequence[StoredFile], tokens: Sequence[int]) -> None:
        super().__init__(files)
        self._tokens = list(accumulate(tokens, initial=0))

    def _lengths(self) -> list[int]:
        """The last offset of a part is the first one of the next."""
        return [file.length - (i < len(self._files) - 1) for i, file in enumerate(self._files)]

    def document_at(self, token: int) -> int:
        """Return the document that holds a token, by its position."""
        part = min(bisect_right(self._tokens, token), len(self._files)) - 1
        return self._starts[part] + self._files[part].rank(token - self._tokens[part]) - 1

    def _read(self, part: int, start: int, stop: int) -> np.ndarray:
        found = super()._read(part, start, stop)
        return found + self._tokens[part] if part else found

    def _take(self, part: int, places: np.ndarray) -> np.ndarray:
        return super()._take(part, places) + self._tokens[part]


CACHE_BYTES = 16 << 30
"""Bytes of all copies of a process."""

REQUEST_BLOCKS = 8
"""Blocks of one request, where several in a row are read."""


class RemoteStoredFile(StoredFile):
    """One file of numbers in an object store.

    Args:
        address: The file.
        dtype: Type of its numbers.
        length: How many there are.
        hashes: Returns the content hash of each block.
        advice: What the user can do about a damaged file.
    """

    def __init__(
        self, address: Address, dtype: np.dtype, length: int, hashes: Callable[[], Sequence[str]], advice: str
    ) -> None:
        super().__init__(Path(address.url), dtype, length, hashes, advice)
        self._address = address
        self._copy: _Copy | None = None

    @property
    def disk_bytes(self) -> int:
        copy = self._copy
        return 0 if copy is None else copy.num_bytes

    def read(self, start: int, stop: int) -> np.ndarray:
        size = self.dtype.itemsize
        return self._holding(range(start * size // BLOCK_BYTES, -(-stop * size // BLOCK_BYTES)))[start:stop]

    def take(self, places: np.ndarray) -> np.ndarray:
        blocks = np.unique(places * self.dtype.itemsize // BLOCK_BYTES).tolist()
        found: np.ndarray = self._holding(blocks)[places]
        return found

    def close(self) -> None:
        """Give up the copy. Views that are in use stay valid."""
        self._copy = None

    def _holding(self, blocks: Sequence[int]) -> np.ndarray:
        """Return the array, of which these blocks can be read."""
        copy = self._copy
        if copy is None:
            expected = BlockHashes(str(self._address), self._hashes(), self._advice)
            copy = self._copy = _Copy(self._address, self.dtype, self.length, expected)
        copied = copy.num_bytes
        copy.fill(blocks)
        if not copied or copy.num_bytes > copied:
            limit_open_files(self, CACHE_BYTES)
        return copy.array


class _Copy:
    """A temporary copy of some blocks of a file. Threads may fill it at the same time."""

    def __init__(self, address: Address, dtype: np.dtype, length: int, expected: BlockHashes) -> None:
        self.num_bytes = 0
        self._address, self._expected = address, expected
        self._size = length * dtype.itemsize
        self._present = bytearray(len(expected))
        self._lock = threading.Lock()
        with refusals(Path(tempfile.gettempdir())):
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  it is closed with the copy
            self._file.truncate(self._size)
            self.array = np.memmap(self._file, dtype, "r", shape=(length,)).view(np.ndarray)

    def fill(self, blocks: Sequence[int]) -> None:
        """Copy the blocks that are not there yet."""
        if all(self._present[block] for block in blocks):
            return
        with self._lock:
            missing = [block for block in blocks if not self._present[block]]
            while missing:
                run = next(n for n in range(1, len(missing) + 1) if missing[n : n + 1] != [missing[0] + n])
                run = min(run, REQUEST_BLOCKS)
                self._fetch(missing[0], missing[0] + run)
                missing = missing[run:]

    def _fetch(self, first: int, last: int) -> None:
        start, stop = first * BLOCK_BYTES, min(last * BLOCK_BYTES, self._size)
        raw = memoryview(self._address.read_bytes(start, stop))
        for block in range(first, last):
            self._expected.check(block, raw[(block - first) * BLOCK_BYTES :][:BLOCK_BYTES])
        with refusals(Path(tempfile.gettempdir())):
            written = 0
            while written < len(raw):  # the rest fails if the disk is full
                written += os.pwrite(self._file.fileno(), raw[written:], start + written)
        self._present[first:last] = b"\x01" * (last - first)
        self.num_bytes += len(raw)
