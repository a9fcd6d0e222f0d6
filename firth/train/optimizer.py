"""AdamW for vectors and tables, Muon for hidden matrices, clipping, and who gets which rate and decay.

first version: see below
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from firth.train.muon import orthogonalise
from firth.types import UserError


@dataclass(frozen=True)
class Optimizer:
    """How weights move.

    rate: of hidden matrices under "muon", of everything under "adamw", at the schedule's factor 1.
    embedding_rate, rest_rate: of embedding tables, and of heads, norms and biases; None means `rate`.
    weight_decay: decoupled, times the rate; only on matrices (see `place`).
    clip: the global norm that gradients are scaled down to; 0 leaves them alone.
    """

    name: Literal["muon", "adamw"] = "muon"
    rate: float = 3e-3
    embedding_rate: float | None = None
    rest_rate: float | None = None
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    momentum: float = 0.95
    clip: float = 1.0

    def __post_init__(self) -> None:
        if self.name not in ("muon", "adamw"):
            raise UserError(f"optimizer.name is {self.name!r}: use muon or adamw")
        for field in ("beta1", "beta2", "momentum"):
            value = getattr(self, field)
            if not 0 <= value < 1:
                raise UserError(f"optimizer.{field} is {value:g}: it must lie in [0, 1)")
        for field in ("rate", "weight_decay", "eps", "clip"):
            value = getattr(self, field)
            if value < 0:
                raise UserError(f"optimizer.{field} is {value:g}: it cannot be negative")


@dataclass(frozen=True)
class Place:
    """Which optimizer moves a parameter, at which rate, and whether it decays."""

    name: str
    parameter: nn.Parameter
    muon: bool
    rate: float
    decay: float


def place(optimizer: Optimizer, model: nn.Module) -> list[Place]:
    """Sort the trainable parameters, in the model's own order.

    Hidden matrix: a 2-D weight inside a stack of layers (an `nn.ModuleList`) that is not a table. Muon moves these,
    and they decay. Table: the weight of an `nn.Embedding`, tied heads with it: no decay, since a row's decay would
    depend on how rare its token is. Heads decay; norms, biases and scalars do not.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = {id(p) for m in model.modules() if isinstance(m, nn.ModuleList) for p in m.parameters()}
    embedding_rate = optimizer.rate if optimizer.embedding_rate is None else optimizer.embedding_rate
    rest_rate = optimizer.rate if optimizer.rest_rate is None else optimizer.rest_rate
    placed = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        table, matrix = id(p) in tables, p.ndim == 2
        hidden = matrix and not table and id(p) in layers
        rate = embedding_rate if table else optimizer.rate if hidden else rest_rate
        decay = optimizer.weight_decay if matrix and not table else 0.0
        placed.append(Place(name, p, hidden and optimizer.name == "muon", rate, decay))
    return placed


class Mover:
    """Moves a model's weights: one AdamW, and one Muon stack per shape of hidden matrix."""

    def __init__(self, optimizer: Optimizer, model: nn.Module) -> None:
        self.optimizer = optimizer
        self.placed = place(optimizer, model)
        self.parameters = [p.parameter for p in self.placed]
        adam: dict[tuple[float, float], list[Place]] = {}
        shapes: dict[tuple[int, ...], list[Place]] = {}
        for p in self.placed:
            if p.muon:
                shapes.setdefault(tuple(p.parameter.shape), []).append(p)
            else:
                adam.setdefault((p.rate, p.decay), []).append(p)
        self.rates = [rate for rate, _ in adam]
        groups = [{"params": [p.parameter for p in g], "lr": r, "weight_decay": d} for (r, d), g in adam.items()]
        betas = (optimizer.beta1, optimizer.beta2)
        self.adam = torch.optim.AdamW(groups, betas=betas, eps=optimizer.eps, fused=True) if groups else None
        self.stacks = [Stack(group, optimizer) for group in shapes.values()]

    def clip(self) -> Tensor:
        """Scale the gradients down to the global norm `clip`; return the norm they had (a scalar)."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        limit = self.optimizer.clip
        if limit and norm > limit:
            torch._foreach_mul_(grads, limit / norm)
        return norm

    def move(self, factor: float) -> None:
        """One step along the gradients, every rate times the schedule's `factor`; clears the gradients."""
        if self.adam is not None:
            for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.adam.step()
        for stack in self.stacks:
            stack.move(factor)
        self.clear()

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Everything it remembers, by parameter name: `mean/NAME`, `square/NAME`, `step/NAME`, `momentum/NAME`."""
        state: dict[str, Tensor] = {}
        for p in self.placed:
            kept = {} if self.adam is None else self.adam.state.get(p.parameter, {})
            if kept:
                state[f"mean/{p.name}"] = kept["exp_avg"]
                state[f"square/{p.name}"] = kept["exp_avg_sq"]
                state[f"step/{p.name}"] = kept["step"]
        for stack in self.stacks:
            state |= {f"momentum/{p.name}": m for p, m in zip(stack.placed, stack.momentum, strict=True)}
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        for p in self.placed:
            if f"mean/{p.name}" in state and self.adam is not None:
                self.adam.state[p.parameter] = {
                    "step": state[f"step/{p.name}"].clone(),
                    "exp_avg": state[f"mean/{p.name}"].clone(),
                    "exp_avg_sq": state[f"square/{p.name}"].clone(),
                }
        for stack in self.stacks:
            for p, m in zip(stack.placed, stack.momentum, strict=True):
                m.copy_(state[f"momentum/{p.name}"])


class Stack:
    """Muon on all hidden matrices of one shape at once: one batched product in place of many small ones."""

    def __init__(self, placed: list[Place], optimizer: Optimizer) -> None:
        self.placed, self.optimizer = placed, optimizer
        self.weights = [p.parameter for p in placed]
        first = self.weights[0]
        self.scale = 0.2 * math.sqrt(max(first.shape))
        self.momentum = torch.zeros((len(placed), *first.shape), dtype=torch.float32, device=first.device)

    @torch.no_grad()
    def move(self, factor: float) -> None:
        grads = torch.stack([torch.zeros_like(w) if w.grad is None else w.grad for w in self.weights]).float()
        self.momentum.lerp_(grads, 1 - self.optimizer.momentum)
        update = orthogonalise(grads.lerp_(self.momentum, self.optimizer.momentum))
        rate, decay = self.placed[0].rate * factor, self.placed[0].decay
        torch._foreach_mul_(self.weights, 1 - rate * decay)
        torch._foreach_add_(self.weights, list(update.to(self.weights[0].dtype).unbind()), alpha=-rate * self.scale)
