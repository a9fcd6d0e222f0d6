"""The shards of a checkpoint, written and read by PyTorch's Distributed Checkpoint as safetensors, without pickle.

    step-000400/shards/shard-00001-model-00001-of-00002.safetensors      the parts of rank 0, in files of FILE_BYTES
    step-000400/shards/shard-00002-model-00001-of-00002.safetensors      the parts of rank 1

Each rank writes its own parts and hashes its own files; the manifest of the checkpoint lists them all
(`firth.training.checkpoint`). Any number of ranks reads them, each the parts that it holds.

The package is imported where it is used, since it takes half a second. `HuggingFaceStorageWriter` has traps (torch 2.13), which is
why only sharded tensors are passed to it, in a directory of their own: numbers and bytes in the state make its file unreadable;
a second part of a tensor on one rank overwrites the first; and the reader takes every safetensors file of the directory. It
builds each file in memory, so files are small.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from firth.io.sharded import SHARDS
from firth.training.distributed import Ranks

FILE_BYTES = 256 << 20
"""Bytes of a file, at most, where no tensor is larger: it is built in memory."""

DIGEST_BYTES = 32


def write(place: Path, tensors: Mapping[str, Tensor], ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Write the parts of sharded tensors that this rank holds. All ranks call this; the first has created `place`.

    Args:
        place: The directory of the checkpoint.
        tensors: Sharded tensors by name, the same names on every rank.
        ranks: The process group.

    Returns:
        The files of all ranks, relative to `place`, with their sizes and hashes, as in a manifest.

    Raises:
        TypeError: A value is not a tensor of which each rank holds one part.
        OSError: A rank could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.tensor import DTensor, Shard

    for name, x in tensors.items():
        if not isinstance(x, DTensor) or sum(isinstance(p, Shard) for p in x.placements) != 1:
            raise TypeError(f"{name} is not sharded along one dimension, so it cannot be part of a sharded checkpoint")
    directory = place / SHARDS
    if ranks.first:
        directory.mkdir()
    ranks.wait()
    writer = HuggingFaceStorageWriter(str(directory), _file_numbers(tensors), save_distributed=True)
    try:
        ranks.call(lambda: save(dict(tensors), storage_writer=writer), only=False)
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, OSError):
                raise failure from error
        raise
    return _gather_digests(directory, ranks)


def _file_numbers(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the number of the file of each tensor, from 1."""
    numbers: dict[str, int] = {}
    number, size = 1, 0
    for name, x in tensors.items():
        own = x.numel() * x.itemsize // torch.distributed.get_world_size()
        if size and size + own > FILE_BYTES:
            number, size = number + 1, 0
        numbers[name] = number
        size += own
    return numbers


def _gather_digests(directory: Path, ranks: Ranks) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of the files of all ranks; each rank reads its own."""
    rows = b""
    for path in sorted(directory.glob(f"shard-{ranks.rank + 1:05d}-*")):
        with open(path, "rb") as file:
            rows += hashlib.file_digest(file, "sha256").digest() + os.fstat(file.fileno()).st_size.to_bytes(8, "little")
    gathered = ranks.gather_arrays(np.frombuffer(rows, np.uint8))
    found: dict[str, dict[str, Any]] = {}
    for rank, data in enumerate(gathered):
        names = sorted(path.name for path in directory.glob(f"shard-{rank + 1:05d}-*"))
        for i, name in enumerate(names):
            row = data[i * (DIGEST_BYTES + 8) : (i + 1) * (DIGEST_BYTES + 8)].tobytes()
            size = int.from_bytes(row[DIGEST_BYTES:], "little")
            found[f"{SHARDS}/{name}"] = {"bytes": size, "sha256": row[:DIGEST_BYTES].hex()}
    return found


def shapes(place: Path) -> dict[str, torch.Size]:
    """Return the shapes of the whole tensors in a checkpoint, by name; empty without shards."""
    if not (place / SHARDS).is_dir():
        return {}
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    metadata = HuggingFaceStorageReader(str(place / SHARDS)).read_metadata()
    return {name: tensor.size for name, tensor in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]


def read(place: Path, targets: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Read tensors in place. Each rank reads the parts that its targets hold, which may be whole.

    Args:
        place: The directory of the checkpoint, whose files have been verified.
        targets: Tensors by name, of the shapes in the checkpoint.
        ranks: The process group.
    """
    if not targets:
        return
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader, alone = HuggingFaceStorageReader(str(place / SHARDS)), not torch.distributed.is_initialized()
    with warnings.catch_warnings(action="ignore"):  # that there is a single process
        ranks.call(lambda: load({**targets}, storage_reader=reader, no_dist=alone), only=False)
