"""Arrays whose files are in an object store: blocks are copied to the disk, and verified, when they are first read.

The copy of a file is a temporary one without a name, so nothing is left when the process ends or is killed. All copies of a process take
at most CACHE_BYTES of the directory of temporary files (TMPDIR), or one file if that is larger; beyond, the copy that was used longest
ago is given up.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from firth.corpora.remote import Address
from firth.data.stored_arrays import BLOCK_BYTES, BlockHashes, StoredFile, limit_open_files
from firth.io.atomic import refusals

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
