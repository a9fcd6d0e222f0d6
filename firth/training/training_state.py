"""The complete state of a run between two steps, so that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import base64
import hashlib
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from firth.training import checkpoint
from firth.training.checkpoint import Checkpoint
from firth.training.distributed import Ranks
from firth.training.optimizer import Optimizer
from firth.types import UserError

if TYPE_CHECKING:
    from firth.data.source import Source


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
    """Return the name of the first trained weight or buffer that holds a NaN or an infinity, or ""."""
    for name, x in weights(model).items():
        if x.is_floating_point() and x.numel() and not torch.stack(torch.aminmax(x.detach())).isfinite().all():
            return name
    return ""


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """Return the SHA-256 of all frozen weights as 32 bytes; empty without frozen weights."""
    digest, count = hashlib.sha256(), 0
    for name, p in model.named_parameters():
        if not p.requires_grad:
            digest.update(name.encode())
            digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            count += 1
    return {"sha256": torch.tensor(list(digest.digest()), dtype=torch.uint8)} if count else {}


def layout(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Return what must be the same for two runs to be bitwise equal."""
    return {
        "world": ranks.world, "device": device.type, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def save(
    run: Path, progress: TrainingState, model: nn.Module, optimizer: Optimizer, source: Source, ranks: Ranks, *,
    recipe: str, keep: int, score: float | None,
) -> None:  # fmt: skip
    """Write a checkpoint on rank 0. Every rank calls this, since each has its own random states.

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
    """
    device = next(model.parameters()).device
    random = {name: [base64.b64encode(bytes(row.tolist())).decode() for row in ranks.gather(x.to(device)).cpu()]
              for name, x in _random_states(device).items()}  # fmt: skip
    if ranks.first:
        files = {
            "model": weights(model), "optimizer": optimizer.state(),
            "source": {name: torch.as_tensor(x) for name, x in source.state().items()}, "frozen": frozen(model),
        }  # fmt: skip
        state = asdict(progress) | {"random": random}
        checkpoint.save(run, progress.step, files, state, layout=layout(ranks, device), recipe=recipe, score=score)
        checkpoint.prune(run, keep)
    ranks.wait()


def restore(saved: Checkpoint, model: nn.Module, optimizer: Optimizer, source: Source, ranks: Ranks) -> TrainingState:
    """Restore model, optimizer, source and random states from a checkpoint and return the progress.

    Raises:
        UserError: The checkpoint belongs to another model.
    """
    load_weights(saved, model)
    optimizer.restore(saved.files.get("optimizer", {}))
    source.restore({name: x.clone().numpy() for name, x in saved.files.get("source", {}).items()})
    state = dict(saved.state)
    random = state.pop("random")
    device = next(model.parameters()).device
    if len(random["cpu"]) == ranks.world:
        states = {name: list(base64.b64decode(rows[ranks.rank])) for name, rows in random.items()}
        _restore_random({name: torch.tensor(row, dtype=torch.uint8) for name, row in states.items()}, device)
    return TrainingState(**state)


def load_weights(saved: Checkpoint, model: nn.Module) -> None:
    """Load only the weights of a checkpoint.

    Raises:
        UserError: The checkpoint belongs to another model.
    """
    current, stored = weights(model), saved.files["model"]
    for name in sorted(current.keys() ^ stored.keys()):
        where = "model" if name in current else "checkpoint"
        raise UserError(
            f"{saved.path}: the weight {name!r} is only in the {where}; this is a checkpoint of another model"
        )
    digest, stored_digest = frozen(model), saved.files.get("frozen", {})
    if digest.keys() != stored_digest.keys() or any(not torch.equal(x, stored_digest[k]) for k, x in digest.items()):
        raise UserError(
            f"{saved.path}: the checkpoint has no frozen weights, and those of this run (init_from) are not the ones that it "
            "was trained with: restore the same init_from, or start a new run in another directory"
        )
    with torch.no_grad():
        for name, x in current.items():
            if x.shape != stored[name].shape:
                raise UserError(
                    f"{saved.path}: the weight {name!r} has shape {list(stored[name].shape)} in the checkpoint and "
                    f"{list(x.shape)} in the model; this is a checkpoint of another model"
                )
            x.copy_(stored[name])


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
