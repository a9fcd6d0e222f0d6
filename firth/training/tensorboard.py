"""Writer of TensorBoard event files without the tensorboard package, whose import takes a second.

A file is a sequence of records (length, masked CRC, data, masked CRC); the data of a record is one `Event`, a protocol
buffer of which four fields are needed. Formats: tensorflow/core/lib/io/record_writer.h and core/util/event.proto.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from pathlib import Path


class TensorBoardWriter:
    """Writes an event file: `TensorBoardWriter(directory, first=1).scalars(1, {"loss": 2.5})`.

    Args:
        directory: Where the file is created.
        first: The first step; a viewer ignores events of this and later steps in earlier files.
    """

    def __init__(self, directory: Path, first: int):
        self._file = open(directory / f"events.out.tfevents.{time.time_ns()}.firth", "wb")  # noqa: SIM115
        self._record(_double(1, time.time()) + _bytes(3, b"brain.Event:2"))
        self._record(_double(1, time.time()) + _integer(2, first) + _bytes(7, _integer(1, 1)))  # SessionLog.START

    def close(self) -> None:
        self._file.close()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write an event with all values of a step."""
        summary = b"".join(_bytes(1, _bytes(1, tag.encode()) + _float(2, value)) for tag, value in values.items())
        self._record(_double(1, time.time()) + _integer(2, step) + _bytes(5, summary))
        self._file.flush()

    def _record(self, data: bytes) -> None:
        length = struct.pack("<Q", len(data))
        self._file.write(length + struct.pack("<I", masked_crc(length)) + data + struct.pack("<I", masked_crc(data)))


def _varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    out.append(n)
    return bytes(out)


def _integer(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _double(field: int, value: float) -> bytes:
    return _varint(field << 3 | 1) + struct.pack("<d", value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _table() -> tuple[int, ...]:
    """Return the table of CRC-32C (Castagnoli, reflected polynomial 0x82F63B78), one entry per byte."""
    rows = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        rows.append(byte)
    return tuple(rows)


_TABLE = _table()


def masked_crc(data: bytes) -> int:
    """Return the CRC-32C, rotated and shifted as in TFRecord, so that a CRC over data with CRCs stays useful.

    >>> hex(masked_crc(b"123456789"))
    '0xc78ab0e5'
    """
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
