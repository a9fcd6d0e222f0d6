"""Atomic, checksummed checkpoints with everything that a run needs to resume bit for bit.

    checkpoints/step-000400/
        model.safetensors      the trained weights, by name
        frozen.safetensors     a hash of the frozen weights (only if there are any)
        optimizer.safetensors  momenta and second moments, by the weight's name
        source.safetensors     the state of an on-policy data source (only if it has one)
        state.json             step, tokens, seconds, random states
        manifest.json          size and SHA-256 of each file, layout, recipe, and its own digest

Files are written into `step-000400.partial/` and flushed to disk, the manifest last; then the directory is renamed. A run that
is killed at any moment leaves complete checkpoints and at most one `.partial`, which the next start removes. `newest` loads
the last checkpoint whose every byte matches its manifest, and reports which ones it skipped and why. (Distributed Checkpoint,
overwritten in place and killed half-way, silently loads a mixture of two steps.)

No pickle is read or written.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from firth.io.atomic import FULL
from firth.io.safetensors import safetensors_blocks
from firth.types import LogLine, UserError

FORMAT = 1
"""Version of the format; a checkpoint of another version is rejected."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Args:
        path: Its directory.
        files: File name without suffix -> tensors on the CPU.
        state: The training state as it was saved.
        layout: The layout as it was saved.
        recipe: The hash of the recipe.
    """

    path: Path
    files: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    layout: dict[str, Any]
    recipe: str


def save(
    run: Path,
    step: int,
    files: Mapping[str, Tensors],
    state: Mapping[str, Any],
    *,
    layout: Mapping[str, Any],
    recipe: str,
    score: float | None = None,
) -> Path:
    """Write `checkpoints/step-N` into a run directory and return its path.

    Args:
        run: The run directory.
        step: The step.
        files: File name without suffix -> tensors; empty ones are left out.
        state: Values for state.json.
        layout: What must be the same for a bitwise resume.
        recipe: The hash of the recipe.
        score: Validation score for `best` and `prune`; lower is better.

    Raises:
        UserError: The disk is full; older checkpoints are untouched and nothing of this one remains.
    """
    home = run / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    final = home / f"step-{step:06d}"
    partial = home / f"{final.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        written = {f"{name}.safetensors": _write(partial / f"{name}.safetensors", safetensors_blocks(tensors))
                   for name, tensors in files.items() if tensors}  # fmt: skip
        written["state.json"] = _write(partial / "state.json", [_json(state)])
        metadata = {"step": step, "recipe": recipe, "layout": dict(layout), "score": score}
        body = {"format": FORMAT, "files": written} | metadata
        _write(partial / "manifest.json", [_json(body | {"manifest": _digest(body)})])
        _flush_directory(partial)
        if final.exists():  # a damaged checkpoint that `newest` skipped
            final.rename(home / f"{final.name}.old.partial")
        partial.rename(final)
        _flush_directory(home)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno not in FULL:
            raise
        need = sum(t.nbytes for tensors in files.values() for t in tensors.values()) / 1e6
        raise UserError(
            f"{final}: not enough disk space for a checkpoint of {need:.0f} MB; free some and run the same command "
            f"again: it resumes from {_last_name(home)}"
        ) from error
    shutil.rmtree(home / f"{final.name}.old.partial", ignore_errors=True)
    return final


def newest(run: Path, log: LogLine) -> Checkpoint | None:
    """Return the last valid checkpoint of a run directory; `log` is called with each skipped one and the reason."""
    for path in reversed(_saved(run)):
        try:
            return load(path)
        except UserError as error:
            log(f"skipping a damaged checkpoint: {error}")
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after verifying every byte.

    Raises:
        UserError: A file is missing or damaged; the message names the first one.
    """
    body = _manifest(path)
    for name, expected in body["files"].items():
        if _read_digest(path / name) != expected:
            raise UserError(f"{path / name}: its bytes do not match the manifest; delete {path}")
    files = {name.removesuffix(".safetensors"): load_file(path / name)
             for name in body["files"] if name.endswith(".safetensors")}  # fmt: skip
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(path, files, state, body["layout"], body["recipe"])


def precision(run: Path) -> Literal["fp32", "bf16"] | None:
    """Return the precision of the last readable checkpoint of a run directory, or None."""
    for path in reversed(_saved(run)):
        try:
            precision: Literal["fp32", "bf16"] = json.loads((path / "state.json").read_text())["precision"]
        except (OSError, ValueError, KeyError):
            continue
        return precision
    return None


def best(run: Path) -> Path | None:
    """Return the checkpoint with the best score, of equals the first; None if no checkpoint has a score."""
    scores: list[tuple[float, Path]] = []
    for path in _saved(run):
        try:
            score = _manifest(path)["score"]
        except UserError:
            continue
        if score is not None:
            scores.append((score, path))
    return min(scores, default=(0.0, None), key=lambda pair: pair[0])[1]


def prune(run: Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints and the one with the best score."""
    saved, best_path = _saved(run), best(run)
    for path in saved[: max(0, len(saved) - keep)]:
        if path != best_path:
            removed = path.rename(path.with_name(f"{path.name}.partial"))  # a kill now leaves no incomplete checkpoint
            shutil.rmtree(removed)


def remove_partial(run: Path) -> None:
    """Delete incomplete checkpoints of a killed run. The caller must hold the run lock."""
    for path in (run / "checkpoints").glob("*.partial"):
        shutil.rmtree(path)


def _saved(run: Path) -> list[Path]:
    """Return the checkpoint directories, oldest first."""
    paths = [p for p in (run / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdecimal() and p.is_dir()]
    return sorted(paths, key=lambda p: int(p.name.removeprefix("step-")))


def _last_name(home: Path) -> str:
    saved = _saved(home.parent)
    return saved[-1].name if saved else "the beginning"


def _json(value: Mapping[str, Any]) -> bytes:
    """Serialize canonically, so that a manifest can be compared byte by byte with its content."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(body)).hexdigest()


def _manifest(path: Path) -> dict[str, Any]:
    """Return the manifest without its digest, which has been verified."""
    name = path / "manifest.json"
    try:
        raw = name.read_bytes()
        body: dict[str, Any] = json.loads(raw)
        digest = body.pop("manifest")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{name}: the manifest is missing; delete {path}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name}: this is not a manifest; delete {path}") from error
    if digest != _digest(body) or raw != _json(body | {"manifest": digest}):
        raise UserError(f"{name}: it has been changed since it was written; delete {path}")
    if body["format"] != FORMAT:
        raise UserError(f"{name}: format {body['format']} is not the {FORMAT} that this version of firth reads")
    return body


def _write(path: Path, blocks: Sequence[bytes | memoryview] | Iterator[bytes | memoryview]) -> dict[str, Any]:
    """Write and flush a file, and return its entry in the manifest, hashed while it is written."""
    digest, size = hashlib.sha256(), 0
    with open(path, "wb") as file:
        for block in blocks:
            file.write(block)
            digest.update(block)
            size += len(block)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": size, "sha256": digest.hexdigest()}


def _read_digest(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: the file is missing; delete {path.parent}") from error


def _flush_directory(path: Path) -> None:
    """Flush a directory, so that renames and new names in it are durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
