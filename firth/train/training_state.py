"""What a run remembers between two steps: all of it, so that going on equals never having stopped."""

from __future__ import annotations

import base64
import hashlib
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from firth.train import checkpoint
from firth.train.checkpoint import Checkpoint
from firth.train.distributed import Ranks
from firth.train.optimizer import Optimizer
from firth.types import UserError

if TYPE_CHECKING:
    from firth.data.source import Source


@dataclass
class TrainingState:
    """How far a run is. flops: counted work behind. skipped: steps without a finite gradient, `in_a_row` just now. best: the
    best held-out score so far, less being better; stale: how many measurements ago it was."""

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
    """What training changes: trained parameters and lasting buffers by name, a tied one once."""
    lasting = model.state_dict()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad} | dict(model.named_buffers())
    return {name: x for name, x in named.items() if name in lasting}


def not_finite(model: nn.Module) -> str:
    """Return the name of the first trained weight or buffer that holds a NaN or an infinity, "" where there is none."""
    for name, x in weights(model).items():
        if x.is_floating_point() and x.numel() and not torch.stack(torch.aminmax(x.detach())).isfinite().all():
            return name
    return ""


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """The SHA-256 of all weights that training leaves as they are, as 32 bytes; nothing where there are none."""
    digest, count = hashlib.sha256(), 0
    for name, p in model.named_parameters():
        if not p.requires_grad:
            digest.update(name.encode())
            digest.update(p.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            count += 1
    return {"sha256": torch.tensor(list(digest.digest()), dtype=torch.uint8)} if count else {}


def layout(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """What must be the same for two runs to agree bit for bit."""
    return {
        "world": ranks.world, "device": device.type, "threads": torch.get_num_threads(),
        "torch": torch.__version__, "machine": platform.machine(),
    }  # fmt: skip


def save(
    run: Path, progress: TrainingState, model: nn.Module, mover: Optimizer, source: Source, ranks: Ranks, *,
    recipe: str, keep: int, score: float | None,
) -> None:  # fmt: skip
    """Write a checkpoint on rank 0; every rank calls it, for the random states are each rank's own."""
    device = next(model.parameters()).device
    random = {name: [base64.b64encode(bytes(row.tolist())).decode() for row in ranks.gather(x.to(device)).cpu()]
              for name, x in _random_states(device).items()}  # fmt: skip
    if ranks.first:
        files = {
            "model": weights(model), "optimizer": mover.state(),
            "source": {name: torch.as_tensor(x) for name, x in source.state().items()}, "frozen": frozen(model),
        }  # fmt: skip
        state = asdict(progress) | {"random": random}
        checkpoint.save(run, progress.step, files, state, layout=layout(ranks, device), recipe=recipe, score=score)
        checkpoint.prune(run, keep)
    ranks.wait()


def restore(saved: Checkpoint, model: nn.Module, mover: Optimizer, source: Source, ranks: Ranks) -> TrainingState:
    """Put everything back where it was. Raises UserError when the checkpoint belongs to another model."""
    take(saved, model)
    mover.restore(saved.files.get("optimizer", {}))
    source.restore({name: x.clone().numpy() for name, x in saved.files.get("source", {}).items()})
    state = dict(saved.state)
    random = state.pop("random")
    device = next(model.parameters()).device
    if len(random["cpu"]) == ranks.world:
        mine = {name: list(base64.b64decode(rows[ranks.rank])) for name, rows in random.items()}
        _restore_random({name: torch.tensor(row, dtype=torch.uint8) for name, row in mine.items()}, device)
    return TrainingState(**state)


def take(saved: Checkpoint, model: nn.Module) -> None:
    """Put the weights back alone. Raises UserError when the checkpoint belongs to another model."""
    ours, theirs = weights(model), saved.files["model"]
    for name in sorted(ours.keys() ^ theirs.keys()):
        raise UserError(f"{saved.path}: the weight {name!r} is on one side only; this is a checkpoint of another model")
    here, there = frozen(model), saved.files.get("frozen", {})
    if here.keys() != there.keys() or any(not torch.equal(x, there[name]) for name, x in here.items()):
        raise UserError(
            f"{saved.path}: it holds what was trained and not the frozen weights, and those that the run starts from now are "
            "others: put the same start back, or begin anew in another directory"
        )
    with torch.no_grad():
        for name, x in ours.items():
            if x.shape != theirs[name].shape:
                raise UserError(
                    f"{saved.path}: the weight {name!r} has shape {list(theirs[name].shape)} there and "
                    f"{list(x.shape)} here; this is a checkpoint of another model"
                )
            x.copy_(theirs[name])


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
