"""Read and write safetensors files and the JSON files of a model directory.

Write the safetensors format block by block.

The library's own writer reports a full disk as an error of its own type, and cannot hash or flush while it writes.
Reading uses the library (`safetensors.safe_open`).

Read and write the tensors and JSON files of a model directory, in the layout of transformers.

    model.safetensors                                                one file
    model-00001-of-00002.safetensors  model.safetensors.index.json   several shards, and the shard of each tensor

A safetensors file is the length of its header (8 bytes), the header (JSON: name -> dtype, shape, first and last byte) and
the raw tensors. Files are untrusted: what a header claims is checked against the size of the file before memory is
allocated. The tensors are memory-mapped, so that a model needs its own memory once. Pickles run code and are never
opened; quantized weights and remote code are rejected.

    state = read_tensors(Path("model"))
    write_tensors(state, Path("copy"), Storage(torch.bfloat16, shard=parse_size("2GB")))
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from firth.io.atomic import check_regular_file, new_file, write_text
from firth.io.json_files import no_number, parsed
from firth.io.json_files import read_json as read_json
from firth.types import UserError

DTYPE_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip
"""torch dtype -> its name in a safetensors header."""

Read = Callable[[str], Tensor]
"""Returns the tensor of a name, which is read when it is needed."""


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype of a name in a safetensors header."""
    return next(dtype for dtype, known in DTYPE_NAMES.items() if known == name)


def safetensors_blocks(tensors: Mapping[str, Tensor], read: Read | None = None) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file: the length of the header (8 bytes), the header (JSON), then the raw tensors.

    The widest dtypes come first, so that every tensor is aligned to its own item size.

    Args:
        tensors: The tensors by name; with `read`, only their shapes and dtypes are used.
        read: Returns each tensor when it is written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, x in ordered.items():
        header[name] = {
            "dtype": DTYPE_NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [start, start + x.nbytes],
        }
        start += x.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name, x in ordered.items():
        x = x if read is None else read(name)
        yield x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER_BYTES = 100 << 20
"""Maximum length of a safetensors header: the library's own limit."""

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4,
    "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
"""safetensors dtype -> bytes of a value."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Name -> dtype that weights can be written in."""
WEIGHTS = (*DTYPES.values(), torch.float64)
"""Dtypes that weights can be read in."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
OTHERS = ("*.h5", "*.msgpack", "*.onnx", "*.npz")


@dataclass(frozen=True)
class Storage:
    """How tensors are written.

    Args:
        dtype: Cast floating-point tensors to this type; None keeps theirs.
        shard: Maximum bytes of one file; 0 writes one file.
    """

    dtype: torch.dtype | None = None
    shard: int = 0


AS_IT_IS = Storage()


def parse_size(text: str) -> int:
    """Parse a size such as "2GB" to bytes; "" and "0" mean no limit.

    Raises:
        UserError: The text is not a size.

    >>> parse_size("2GB"), parse_size("500 MB"), parse_size("20kb"), parse_size("")
    (2000000000, 500000000, 20000, 0)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if not text.strip():
        return 0
    if found is None:
        raise UserError(f"{text!r} is not a size: write 5GB, 500MB or a number of bytes")
    return int(float(found[1]) * 1000 ** ("kmgt".index(found[2]) + 1 if found[2] else 0))


def read_list(file: Path) -> list[dict[str, Any]]:
    """Return the list of objects in a JSON file.

    Raises:
        UserError: The file is not a JSON list of objects.
    """
    found = parsed(file)
    if type(found) is not list or not all(type(one) is dict for one in found):
        raise UserError(f"{file} is not a JSON list of objects")
    return found


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write an object to a JSON file atomically."""
    write_text(file, json.dumps(value, indent=2) + "\n")


@dataclass(frozen=True)
class TensorInfo:
    """Dtype and shape of a tensor, as a header states them."""

    dtype: str
    shape: tuple[int, ...]


def header(file: Path) -> dict[str, TensorInfo]:
    """Return name -> TensorInfo of the tensors in a safetensors file.

    Raises:
        UserError: The file is cut off, the header is longer than the file or not JSON, a name occurs twice, a dtype is unknown,
            a size is invalid, or the bytes of a tensor do not match its shape, overlap, leave a gap or exceed the file.
    """
    check_regular_file(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _broken(file, "it is cut off, or its header claims to be longer than the file")
        text = opened.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_once, parse_constant=no_number)
    except (ValueError, RecursionError) as fault:
        raise _broken(file, f"its header is not JSON: {str(fault)[:80]}") from None
    found: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int]] = []
    for name, entry in entries.items() if type(entries) is dict else [("its header", entries)]:
        if name == "__metadata__":
            continue
        found[name], span = _tensor_info(file, name, entry)
        spans.append(span)
    end = 0
    for first, last in sorted(spans):
        if first != end:
            raise _broken(file, "its tensors overlap, or there is a gap between them")
        end = last
    if end != size - 8 - length:
        raise _broken(file, f"its tensors take {end:,} bytes, and there are {size - 8 - length:,}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _tensor_info(file: Path, name: str, entry: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """Parse one entry of a header: the TensorInfo, and its first and last byte."""
    entry = entry if type(entry) is dict else {}
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _broken(file, f"{name!r:.80} has an invalid shape or invalid offsets")
    if type(dtype) is not str or dtype not in ITEM_BYTES:
        raise _broken(file, f"{name!r:.80} is of the unknown type {dtype!r:.20}")
    expected = ITEM_BYTES[dtype]
    for count in shape:
        expected *= count
        if expected > 1 << 62:
            raise _broken(file, f"{name!r:.80} claims more numbers than any file can hold")
    if offsets[1] - offsets[0] != expected:
        raise _broken(
            file, f"{name!r:.80} has the shape {tuple(shape)} and {offsets[1] - offsets[0]:,} bytes, not {expected:,}"
        )
    return TensorInfo(dtype, tuple(shape)), (offsets[0], offsets[1])


def _counts(value: Any) -> bool:
    """Return whether a value is a list of nonnegative integers."""
    return type(value) is list and len(value) <= 16 and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _broken(file: Path, why: str) -> UserError:
    return UserError(f"{file} cannot be read as safetensors ({why}): copy it again")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Return all tensors of a model directory, memory-mapped, from one file or several shards.

    Raises:
        UserError: The directory has no safetensors (or only pickles), a file is damaged, or the index and the shards disagree.
    """
    single, index = directory / SINGLE, directory / INDEX
    state: dict[str, Tensor] = {}
    if single.exists():
        return _load(single, header(single))
    if not index.exists():
        raise _no_weights(directory)
    for name, expected in sorted(_shards(index).items()):
        file = directory / name
        if not file.is_file():
            raise UserError(f"{index} names {name}, which is not there: copy it too")
        present = header(file)
        for tensor in sorted(expected ^ present.keys()):
            where = (index.name, name) if tensor in expected else (name, index.name)
            raise UserError(
                f"{directory}: {where[0]} has the tensor {tensor!r:.80}, and {where[1]} does not: copy both again"
            )
        state |= _load(file, present)
    return state


def read_file(file: Path) -> dict[str, Tensor]:
    """Return all tensors of one safetensors file.

    Raises:
        UserError: The file is missing or damaged.
    """
    if not file.is_file():
        raise _no_weights(file.parent, file.name)
    return _load(file, header(file))


def _shards(index: Path) -> dict[str, set[str]]:
    """Return file name -> the names of its tensors, from an index."""
    weight_map = read_json(index).get("weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, name in weight_map.items() if type(weight_map) is dict else ():
        if type(name) is not str or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{index} names {name!r:.80}, which is not a safetensors file in the same directory")
        shards.setdefault(name, set()).add(tensor)
    if not shards:
        raise UserError(f"{index} has no weight_map: copy it again")
    return shards


def _no_weights(directory: Path, name: str = SINGLE) -> UserError:
    pickles, others = (
        next((f.name for p in patterns for f in sorted(directory.glob(p))), "") for patterns in (PICKLES, OTHERS)
    )
    if pickles:
        return UserError(
            f"{directory} holds pickled weights ({pickles}), which can run code and are never read: save them as "
            "safetensors, for example with save_pretrained(DIR, safe_serialization=True) of transformers"
        )
    if others:
        return UserError(f"{directory} holds {others} and no {name}: save the model as safetensors")
    return UserError(f"{directory} holds no {name}")


def _load(file: Path, names: Iterable[str]) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError, RuntimeError) as fault:
        raise _broken(file, str(fault)[:120]) from None


def check_no_foreign_code(config: Mapping[str, Any], file: Path) -> None:
    """Check that a config.json needs no custom code (auto_map) and no quantized weights.

    Raises:
        UserError: It needs one of them.
    """
    if config.get("auto_map"):
        raise UserError(
            f"{file} needs custom code (auto_map), and firth runs no code of a model directory: use a model whose "
            "class is part of transformers"
        )
    quantization = config.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "") if type(quantization) is dict else ""
        raise UserError(
            f"{file} states that the weights are quantized ({method or 'quantization_config'}), and firth reads fp32, fp16, bf16 "
            "and fp64: use the unquantized model"
        )


def check_numbers(state: Mapping[str, Tensor], where: Path) -> None:
    """Check that each tensor has a supported floating-point dtype.

    Raises:
        UserError: One has another dtype.
    """
    for name, tensor in state.items():
        if tensor.dtype not in WEIGHTS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{where}: the tensor {name!r} is {kind}, and firth reads weights of fp32, fp16, bf16 and fp64"
            )


def check_finite(state: Mapping[str, Tensor], where: Path) -> None:
    """Check that no tensor contains NaN or infinity. `aminmax` propagates NaN and reads 16 GB/s.

    Raises:
        UserError: A tensor does.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(
                f"{where}: the tensor {name!r} holds a number that is not finite (NaN or infinity), which makes every output "
                "of the model NaN: copy it again, or use an earlier checkpoint"
            )


def write_tensors(
    state: Mapping[str, Tensor], directory: Path, storage: Storage = AS_IT_IS, read: Read | None = None
) -> list[str]:
    """Write tensors as safetensors files, with an index if there are several, and remove the files of an earlier write.

    Args:
        state: The tensors by name; with `read`, only their shapes and dtypes are used.
        directory: The model directory.
        storage: Number format and division into files.
        read: Returns each tensor when it is written, so that they are never in memory together.

    Returns:
        The names of the files.

    Raises:
        UserError: A value is not finite, or too large for the dtype.
    """
    if read is None:
        check_finite(state, directory)
    itemsize = {
        name: (tensor.dtype if storage.dtype is None else storage.dtype).itemsize for name, tensor in state.items()
    }
    shards = _packed({name: tensor.numel() * itemsize[name] for name, tensor in state.items()}, storage.shard)
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )

    def value(name: str) -> Tensor:
        x = state[name] if read is None else read(name)
        if read is not None:
            check_finite({name: x}, directory)
        return _cast(x, storage.dtype, name)

    for name, shard in zip(files, shards, strict=True):
        write_file({tensor: _like(state[tensor], storage.dtype) for tensor in shard}, directory / name, value)
    previous = [*directory.glob("model-*-of-*.safetensors"), directory / SINGLE, directory / INDEX]
    for file in previous:
        if file.name not in files:
            file.unlink(missing_ok=True)
    if len(files) > 1:
        total = sum(tensor.numel() * itemsize[name] for name, tensor in state.items())
        metadata = {"total_size": total, "total_parameters": sum(tensor.numel() for tensor in state.values())}
        where = {tensor: name for name, shard in zip(files, shards, strict=True) for tensor in shard}
        write_json(directory / INDEX, {"metadata": metadata, "weight_map": dict(sorted(where.items()))})
        files.append(INDEX)
    return files


def _packed(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Group names, in their order, by at most `most` bytes; a larger tensor is a group of its own.

    >>> _packed({"a": 3, "b": 2, "c": 9, "d": 1}, 5)
    [['a', 'b'], ['c'], ['d']]
    """
    groups: list[list[str]] = [[]]
    remaining = most or math.inf
    for name, size in sizes.items():
        if size > remaining and groups[-1]:
            groups.append([])
            remaining = most or math.inf
        groups[-1].append(name)
        remaining -= size
    return groups


def _like(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Return a tensor without data that has the shape and the dtype of what `_cast` returns."""
    return torch.empty_like(tensor, dtype=dtype if tensor.is_floating_point() else None, device="meta")


def _cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if cast.isinf().any():
        kind, most = next(name for name, one in DTYPES.items() if one == dtype), torch.finfo(dtype).max
        raise UserError(f"a value in {name} is too large for {kind} (at most {most:g}): write fp32")
    return cast


def write_file(state: Mapping[str, Tensor], file: Path, read: Read | None = None) -> None:
    """Write tensors to one safetensors file atomically; with `read` as in `safetensors_blocks`."""
    with new_file(file) as partial, partial.open("wb") as out:
        for block in safetensors_blocks(state, read):
            out.write(block)


def dtypes(directory: Path) -> list[torch.dtype]:
    """Return the floating-point dtypes in a model directory, the most common first."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in read_tensors(directory).values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return [dtype for dtype, _ in counts.most_common()]
