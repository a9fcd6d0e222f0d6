"""The weights in a checkpoint directory of a run, of which several files may hold parts.

    step-000400/firth.json             what the model is, and the hashes of the files of its weights
    step-000400/model.safetensors      weights that one process holds whole
    step-000400/shards/*.safetensors   parts of weights, each with its place in the whole tensor (Distributed Checkpoint)

A tensor is put together when it is read, so that a model can be copied or sharded tensor by tensor and is never in memory as a
whole. `firth.training.sharded_checkpoint` writes the parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from firth.io.safetensors import SINGLE, header, torch_dtype
from firth.types import UserError

SHARDS = "shards"
"""Directory of the parts in a checkpoint."""

PREFIX = "model/"
"""Start of the names of the model's tensors among the parts; the others are those of the optimizer."""

STATE_FILE = "state.json"
"""File that every checkpoint of a run has, and no model directory."""


def is_checkpoint(directory: Path) -> bool:
    """Return whether a directory is a checkpoint of a run."""
    return (directory / STATE_FILE).is_file()


def run_of(directory: Path) -> Path:
    """Return the run directory of a checkpoint; any other directory as it is."""
    return directory.absolute().parent.parent if is_checkpoint(directory) else directory


@dataclass(frozen=True)
class _Part:
    """A part of a tensor in a file.

    Args:
        file: The file.
        key: The name in the file.
        offsets: Its first index in the whole tensor, by dimension.
        shape: Its shape.
    """

    file: Path
    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class CheckpointTensors:
    """The weights of a checkpoint by name.

    Args:
        directory: The checkpoint.
        files: Names of the files that belong to it, relative to the directory.
    """

    directory: Path
    files: tuple[str, ...]

    @cached_property
    def _found(self) -> tuple[dict[str, list[_Part]], dict[str, torch.dtype]]:
        parts: dict[str, list[_Part]] = {}
        dtypes: dict[str, torch.dtype] = {}
        present = {f"{SHARDS}/{file.name}" for file in (self.directory / SHARDS).glob("*")}
        for extra in sorted(present - {*self.files}):
            raise UserError(f"{self.directory / extra}: firth.json does not list this file: remove it")
        for name in self.files:
            file = self.directory / name
            prefix = "" if name == SINGLE else PREFIX
            infos, offsets = header(file), _offsets(file)
            for key, info in infos.items():
                if key.startswith(prefix):
                    tensor = key.removeprefix(prefix)
                    where = tuple(offsets.get(key, [0] * len(info.shape)))
                    parts.setdefault(tensor, []).append(_Part(file, key, where, info.shape))
                    dtypes[tensor] = torch_dtype(info.dtype)
        return parts, dtypes

    @cached_property
    def shapes(self) -> dict[str, Tensor]:
        """The tensors on the meta device: shapes and dtypes without data.

        Raises:
            UserError: A part of a tensor is missing.
        """
        parts, dtypes = self._found
        return {name: torch.empty(self._shape(name, own), dtype=dtypes[name], device="meta")
                for name, own in parts.items()}  # fmt: skip

    def _shape(self, name: str, parts: list[_Part]) -> tuple[int, ...]:
        ends = [[o + n for o, n in zip(p.offsets, p.shape, strict=True)] for p in parts]
        shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
        stored = sum(torch.Size(p.shape).numel() for p in parts)
        if stored != torch.Size(shape).numel():
            raise UserError(f"{self.directory}: parts of the tensor {name!r} are missing: copy the directory again")
        return shape

    def read(self, name: str) -> Tensor:
        """Return one whole tensor in main memory.

        Raises:
            UserError: A file has gone: a run that still trains deletes its older checkpoints.
        """
        shape = self.shapes[name]
        out = torch.empty_like(shape, device="cpu")
        for part in self._found[0][name]:
            where = tuple(slice(o, o + n) for o, n in zip(part.offsets, part.shape, strict=True))
            try:
                with safe_open(part.file, "pt") as opened:
                    out[where] = opened.get_tensor(part.key)
            except OSError as error:
                raise UserError(
                    f"{part.file} can no longer be read ({error}): if its run still trains, it has deleted this checkpoint; "
                    "take a newer one"
                ) from None
        return out


def checkpoint_tensors(directory: Path, record: Mapping[str, Any]) -> CheckpointTensors:
    """Return the weights of a checkpoint.

    Args:
        directory: The checkpoint.
        record: Its firth.json, whose hashes have been verified.

    Raises:
        UserError: The record lists no files.
    """
    files = record.get("files")
    if type(files) is not dict or not files:
        raise UserError(f"{directory}/firth.json lists no weights: copy the directory again")
    return CheckpointTensors(directory, tuple(files))


def _offsets(file: Path) -> dict[str, list[int]]:
    """Return the first index of each part in its whole tensor; empty for a file of whole tensors."""
    with safe_open(file, "pt") as opened:
        info = json.loads((opened.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))
    return {name: entry["saved_offsets"] for name, entry in info.items()}
