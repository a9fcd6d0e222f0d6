"""Atomic, checksummed checkpoints with everything that a run needs to resume bit for bit.

    checkpoints/step-000400/
        model.safetensors      the trained weights, by name
        frozen.safetensors     a hash of the frozen weights (only if there are any)
        optimizer.safetensors  momenta and second moments, by the weight's name
        source.safetensors     the state of an on-policy data source (only if it has one)
        shards/                the sharded weights and moments (only of a sharded run; `firth.training.sharded_checkpoint`)
        state.json             step, tokens, seconds, random states
        firth.json             what the model is, so that the checkpoint can be read as a model (`firth.io.sharded`)
        manifest.json          size and SHA-256 of each file, layout, recipe, and its own digest

Files are written into `step-000400.partial/` and flushed to disk, the manifest last; then the directory is renamed. A run
that is killed at any moment leaves complete checkpoints and at most one `.partial`, which the next start removes. `newest`
loads the last checkpoint whose every byte matches its manifest, and reports which ones it skipped and why. (Distributed
Checkpoint, overwritten in place and killed half-way, silently loads a mixture of two steps.)

No pickle is read or written.

`save_state` and `restore` are what the trainer calls: the complete state of a run between two steps, so that a resumed run
equals an uninterrupted one. `save`, `load` and `newest` write and read the files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from firth.io.atomic import FULL
from firth.io.integrity import with_digest
from firth.io.safetensors import SINGLE, safetensors_blocks
from firth.io.sharded import SHARDS, STATE_FILE
from firth.model.shard_tensors import assign, gathered, is_sharded, local
from firth.training import sharded_checkpoint
from firth.training.distributed import Ranks
from firth.training.optimizer import Optimizer
from firth.types import LogLine, UserError

if TYPE_CHECKING:
    from firth.data.source import Source


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
        shards: Name of a sharded tensor -> its whole shape.
        ranks: The ranks that have read it together.
    """

    path: Path
    files: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    layout: dict[str, Any]
    recipe: str
    shards: dict[str, torch.Size] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)

    def read(self, targets: Mapping[str, Tensor]) -> None:
        """Read sharded tensors in place. All ranks call this."""
        sharded_checkpoint.read(self.path, targets, self.ranks)


def save(
    run: Path,
    step: int,
    files: Mapping[str, Tensors],
    state: Mapping[str, Any],
    *,
    layout: Mapping[str, Any],
    recipe: str,
    score: float | None = None,
    write_shards: Callable[[Path], Mapping[str, Any]] | None = None,
    description: Mapping[str, Any] | None = None,
    shard_bytes: int = 0,
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
        write_shards: Writes further files into the directory and returns their entries in the manifest.
        description: What the model is, for firth.json; None if its weights are not all in the checkpoint.
        shard_bytes: Bytes of the sharded tensors of all ranks, for the error message.

    Raises:
        UserError: The disk is full; older checkpoints are untouched and nothing of this one remains.
    """
    home = run / "checkpoints"
    home.mkdir(parents=True, exist_ok=True)
    partial = partial_of(run, step)
    final = partial.with_suffix("")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        written = {f"{name}.safetensors": _write(partial / f"{name}.safetensors", safetensors_blocks(tensors))
                   for name, tensors in files.items() if tensors}  # fmt: skip
        written |= {} if write_shards is None else write_shards(partial)
        if description is not None:
            weights = {
                name: facts for name, facts in written.items() if name == SINGLE or name.startswith(f"{SHARDS}/")
            }
            facts = {**description["facts"], "steps": step}
            record = with_digest({**description, "facts": facts, "files": weights})
            written["firth.json"] = _write(partial / "firth.json", [_json(record)])
        written[STATE_FILE] = _write(partial / STATE_FILE, [_json(state)])
        metadata = {"step": step, "recipe": recipe, "layout": dict(layout), "score": score}
        body = {"format": FORMAT, "files": written} | metadata
        _write(partial / "manifest.json", [_json(body | {"manifest": _digest(body)})])
        for directory in (partial / SHARDS, partial):
            if directory.is_dir():
                _flush_directory(directory)
        if final.exists():  # a damaged checkpoint that `newest` skipped
            final.rename(home / f"{final.name}.old.partial")
        partial.rename(final)
        _flush_directory(home)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno not in FULL:
            raise
        raise _no_room(run, step, shard_bytes + sum(t.nbytes for x in files.values() for t in x.values())) from error
    shutil.rmtree(home / f"{final.name}.old.partial", ignore_errors=True)
    return final


def _no_room(run: Path, step: int, size: int) -> UserError:
    """Return the error of a full disk, for a checkpoint of `size` bytes."""
    final = partial_of(run, step).with_suffix("")
    return UserError(
        f"{final}: not enough disk space for a checkpoint of {size / 1e6:.0f} MB; free some and run the same command "
        f"again: it resumes from {_last_name(final.parent)}"
    )


def copy_to(saved: Checkpoint, run: Path, recipe: str) -> None:
    """Write a checkpoint of another run into a run directory, as the state that this run has at that step.

    Args:
        saved: The checkpoint.
        run: The run directory.
        recipe: The hash of the recipe of this run.

    Raises:
        UserError: It is a checkpoint of a sharded run.
    """
    if saved.shards:
        raise UserError(
            f"{saved.path}: another run cannot start from a checkpoint in shards: export the model and use init_from"
        )
    state = saved.state | {"best": None, "stale": 0, "metrics": {}}
    save(run, int(state["step"]), saved.files, state, layout=saved.layout, recipe=recipe)


def partial_of(run: Path, step: int) -> Path:
    """Return where the checkpoint of a step is written before it is renamed."""
    return run / "checkpoints" / f"step-{step:06d}.partial"


def newest(run: Path, log: LogLine, ranks: Ranks | None = None) -> Checkpoint | None:
    """Return the last valid checkpoint of a run directory; `log` is called with each skipped one and the reason.

    All ranks call this; each verifies a share of the files.
    """
    for path in reversed(_saved(run)):
        try:
            return load(path, ranks)
        except UserError as error:
            log(f"skipping a damaged checkpoint: {error}")
    return None


def load(path: Path, ranks: Ranks | None = None) -> Checkpoint:
    """Read a checkpoint after verifying every byte.

    Args:
        path: Its directory.
        ranks: The ranks that call this together, each of which verifies a share of the files.

    Raises:
        UserError: A file is missing, damaged, or not in the manifest; the message names the first one.
    """
    body, ranks = _manifest(path), ranks or Ranks()
    names = sorted(body["files"])
    wrong = [i for i in range(ranks.rank, len(names), ranks.world) if not _matches(path, names[i], body)]
    first = int(ranks.gather(torch.tensor(min(wrong, default=len(names)), device=ranks.device)).min())
    if first < len(names):
        damaged = path / names[first]
        what = "its bytes do not match the manifest" if damaged.is_file() else "the file is missing"
        raise UserError(f"{damaged}: {what}; delete {path}")
    for extra in (path / SHARDS).glob("*"):  # the reader would take it for a part
        if f"{SHARDS}/{extra.name}" not in body["files"]:
            raise UserError(f"{extra}: the file is not in the manifest; delete {path}")
    files = {name.removesuffix(".safetensors"): load_file(path / name)
             for name in body["files"] if name.endswith(".safetensors") and "/" not in name}  # fmt: skip
    state = json.loads((path / "state.json").read_text())
    return Checkpoint(path, files, state, body["layout"], body["recipe"], sharded_checkpoint.shapes(path), ranks)


def _matches(path: Path, name: str, body: Mapping[str, Any]) -> bool:
    """Return whether a file of a checkpoint has the size and the hash in its manifest."""
    try:
        with open(path / name, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            found = {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
    except (FileNotFoundError, IsADirectoryError):
        return False
    return bool(found == body["files"][name])


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


def _flush_directory(path: Path) -> None:
    """Flush a directory, so that renames and new names in it are durable."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass
class TrainingState:
    """Progress of a run.

    Args:
        precision: Precision of the forward and backward pass.
        step: Optimizer steps so far.
        tokens: Tokens read so far, without padding.
        seconds: Training time so far.
        flops: Counted work so far.
        skipped: Steps without a finite gradient so far.
        in_a_row: The number of such steps in a row just now.
        best: The best validation score so far, lower being better.
        stale: Validations since then.
        metrics: The last metrics.
    """

    precision: Literal["fp32", "bf16"]
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    skipped: int = 0
    in_a_row: int = 0
    best: float | None = None
    stale: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes: trained parameters and persistent buffers by name, a tied parameter once."""
    persistent = model.state_dict()
    tensors = {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())
    return {name: x for name, x in tensors.items() if name in persistent}


def not_finite(model: nn.Module) -> str:
    """Return the name of the first trained weight or buffer that holds a NaN or an infinity on this rank, or ""."""
    for name, x in ((name, local(x)) for name, x in weights(model).items()):
        if x.is_floating_point() and x.numel() and not torch.stack(torch.aminmax(x.detach())).isfinite().all():
            return name
    return ""


def frozen(model: nn.Module, ranks: Ranks | None = None) -> dict[str, Tensor]:
    """Return the SHA-256 of all frozen weights as 32 bytes; empty without any.

    All ranks call this and gather sharded weights one by one. The first one hashes them.
    """
    digest, ranks, weights = hashlib.sha256(), ranks or Ranks(), dict(model.named_parameters())
    weights = {name: p for name, p in weights.items() if not p.requires_grad}
    for name, p in weights.items():
        whole = gathered(p.detach())
        if ranks.first:
            digest.update(name.encode())
            digest.update(whole.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if not weights:
        return {}
    return {"sha256": torch.tensor(list(bytes.fromhex(ranks.from_first(digest.hexdigest()))), dtype=torch.uint8)}


def layout(ranks: Ranks, device: torch.device, shards: int = 1) -> dict[str, Any]:
    """Return what must be the same for two runs to be bitwise equal; `shards` is how many ranks share a copy of the model."""
    sharded = {"shards": shards} if shards > 1 else {}
    return sharded | {
        "world": ranks.world, "device": device.type, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def save_state(
    run: Path, progress: TrainingState, model: nn.Module, optimizer: Optimizer, source: Source, ranks: Ranks, *,
    recipe: str, keep: int, score: float | None, frozen: Tensors, shards: int = 1,
    description: Mapping[str, Any] | None = None,
) -> None:  # fmt: skip
    """Write a checkpoint. Every rank calls this, since each has its own random states, and shards if there are any.

    Args:
        run: The run directory.
        progress: The progress of the run.
        model: The model.
        optimizer: The optimizer.
        source: The data source.
        ranks: The process group.
        recipe: The hash of the recipe.
        keep: Recent checkpoints to keep.
        score: Validation score at this step; lower is better.
        frozen: The hash of the frozen weights (`frozen`).
        shards: How many ranks share a copy of the model.
        description: What the model is (`save`).
    """
    device = next(model.parameters()).device
    random = {name: [base64.b64encode(bytes(row.tolist())).decode() for row in ranks.gather(x.to(device)).cpu()]
              for name, x in _random_states(device).items()}  # fmt: skip
    every = {"model": weights(model), "optimizer": optimizer.state() if ranks.first or shards > 1 else {}}
    sharded = {f"{file}/{name}": x.detach() for file, tensors in every.items() for name, x in tensors.items()
               if is_sharded(x)}  # fmt: skip
    write_shards = partial(sharded_checkpoint.write, tensors=sharded, ranks=ranks) if sharded else None
    shard_bytes = sum(x.numel() * x.itemsize for x in sharded.values())
    if ranks.first:
        files = {file: {name: x for name, x in tensors.items() if not is_sharded(x)}
                 for file, tensors in every.items()}  # fmt: skip
        files |= {"source": {name: torch.as_tensor(x) for name, x in source.state().items()}, "frozen": dict(frozen)}
        state = asdict(progress) | {"random": random}
        found = layout(ranks, device, shards)
        save(
            run, progress.step, files, state, layout=found, recipe=recipe, score=score, write_shards=write_shards,
            description=description, shard_bytes=shard_bytes,
        )  # fmt: skip
        prune(run, keep)
    elif write_shards is not None:
        try:
            write_shards(partial_of(run, progress.step))
        except OSError as error:  # of any rank
            if error.errno not in FULL:
                raise
            raise _no_room(run, progress.step, shard_bytes) from error
    ranks.wait()


def restore(
    saved: Checkpoint, model: nn.Module, optimizer: Optimizer, source: Source, ranks: Ranks, frozen: Tensors
) -> TrainingState:
    """Restore model, optimizer, source and random states from a checkpoint and return the progress.

    Args:
        saved: The checkpoint.
        model: The model.
        optimizer: The optimizer.
        source: The data source.
        ranks: The process group.
        frozen: The hash of the frozen weights of the model.

    Raises:
        UserError: The checkpoint belongs to another model.
    """
    load_weights(saved, model, frozen)
    names = {name.removeprefix("optimizer/") for name in saved.shards if name.startswith("optimizer/")}
    moments = optimizer.allocate(names)
    saved.read({f"optimizer/{name}": x for name, x in moments.items()})
    optimizer.restore(saved.files.get("optimizer", {}) | moments)
    source.restore({name: x.clone().numpy() for name, x in saved.files.get("source", {}).items()})
    state = dict(saved.state)
    random = state.pop("random")
    device = next(model.parameters()).device
    if len(random["cpu"]) == ranks.world:
        states = {name: list(base64.b64decode(rows[ranks.rank])) for name, rows in random.items()}
        _restore_random({name: torch.tensor(row, dtype=torch.uint8) for name, row in states.items()}, device)
    return TrainingState(**state)


def load_weights(saved: Checkpoint, model: nn.Module, frozen: Tensors) -> None:
    """Load only the weights of a checkpoint; `frozen` is the hash of the frozen weights of the model.

    Raises:
        UserError: The checkpoint belongs to another model.
    """
    current, whole = weights(model), saved.files.get("model", {})
    sharded = {name.removeprefix("model/"): shape for name, shape in saved.shards.items() if name.startswith("model/")}
    shapes = {name: x.shape for name, x in whole.items()} | sharded
    for name in sorted(current.keys() ^ shapes.keys()):
        where = "model" if name in current else "checkpoint"
        raise UserError(
            f"{saved.path}: the weight {name!r} is only in the {where}; this is a checkpoint of another model"
        )
    digest, stored_digest = frozen, saved.files.get("frozen", {})
    if digest.keys() != stored_digest.keys() or any(not torch.equal(x, stored_digest[k]) for k, x in digest.items()):
        raise UserError(
            f"{saved.path}: the checkpoint has no frozen weights, and those of this run (init_from) are not the ones that it "
            "was trained with: restore the same init_from, or start a new run in another directory"
        )
    for name, x in current.items():
        if x.shape != shapes[name]:
            raise UserError(
                f"{saved.path}: the weight {name!r} has shape {list(shapes[name])} in the checkpoint and "
                f"{list(x.shape)} in the model; this is a checkpoint of another model"
            )
    for name, x in whole.items():
        assign(current[name], x)
    saved.read({f"model/{name}": current[name].detach() for name in sharded})


def _random_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def _restore_random(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
    if device.type == "mps" and "mps" in states:
        torch.mps.set_rng_state(states["mps"])
