"""The GGUF container format of llama.cpp: one file with a model's metadata, its vocabulary and its tensors.

    magic "GGUF" | version | number of tensors | number of metadata keys | (key, type, value)... |
    (name, dimensions, type, offset)... | padding | the tensors, each at a multiple of `general.alignment`

This module handles the container only. `firth.pretrained.gguf` interprets the keys of a model,
`firth.tokenizer.gguf_read` those of a tokenizer, and `firth.pretrained.gguf_quantize` the quantization blocks. The layout
is that of the GGUF specification (github.com/ggml-org/ggml, docs/gguf.md), versions 2 and 3, little-endian. Unlike
llama.cpp, nested arrays (which nobody writes) and overlapping tensors are rejected.

>>> from pathlib import Path; from tempfile import TemporaryDirectory
>>> with TemporaryDirectory() as folder:
...     file = Path(folder) / "small.gguf"
...     write(file, {"general.architecture": "llama"}, [GGUFTensorSpec("a", "F32", (2, 3), lambda: np.zeros((2, 3), np.float32))])
...     found = read(file)
>>> found.metadata, found.tensors["a"].shape
({'general.architecture': 'llama'}, (2, 3))

Files are untrusted: every count and length is checked against the rest of the file before anything is allocated.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from firth.io.atomic import new_file
from firth.types import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
"""Number of a metadata value type -> NumPy dtype; 8 is a string and 9 an array."""
STRING, ARRAY = 8, 9
MAX_KEYS, MAX_TENSORS, MAX_STRINGS, MAX_KEY_BYTES = 1 << 16, 1 << 17, 1 << 23, 1 << 16
"""Limits far above any real model: a file that states more is damaged, and parsing it would take minutes."""
MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GGUFType:
    """Storage type of a tensor.

    Args:
        number: ggml's number of the type.
        block: Values of one block.
        size: Bytes of one block.
    """

    number: int
    block: int
    size: int


KINDS = {
    "F32": GGUFType(0, 1, 4), "F16": GGUFType(1, 1, 2), "BF16": GGUFType(30, 1, 2),
    "Q4_0": GGUFType(2, 32, 18), "Q4_1": GGUFType(3, 32, 20), "Q5_0": GGUFType(6, 32, 22), "Q5_1": GGUFType(7, 32, 24),
    "Q8_0": GGUFType(8, 32, 34), "Q2_K": GGUFType(10, 256, 84), "Q3_K": GGUFType(11, 256, 110), "Q4_K": GGUFType(12, 256, 144),
    "Q5_K": GGUFType(13, 256, 176), "Q6_K": GGUFType(14, 256, 210),
}  # fmt: skip
"""The supported types, by ggml's names. Others (IQ..., TQ..., MXFP4) are rejected."""
BY_NUMBER = {kind.number: name for name, kind in KINDS.items()}


@dataclass(frozen=True, eq=False)
class GGUFTensor:
    """A tensor in a file.

    Args:
        kind: Name of its type, a key of KINDS.
        shape: In NumPy's order, rows first.
        data: (rows, bytes per row) uint8, memory-mapped.
    """

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray


@dataclass(frozen=True, eq=False)
class GGUFFile:
    """Content of a GGUF file.

    Args:
        path: The file.
        metadata: Key -> bool, int, float, str, list of str, or a NumPy array of numbers.
        tensors: Name -> tensor.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text value.

        Raises:
            UserError: The value is not text, or missing without a default.
        """
        value = self.metadata.get(key, default)
        if type(value) is not str:
            raise UserError(f"{self.path}: its metadata has no text {key!r}")
        return value

    def list(self, key: str) -> list[str]:
        """Return a list of strings.

        Raises:
            UserError: The value is not a list of strings, empty or missing.
        """
        value = self.metadata.get(key)
        if type(value) is not list or not value:
            raise UserError(f"{self.path}: its metadata has no list of texts {key!r}")
        return value

    def numbers(self, key: str, count: int) -> np.ndarray | None:
        """Return an array of `count` numbers; None if the key is missing.

        Raises:
            UserError: The value is not an array of `count` numbers.
        """
        value = self.metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, np.ndarray) or len(value) != count:
            raise UserError(f"{self.path}: {key!r} in its metadata is not an array of {count} numbers")
        return value


def find(path: Path) -> Path | None:
    """Return the GGUF file that a path names: itself, or the only one of a directory without other models; else None.

    Raises:
        UserError: The file does not exist, or the directory has several GGUF files.
    """
    if path.suffix == ".gguf" and not path.is_dir():
        if not path.is_file():
            raise UserError(f"{path}: there is no such file")
        return path
    others = ("config.json", "tokenizer.json", "model.safetensors", "model.safetensors.index.json")
    if not path.is_dir() or any((path / name).exists() for name in others):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(f"{path} holds {len(files)} GGUF files ({files[0].name}, ...): give the path of one of them")
    return files[0] if files else None


class _Reader:
    """Sequential reader of the header; checks every length against the end of the file."""

    def __init__(self, path: Path, data: np.ndarray) -> None:
        # Slicing a NumPy array would make each string of the vocabulary four times as expensive.
        self.path, self.data, self.at, self.strings = path, data.data, 0, 0

    def refused(self, why: str) -> UserError:
        return UserError(f"{self.path}: this GGUF file cannot be read: {why}; download or convert it again")

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.data) - self.at:
            raise self.refused(f"{what} goes past its end")
        self.at += size
        return bytes(self.data[self.at - size : self.at])

    def number(self, form: str, what: str) -> Any:
        return struct.unpack(form, self.take(struct.calcsize(form), what))[0]

    def string(self, what: str, longest: int = 1 << 62) -> str:
        size = self.number("<Q", what)
        if size > longest:
            raise self.refused(f"{what} is {size} bytes long")
        try:
            return self.take(size, what).decode("utf-8")
        except UnicodeDecodeError:
            raise self.refused(f"{what} is not UTF-8") from None

    def count(self, what: str, most: int) -> int:
        count: int = self.number("<Q", what)
        if count > most:
            raise self.refused(f"it states {count} {what}")
        return count

    def value(self, key: str) -> Any:
        kind = self.number("<I", f"the value of {key!r}")
        if kind == STRING:
            return self.string(f"the value of {key!r}")
        if kind == ARRAY:
            return self.array(key)
        if kind not in NUMBERS:
            raise self.refused(f"the value of {key!r} has the unknown type {kind}")
        return _plain(self.vector(kind, 1, key)[0])

    def vector(self, kind: int, count: int, key: str) -> np.ndarray:
        form = np.dtype(NUMBERS[kind])
        if kind == 7:  # bytes other than 0 and 1 are undefined in a NumPy bool
            return np.frombuffer(self.take(count, f"the value of {key!r}"), np.uint8) != 0
        return np.frombuffer(self.take(count * form.itemsize, f"the value of {key!r}"), form)

    def array(self, key: str) -> Any:
        kind, count = self.number("<I", f"the value of {key!r}"), self.number("<Q", f"the value of {key!r}")
        if kind == STRING:
            self.strings += count
            if self.strings > MAX_STRINGS or count * 8 > len(self.data) - self.at:
                raise self.refused(f"the value of {key!r} is a list of {count} texts")
            return [self.string(f"a text of {key!r}") for _ in range(count)]
        if kind not in NUMBERS:
            raise self.refused(f"the value of {key!r} is a list of the type {kind}, which firth does not read")
        return self.vector(kind, count, key)


def read(path: Path) -> GGUFFile:
    """Read a GGUF file; its tensors are memory-mapped.

    Raises:
        UserError: The file is missing or damaged, or uses an unsupported version or type.
    """
    if not path.is_file() or path.stat().st_size < 24:
        raise UserError(f"{path}: this is not a GGUF file: it is too short or missing")
    data = np.memmap(path, np.uint8, mode="r").view(np.ndarray)
    reader = _Reader(path, data)
    if reader.take(4, "its magic") != MAGIC:
        raise reader.refused("it does not begin with GGUF")
    version = reader.number("<I", "its version")
    if version not in VERSIONS:
        found = "big-endian" if version & 0xFFFF == 0 else f"of version {version}"
        raise reader.refused(f"it is {found}, and firth reads versions 2 and 3, little-endian")
    tensors, keys = reader.count("tensors", MAX_TENSORS), reader.count("keys", MAX_KEYS)
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = reader.string("a key", MAX_KEY_BYTES)
        if key in metadata:
            raise reader.refused(f"the key {key!r} occurs twice")
        metadata[key] = reader.value(key)
    infos = [_info(reader) for _ in range(tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
        raise reader.refused(f"its alignment is {alignment!r}")
    return GGUFFile(path, metadata, _placed(reader, data, infos, alignment))


def _info(reader: _Reader) -> tuple[str, str, tuple[int, ...], int]:
    """Read (name, kind, shape, offset) of one tensor."""
    name = reader.string("a tensor's name", MAX_KEY_BYTES)
    dimensions = reader.number("<I", f"the tensor {name!r}")
    if not 0 < dimensions <= MAX_DIMENSIONS:
        raise reader.refused(f"the tensor {name!r} has {dimensions} dimensions")
    shape = tuple(reader.number("<Q", f"the tensor {name!r}") for _ in range(dimensions))[::-1]
    number, offset = reader.number("<I", f"the tensor {name!r}"), reader.number("<Q", f"the tensor {name!r}")
    if number not in BY_NUMBER:
        raise UserError(
            f"{reader.path}: the tensor {name!r} is of ggml's type {number}; firth reads {', '.join(KINDS)}: "
            "take a file in one of those"
        )
    return name, BY_NUMBER[number], shape, offset


def _placed(
    reader: _Reader, data: np.ndarray, infos: Sequence[tuple[str, str, tuple[int, ...], int]], alignment: int
) -> dict[str, GGUFTensor]:
    """Map the tensors; each must be inside the file, aligned, and not overlap another."""
    start = _padded(reader.at, alignment)
    found: dict[str, GGUFTensor] = {}
    ends = 0
    for name, kind, shape, offset in sorted(infos, key=lambda info: info[3]):
        block, size = KINDS[kind].block, KINDS[kind].size
        row, bytes = math.prod(shape[:-1]), shape[-1] // block * size
        if name in found:
            raise reader.refused(f"the tensor {name!r} occurs twice")
        if 0 in shape or shape[-1] % block:
            raise reader.refused(f"the tensor {name!r} of shape {shape} is not a whole number of {kind} blocks")
        if offset % alignment or offset < ends or start + offset + row * bytes > len(data):
            raise reader.refused(f"the tensor {name!r} is outside of the file, overlaps another one or is not aligned")
        ends = offset + row * bytes
        found[name] = GGUFTensor(kind, shape, data[start + offset : start + ends].reshape(row, bytes))
    return {name: found[name] for name, *_ in infos}


def _plain(value: Any) -> Any:
    """Convert a NumPy scalar; a float32 becomes the shortest decimal that represents it (1e-05, not 9.99e-06)."""
    return float(str(value)) if value.dtype == np.float32 else value.item()


@dataclass(frozen=True, eq=False)
class GGUFTensorSpec:
    """A tensor to write.

    Args:
        name: Its name.
        kind: Name of its type, a key of KINDS.
        shape: In NumPy's order, rows first.
        make: Returns its data in the format of `kind`, in any shape; called once, when the tensor is written.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]


def write(path: Path, metadata: Mapping[str, Any], tensors: Sequence[GGUFTensorSpec], alignment: int = 32) -> None:
    """Write a GGUF file atomically, with one tensor in memory at a time.

    Args:
        path: The file.
        metadata: As in `GGUFFile`; an int is written as uint32, a float as float32.
        tensors: The tensors, in their order in the file.
        alignment: Each tensor starts at a multiple of this many bytes.
    """
    with new_file(path) as partial, partial.open("wb") as file:
        file.write(MAGIC + struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(metadata)))
        for key, value in metadata.items():
            file.write(_string(key) + _value(value))
        offset = 0
        for tensor in tensors:
            kind = KINDS[tensor.kind]
            shape = tensor.shape[::-1]
            file.write(
                _string(tensor.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind.number, offset)
            )
            offset += _padded(math.prod(tensor.shape) // kind.block * kind.size, alignment)
        _pad(file, alignment)
        for tensor in tensors:
            made, kind = tensor.make(), KINDS[tensor.kind]
            assert made.nbytes == math.prod(tensor.shape) // kind.block * kind.size, tensor.name
            file.write(np.ascontiguousarray(made).data)
            _pad(file, alignment)


def _padded(size: int, alignment: int) -> int:
    return -(-size // alignment) * alignment


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(b"\0" * (-file.tell() % alignment))


def _string(text: str) -> bytes:
    coded = text.encode("utf-8")
    return struct.pack("<Q", len(coded)) + coded


def _value(value: Any) -> bytes:
    """Return the type and the bytes of a value."""
    if isinstance(value, np.ndarray):
        number = next(n for n, form in NUMBERS.items() if np.dtype(form) == value.dtype)
        return struct.pack("<IIQ", ARRAY, number, len(value)) + value.tobytes()
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    form, number = {bool: ("<I?", 7), int: ("<II", 4), float: ("<If", 6)}[type(value)]
    return struct.pack(form, number, value)
