"""Tensors and JSON in files that others have written: read with suspicion, written as transformers lays them out.

    model.safetensors                                                one file
    model-00001-of-00002.safetensors  model.safetensors.index.json   several, and which tensor lies in which

A safetensors file is eight bytes that say how long its header is, the header (JSON: name -> dtype, shape, first and last
byte) and the bytes. What a stranger's file claims is checked against the size of the file before anything of that size
is made; then the bytes are mapped, not read, so that a model costs its own memory once. Pickles run code and are never
opened; quantised weights and remote code are refused by name.

    state = read_tensors(Path("model"))
    write_tensors(state, Path("copy"), Storage(torch.bfloat16, shard=parse_size("2GB")))
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from firth.io.atomic import check_regular_file, new_file, write_text
from firth.io.json_files import no_number, parsed
from firth.io.json_files import read_json as read_json
from firth.io.safetensors_blocks import safetensors_blocks
from firth.types import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
HEADER = 100 << 20
"""Bytes of the longest header of a safetensors file: the library's own limit."""

BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4,
    "F32": 4, "F64": 8, "I64": 8, "U64": 8,
}  # fmt: skip
"""safetensors' dtype -> bytes of a number."""

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""What weights may be written as, by name."""
WEIGHTS = (*DTYPES.values(), torch.float64)
"""What weights may be read as."""

PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
OTHERS = ("*.h5", "*.msgpack", "*.onnx", "*.npz")


@dataclass(frozen=True)
class Storage:
    """How tensors are written. dtype: None as they are. shard: most bytes in one file, 0 for one file."""

    dtype: torch.dtype | None = None
    shard: int = 0


AS_IT_IS = Storage()


def parse_size(text: str) -> int:
    """Bytes of a size as people write it; "" and "0" are no limit. UserError otherwise.

    >>> parse_size("2GB"), parse_size("500 MB"), parse_size("20kb"), parse_size("")
    (2000000000, 500000000, 20000, 0)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)b?\s*", text.lower())
    if not text.strip():
        return 0
    if found is None:
        raise UserError(f"{text!r} is no size: write 5GB, 500MB or a number of bytes")
    return int(float(found[1]) * 1000 ** ("kmgt".index(found[2]) + 1 if found[2] else 0))


def read_list(file: Path) -> list[dict[str, Any]]:
    """The objects listed in a JSON file; UserError for anything else."""
    found = parsed(file)
    if type(found) is not list or not all(type(one) is dict for one in found):
        raise UserError(f"{file} is not a JSON list of objects")
    return found


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """An object into a file, which is there whole or not at all."""
    write_text(file, json.dumps(value, indent=2) + "\n")


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def header(file: Path) -> dict[str, TensorInfo]:
    """The tensors that a safetensors file claims to hold; UserError where its bytes cannot be those.

    Raised for a file that is cut off, a header longer than the file, text that is not JSON, names twice, unknown dtypes,
    sizes that are none, bytes that do not fit a shape, overlap, leave a gap or lie past the end.
    """
    check_regular_file(file)
    size = file.stat().st_size
    with file.open("rb") as opened:
        long = int.from_bytes(opened.read(8), "little")
        if size < 8 or long > min(size - 8, HEADER):
            raise _broken(file, "it is cut off, or its header claims to be longer than the file")
        text = opened.read(long)
    try:
        told = json.loads(text, object_pairs_hook=_once, parse_constant=no_number)
    except (ValueError, RecursionError) as fault:
        raise _broken(file, f"its header is not JSON that can be read: {str(fault)[:80]}") from None
    found: dict[str, TensorInfo] = {}
    places: list[tuple[int, int]] = []
    for name, said in told.items() if type(told) is dict else [("its header", told)]:
        if name == "__metadata__":
            continue
        kept, place = _kept(file, name, said)
        found[name] = kept
        places.append(place)
    end = 0
    for first, last in sorted(places):
        if first != end:
            raise _broken(file, "its tensors overlap, or there is a gap between them")
        end = last
    if end != size - 8 - long:
        raise _broken(file, f"its tensors take {end:,} bytes, and there are {size - 8 - long:,}")
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found


def _kept(file: Path, name: str, said: Any) -> tuple[TensorInfo, tuple[int, int]]:
    """One line of a header: what it says, and its first and last byte."""
    said = said if type(said) is dict else {}
    dtype, shape, place = said.get("dtype"), said.get("shape"), said.get("data_offsets")
    if not _counts(shape) or not _counts(place) or len(place) != 2 or place[0] > place[1]:
        raise _broken(file, f"{name!r:.80} has no shape and no place that could be")
    if type(dtype) is not str or dtype not in BYTES:
        raise _broken(file, f"{name!r:.80} is of the unknown type {dtype!r:.20}")
    wanted = BYTES[dtype]
    for count in shape:
        wanted *= count
        if wanted > 1 << 62:
            raise _broken(file, f"{name!r:.80} claims to have more numbers than any file holds")
    if place[1] - place[0] != wanted:
        raise _broken(
            file, f"{name!r:.80} has the shape {tuple(shape)} and {place[1] - place[0]:,} bytes, not {wanted:,}"
        )
    return TensorInfo(dtype, tuple(shape)), (place[0], place[1])


def _counts(value: Any) -> bool:
    """Whether it is a list of numbers that count something."""
    return type(value) is list and len(value) <= 16 and all(type(n) is int and 0 <= n < 1 << 62 for n in value)


def _broken(file: Path, why: str) -> UserError:
    return UserError(f"{file} cannot be read as safetensors ({why}): copy it again")


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a model directory, from one file or several: mapped from the files, copied when they are used.

    UserError where none are there, where only pickles are, where a file is damaged or the index and the files disagree.
    """
    single, index = directory / SINGLE, directory / INDEX
    state: dict[str, Tensor] = {}
    if single.exists():
        return _opened(single, header(single))
    if not index.exists():
        raise _without_weights(directory)
    for name, wanted in sorted(_shards(index).items()):
        file = directory / name
        if not file.is_file():
            raise UserError(f"{index} names {name}, which is not there: copy it too")
        there = header(file)
        for tensor in sorted(wanted ^ there.keys()):
            where = (index.name, name) if tensor in wanted else (name, index.name)
            raise UserError(
                f"{directory}: {where[0]} has the tensor {tensor!r:.80}, and {where[1]} has not: copy both again"
            )
        state |= _opened(file, there)
    return state


def read_file(file: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file; UserError where it is not there or is damaged."""
    if not file.is_file():
        raise _without_weights(file.parent, file.name)
    return _opened(file, header(file))


def _shards(index: Path) -> dict[str, set[str]]:
    """File -> the tensors that it should hold, of an index."""
    told = read_json(index).get("weight_map")
    shards: dict[str, set[str]] = {}
    for tensor, name in told.items() if type(told) is dict else ():
        if type(name) is not str or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{index} names {name!r:.80}, which is no safetensors file of its own directory")
        shards.setdefault(name, set()).add(tensor)
    if not shards:
        raise UserError(f"{index} has no weight_map: copy it again")
    return shards


def _without_weights(directory: Path, name: str = SINGLE) -> UserError:
    pickles, others = (
        next((f.name for p in some for f in sorted(directory.glob(p))), "") for some in (PICKLES, OTHERS)
    )
    if pickles:
        return UserError(
            f"{directory} holds pickled weights ({pickles}), which can run code and are never read: save them as "
            "safetensors, for example with save_pretrained(DIR, safe_serialization=True) of transformers"
        )
    if others:
        return UserError(f"{directory} holds {others} and no {name}: save the model as safetensors")
    return UserError(f"{directory} holds no {name}")


def _opened(file: Path, there: Iterable[str]) -> dict[str, Tensor]:
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in there}
    except (SafetensorError, OSError, ValueError, RuntimeError) as fault:
        raise _broken(file, str(fault)[:120]) from None


def check_no_foreign_code(config: Mapping[str, Any], file: Path) -> None:
    """UserError for a config.json whose model is made by code beside it, or whose weights are quantised."""
    if config.get("auto_map"):
        raise UserError(
            f"{file} asks for code of its own (auto_map), and firth runs no code of a model directory: take a model whose "
            "class is part of transformers"
        )
    quantised = config.get("quantization_config")
    if quantised:
        told = quantised.get("quant_method", "") if type(quantised) is dict else ""
        raise UserError(
            f"{file} says that the weights are quantised ({told or 'quantization_config'}), and firth reads fp32, fp16, bf16 "
            "and fp64: take the unquantised model"
        )


def check_numbers(state: Mapping[str, Tensor], where: Path) -> None:
    """UserError if a tensor that is a weight is no floating-point number of a usual kind."""
    for name, tensor in state.items():
        if tensor.dtype not in WEIGHTS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(
                f"{where}: the tensor {name!r} is {kind}, and firth reads weights of fp32, fp16, bf16 and fp64"
            )


def check_finite(state: Mapping[str, Tensor], where: Path) -> None:
    """Raise a UserError if a tensor holds a NaN or an infinity. `aminmax` passes a NaN on, and reads 16 GB/s."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(torch.aminmax(tensor)).isfinite().all():
            raise UserError(
                f"{where}: the tensor {name!r} holds a number that is not finite (NaN or infinity), which makes every answer "
                "of the model NaN: take a whole copy, or an earlier checkpoint of its training"
            )


def write_tensors(state: Mapping[str, Tensor], directory: Path, storage: Storage = AS_IT_IS) -> list[str]:
    """Write all tensors, and an index where they take several files; what an earlier write left over is removed.

    Returns the names of the files.

    Raises:
        UserError: A number is not finite, or too large for the type.
    """
    check_finite(state, directory)
    width = {
        name: (tensor.dtype if storage.dtype is None else storage.dtype).itemsize for name, tensor in state.items()
    }
    shards = _packed({name: tensor.numel() * width[name] for name, tensor in state.items()}, storage.shard)
    files = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    )
    for name, shard in zip(files, shards, strict=True):
        write_file({tensor: _cast(state[tensor], storage.dtype, tensor) for tensor in shard}, directory / name)
    left = [*directory.glob("model-*-of-*.safetensors"), directory / SINGLE, directory / INDEX]
    for file in left:
        if file.name not in files:
            file.unlink(missing_ok=True)
    if len(files) > 1:
        total = sum(tensor.numel() * width[name] for name, tensor in state.items())
        told = {"total_size": total, "total_parameters": sum(tensor.numel() for tensor in state.values())}
        where = {tensor: name for name, shard in zip(files, shards, strict=True) for tensor in shard}
        write_json(directory / INDEX, {"metadata": told, "weight_map": dict(sorted(where.items()))})
        files.append(INDEX)
    return files


def _packed(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """Names in their order, in groups of at most so many bytes; what is larger is alone.

    >>> _packed({"a": 3, "b": 2, "c": 9, "d": 1}, 5)
    [['a', 'b'], ['c'], ['d']]
    """
    groups: list[list[str]] = [[]]
    room = most or math.inf
    for name, size in sizes.items():
        if size > room and groups[-1]:
            groups.append([])
            room = most or math.inf
        groups[-1].append(name)
        room -= size
    return groups


def _cast(tensor: Tensor, dtype: torch.dtype | None, name: str) -> Tensor:
    if dtype is None or not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    if cast.isinf().any():
        kind, most = next(name for name, one in DTYPES.items() if one == dtype), torch.finfo(dtype).max
        raise UserError(f"a number in {name} is too large for {kind}, which ends at {most:g}: write fp32")
    return cast


def write_file(state: Mapping[str, Tensor], file: Path) -> None:
    """Tensors into one safetensors file, which is there whole or not at all."""
    with new_file(file) as partial, partial.open("wb") as out:
        for block in safetensors_blocks(state):
            out.write(block)


def dtypes(directory: Path) -> list[torch.dtype]:
    """The types of floating-point numbers in a model directory's files, the commonest first."""
    counts: Counter[torch.dtype] = Counter()
    for tensor in read_tensors(directory).values():
        if tensor.is_floating_point():
            counts[tensor.dtype] += tensor.numel()
    return [dtype for dtype, _ in counts.most_common()]
