"""How weights move: who gets Muon and who AdamW, at which rate and with which decay; clipping.

Muon (`firth.train.muon`) moves hidden matrices, AdamW (Loshchilov & Hutter 2019) the rest, or everything:

    weight                        optimizer   rate             decay
    blocks.3.attention.q.weight   muon        rate             weight_decay
    tokens.weight (tied or not)   adamw       embedding_rate   none
    heads.lm.weight (untied)      adamw       rest_rate        weight_decay
    norms, biases, scalars        adamw       rest_rate        none
    ...q.low.default.A, ...B      adamw       rate             weight_decay      (LoRA)
    heads.critic.* (PPO)          as above    critic_rate      as above

Rates. An orthogonal matrix of m rows and n columns has root-mean-square entries of 1 / sqrt(max(m, n)); Muon's update
is multiplied by 0.2 sqrt(max(m, n)), so an entry moves by about 0.2 of the rate, as under AdamW (Liu et al. 2025,
"Muon is scalable for LLM training", equation 4). One rate and one decay then serve both, for every shape; Jordan's
own sqrt(max(1, m / n)) needs a second rate. Decay is decoupled: a weight shrinks by rate * weight_decay a step.

Momentum is Jordan's: an exponential mean (1 - momentum) g + momentum b, looked through once more (Nesterov).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from firth.model.transformer import TransformerStack
from firth.peft.lora import LoraLayer
from firth.train import muon
from firth.train.sparse_adam import SparseAdam, sums
from firth.types import UserError
from firth.validated import NonNegativeFloat, PositiveFloat, Ranged, ShareBelowOne


@dataclass(frozen=True)
class OptimizerConfig(Ranged, section="optimizer"):
    """How weights move.

    rate: of hidden matrices under "muon", of everything under "adamw", where the schedule's factor is 1.
    embedding_rate, rest_rate: of embedding tables, and of heads, norms and biases; None means `rate`.
    critic_rate: of every weight of PPO's critic (`heads.critic`); None means as the policy's.
    weight_decay: decoupled, times the rate; on hidden matrices and untied heads only.
    beta1, beta2, eps: AdamW's. momentum: Muon's.
    clip: the global norm that gradients are scaled down to; 0 leaves them alone.
    """

    name: Literal["muon", "adamw"] = "muon"
    lr: PositiveFloat = 3e-3
    embedding_lr: NonNegativeFloat | None = None
    scalar_lr: NonNegativeFloat | None = None
    critic_lr: NonNegativeFloat | None = None
    weight_decay: NonNegativeFloat = 0.1
    beta1: ShareBelowOne = 0.9
    beta2: ShareBelowOne = 0.95
    eps: NonNegativeFloat = 1e-8
    momentum: ShareBelowOne = 0.95
    max_grad_norm: NonNegativeFloat = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name not in ("muon", "adamw"):
            raise UserError(f"optimizer.name is {self.name!r}: use muon or adamw")


CRITIC = "heads.critic."
"""How the names of a critic's weights begin (`firth.objectives.ppo`)."""


@dataclass(frozen=True)
class ParamGroup:
    """Which optimizer moves a parameter, at which rate, and how much it decays."""

    name: str
    parameter: nn.Parameter
    muon: bool
    lr: float
    weight_decay: float


def param_groups(optimizer: OptimizerConfig, model: nn.Module) -> list[ParamGroup]:
    """Sort the trainable parameters, in the model's own order.

    Hidden matrix: the 2-D weight of a module inside a stack of layers (an `nn.ModuleList`), and of the projection that
    takes narrow tables to them. Table: the weight of an `nn.Embedding`, a tied head or a guest's table with it; it does
    not decay, for its rare rows would shrink without ever being read.
    Head: any other 2-D weight among the model's `parts`.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = {id(p) for m in model.modules() if isinstance(m, nn.ModuleList) for p in m.parameters()}
    layers |= {
        id(m.project.weight) for m in model.modules() if isinstance(m, TransformerStack) and m.project is not None
    }
    embedding_rate = optimizer.lr if optimizer.embedding_lr is None else optimizer.embedding_lr
    rest_rate = optimizer.lr if optimizer.scalar_lr is None else optimizer.scalar_lr
    low = {id(p) for m in model.modules() if isinstance(m, LoraLayer) for p in m.parameters()}
    placed = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        table = id(p) in tables
        matrix = p.ndim == 2 and not table
        hidden = matrix and (id(p) in layers or id(p) in low)
        decays = hidden or (matrix and name.startswith("heads."))
        rate = embedding_rate if table else optimizer.lr if hidden else rest_rate
        if optimizer.critic_lr is not None and name.startswith(CRITIC):
            rate = optimizer.critic_lr
        decay = optimizer.weight_decay if decays else 0.0
        placed.append(ParamGroup(name, p, hidden and optimizer.name == "muon" and id(p) not in low, rate, decay))
    return placed


class Optimizer:
    """Moves a model's weights along their gradients, and remembers what that takes.

    sparse: let tables have gradients of those rows alone that were read, if nothing else is tied to them; on a
    CPU, where visiting all of a large vocabulary takes as long as a block (`firth.train.sparse_adam`). The numbers are the same.
    Raises UserError when nothing in the model is trainable.
    """

    def __init__(self, optimizer: OptimizerConfig, model: nn.Module, sparse: bool = False) -> None:
        self.optimizer = optimizer
        self.placed = param_groups(optimizer, model)
        self.parameters = [p.parameter for p in self.placed]
        if not self.placed:
            raise UserError("there is nothing to train: every weight of the model is frozen")
        alike: dict[tuple[float, float], list[ParamGroup]] = {}
        shapes: dict[tuple[float, tuple[int, ...]], list[ParamGroup]] = {}
        tables = {id(table.weight): table for table in untied_embeddings(model)} if sparse else {}
        self.rows: dict[str, tuple[SparseAdam, float]] = {}
        for p in self.placed:
            if id(p.parameter) in tables:
                tables[id(p.parameter)].sparse = True
                self.rows[p.name] = SparseAdam(p.parameter, (optimizer.beta1, optimizer.beta2), optimizer.eps), p.lr
            elif p.muon:
                shapes.setdefault((p.lr, tuple(p.parameter.shape)), []).append(p)
            else:
                alike.setdefault((p.lr, p.weight_decay), []).append(p)
        self.stacks = [_Stack(group, optimizer.momentum) for group in shapes.values()]
        self.rates = [rate for rate, _ in alike]
        groups = [{"params": [p.parameter for p in g], "weight_decay": decay} for (_, decay), g in alike.items()]
        self.adam: torch.optim.AdamW | None = None
        if groups:
            betas = (optimizer.beta1, optimizer.beta2)
            self.adam = torch.optim.AdamW(groups, lr=optimizer.lr, betas=betas, eps=optimizer.eps, fused=True)

    def clip_grad_norm(self) -> Tensor:
        """Scale the gradients down to the global norm `optimizer.max_grad_norm`; return the norm they had (a scalar)."""
        grads = [grad for p in self.parameters if (grad := sums(p)) is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float())
        if self.optimizer.max_grad_norm and norm > self.optimizer.max_grad_norm:
            torch._foreach_mul_(grads, self.optimizer.max_grad_norm / norm)
        return norm

    def step(self, factor: float) -> None:
        """One step, every rate times the schedule's `factor`; clears the gradients."""
        if self.adam is not None:
            for group, rate in zip(self.adam.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.adam.step()
        for rows, rate in self.rows.values():
            rows.update(rate * factor)
        for stack in self.stacks:
            stack.move(factor)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget the gradients; the next backward pass then writes them and does not add."""
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """What it remembers, by parameter: `mean/NAME`, `square/NAME` and `step/NAME`, or `momentum/NAME`."""
        state: dict[str, Tensor] = {}
        if self.adam is not None:
            for p in self.placed:
                for ours, theirs in _ADAM.items() if p.parameter in self.adam.state else ():
                    state[f"{ours}/{p.name}"] = self.adam.state[p.parameter][theirs]
        for name, (rows, _) in self.rows.items():
            state |= {f"{what}/{name}": value for what, value in rows.state().items()}
        for stack in self.stacks:
            state |= {f"momentum/{p.name}": m for p, m in zip(stack.placed, stack.momentum, strict=True)}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        if self.adam is not None:
            for p in self.placed:
                if f"step/{p.name}" in state and p.name not in self.rows:
                    self.adam.state[p.parameter] = {
                        theirs: state[f"{ours}/{p.name}"].to(p.parameter.device, copy=True)
                        for ours, theirs in _ADAM.items()
                    }
        for name, (rows, _) in self.rows.items():
            if f"step/{name}" in state:
                rows.restore(*(state[f"{what}/{name}"] for what in ("mean", "square", "step")))
        for stack in self.stacks:
            for p, m in zip(stack.placed, stack.momentum, strict=True):
                m.copy_(state[f"momentum/{p.name}"])


def untied_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """The tables on a CPU whose rows are looked up and whose weight nothing else has: of tokens, and parts that are a table."""
    parts = getattr(model, "heads", nn.ModuleDict())
    tables = [child for name, child in model.named_children() if name == "tokens"] + list(parts.children())
    count = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [t for t in tables if type(t) is nn.Embedding and t.weight.device.type == "cpu" and count[id(t.weight)] == 1]


_ADAM = {"mean": "exp_avg", "square": "exp_avg_sq", "step": "step"}
"""Our names for what AdamW remembers -> torch's."""


class _Stack:
    """Muon on all hidden matrices of one shape and rate at once: (K, rows, columns)."""

    def __init__(self, placed: list[ParamGroup], momentum: float) -> None:
        self.placed, self.looked_through = placed, momentum
        self.weights: list[Tensor] = [p.parameter for p in placed]
        shape, device = self.weights[0].shape, self.weights[0].device
        self.scale = 0.2 * math.sqrt(max(shape))
        self.momentum = torch.zeros((len(placed), *shape), device=device)
        self.products = muon.product_dtype(device)

    @torch.no_grad()
    def move(self, factor: float) -> None:
        """A weight without a gradient counts as one with a gradient of zeros, unless none has one: frozen, they stay."""
        if all(w.grad is None for w in self.weights):
            return
        directions = self.momentum.new_empty(self.momentum.shape, dtype=self.products)
        for w, momentum, direction in zip(self.weights, self.momentum, directions, strict=True):
            grad = torch.zeros_like(momentum) if w.grad is None else w.grad.float()
            muon.nesterov(grad, momentum, direction, self.looked_through)
        updates = muon.orthogonalize(directions)
        rate, decay = self.placed[0].lr * factor, self.placed[0].weight_decay
        for w, update in zip(self.weights, updates, strict=True):
            muon.apply(w, update, 1 - rate * decay, rate * self.scale)
