"""Checkpoints that are whole or not there: everything a run needs to go on bit for bit.

    checkpoints/step-000400/
        model.safetensors      the weights that are trained, by name
        frozen.safetensors     a hash of the others (only if there are others)
        optimizer.safetensors  momenta and second moments, by the weight's name
        data.safetensors     what an on-policy source remembers (only if it remembers something)
        state.json             step, tokens, seconds, random states
        manifest.json          size and SHA-256 of each file, layout, recipe, and the digest of itself

They are written into `step-000400.partial/`; each file is flushed to the disk, the manifest last; then the directory is
renamed. A run that is killed at any moment leaves whole checkpoints and at most one `.partial`, which the next start
removes. `newest` takes the last checkpoint whose every byte agrees with its manifest, and says which it passed over
and why. (Distributed Checkpoint, overwritten in place and killed half-way, loads a mixture of two steps silently.)

Nothing here reads or writes a pickle.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file
from torch import Tensor

from firth.io.atomic import FULL
from firth.io.safetensors_blocks import safetensors_blocks
from firth.types import UserError

FORMAT = 1
"""The format's number; a newer one is passed over, not guessed at."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. files: name -> tensors (CPU); state, layout: as they were saved; recipe: its hash."""

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
    """Write `checkpoints/step-N` of the run directory. score: lower is better, for `prune`. Returns its path.

    Raises UserError when the disk is full; older checkpoints are untouched and nothing of this one remains.
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
        facts = {"step": step, "recipe": recipe, "layout": dict(layout), "score": score}
        body = {"format": FORMAT, "files": written} | facts
        _write(partial / "manifest.json", [_json(body | {"manifest": _digest(body)})])
        _flush_directory(partial)
        if final.exists():  # a checkpoint that was passed over as damaged
            final.rename(home / f"{final.name}.old.partial")
        partial.rename(final)
        _flush_directory(home)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno not in FULL:
            raise
        need = sum(t.nbytes for tensors in files.values() for t in tensors.values()) / 1e6
        raise UserError(
            f"{final}: no room on this disk for a checkpoint of {need:.0f} MB; free some and run the same command "
            f"again, it goes on from {_last_name(home)}"
        ) from error
    shutil.rmtree(home / f"{final.name}.old.partial", ignore_errors=True)
    return final


def newest(run: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The last checkpoint of the run directory that verifies; tells `say` which ones it passed over and why."""
    for path in reversed(_saved(run)):
        try:
            return load(path)
        except UserError as error:
            say(f"passing over a damaged checkpoint: {error}")
    return None


def load(path: Path) -> Checkpoint:
    """Read a checkpoint after every byte of it has been verified. Raises UserError that names the first wrong file."""
    body = _manifest(path)
    for name, facts in body["files"].items():
        if _read_digest(path / name) != facts:
            raise UserError(f"{path / name}: its bytes are not those that the manifest promises; delete {path}")
    files = {name.removesuffix(".safetensors"): load_file(path / name)
             for name in body["files"] if name.endswith(".safetensors")}  # fmt: skip
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(path, files, state, body["layout"], body["recipe"])


def precision(run: Path) -> Literal["fp32", "bf16"] | None:
    """The precision of the run's last checkpoint; None where none can be read."""
    for path in reversed(_saved(run)):
        try:
            found: Literal["fp32", "bf16"] = json.loads((path / "state.json").read_text())["precision"]
        except (OSError, ValueError, KeyError):
            continue
        return found
    return None


def best(run: Path) -> Path | None:
    """The checkpoint with the best score, the first of equals; None where none has one."""
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
    saved, dear = _saved(run), best(run)
    for path in saved[: max(0, len(saved) - keep)]:
        if path != dear:
            doomed = path.rename(path.with_name(f"{path.name}.partial"))  # so that a kill leaves no half of it
            shutil.rmtree(doomed)


def remove_partial(run: Path) -> None:
    """Delete what a killed run left half-written. Only for the holder of the run directory."""
    for path in (run / "checkpoints").glob("*.partial"):
        shutil.rmtree(path)


def _saved(run: Path) -> list[Path]:
    """Checkpoint directories, oldest first."""
    found = [p for p in (run / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdecimal() and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def _last_name(home: Path) -> str:
    saved = _saved(home.parent)
    return saved[-1].name if saved else "the beginning"


def _json(value: Mapping[str, Any]) -> bytes:
    """The one way that a value is written, so that a manifest can be compared byte by byte with what it says."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(body)).hexdigest()


def _manifest(path: Path) -> dict[str, Any]:
    """The manifest without its digest, which has been verified."""
    name = path / "manifest.json"
    try:
        raw = name.read_bytes()
        body: dict[str, Any] = json.loads(raw)
        digest = body.pop("manifest")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{name}: there is no manifest; delete {path}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{name}: this is not a manifest; delete {path}") from error
    if digest != _digest(body) or raw != _json(body | {"manifest": digest}):
        raise UserError(f"{name}: it has been changed since it was written; delete {path}")
    if body["format"] != FORMAT:
        raise UserError(f"{name}: format {body['format']} is not the {FORMAT} that this version of firth reads")
    return body


def _write(path: Path, blocks: Sequence[bytes | memoryview] | Iterator[bytes | memoryview]) -> dict[str, Any]:
    """Write, flush to the disk, and return what the manifest says of the file; hashed on the way, not read again."""
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
    """Make renames and new names in a directory durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
