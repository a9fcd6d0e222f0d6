"""The optimizer: Muon and AdamW with per-parameter learning rates and weight decay, and gradient clipping.

Muon (`firth.training.muon`) updates hidden matrices, AdamW (Loshchilov & Hutter 2019) the rest, or everything:

    weight                        optimizer   learning rate    decay
    blocks.3.attention.q.weight   muon        lr               weight_decay
    tokens.weight (tied or not)   adamw       embedding_lr     none
    heads.lm.weight (untied)      adamw       scalar_lr        weight_decay
    norms, biases, scalars        adamw       scalar_lr        none
    ...q.low.default.A, ...B      adamw       lr               weight_decay      (LoRA)
    heads.critic.* (PPO)          as above    critic_lr        as above

Learning rates. An orthogonal matrix of m rows and n columns has root-mean-square entries of 1 / sqrt(max(m, n)); Muon's update
is multiplied by 0.2 sqrt(max(m, n)), so an entry changes by about 0.2 lr, as with AdamW (Liu et al. 2025, "Muon is scalable
for LLM training", equation 4). The same lr and decay then work for both and for every matrix shape; Jordan's own
sqrt(max(1, m / n)) needs a second learning rate. Decay is decoupled: a weight shrinks by lr * weight_decay per step.

Momentum is Jordan's: an exponential mean (1 - momentum) g + momentum b, with Nesterov's correction.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from firth.fields import NonNegativeFloat, PositiveFloat, ShareBelowOne, Validated
from firth.model.transformer import TransformerStack
from firth.peft.lora import LoraLayer
from firth.training import muon
from firth.training.sparse_adam import SparseAdam, sums
from firth.types import UserError


@dataclass(frozen=True)
class OptimizerConfig(Validated, section="optimizer"):
    """Configuration of the optimizer.

    Args:
        name: "muon" (with AdamW for all but hidden matrices) or "adamw".
        lr: Peak learning rate of hidden matrices with "muon", of everything with "adamw".
        embedding_lr: Learning rate of embedding tables; None takes `lr`.
        scalar_lr: Learning rate of heads, norms and biases; None takes `lr`.
        critic_lr: Learning rate of all weights of PPO's critic (`heads.critic`); None takes those of the policy.
        weight_decay: Decoupled, times the learning rate; on hidden matrices and untied heads only.
        beta1: AdamW's decay of the mean.
        beta2: AdamW's decay of the second moment.
        eps: AdamW's epsilon.
        momentum: Muon's decay of the momentum.
        max_grad_norm: The global norm that gradients are clipped to; 0 disables clipping.
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


CRITIC_PREFIX = "heads.critic."
"""Prefix of the names of a critic's weights (`firth.objectives.ppo`)."""


@dataclass(frozen=True)
class ParamGroup:
    """The optimizer settings of one parameter.

    Args:
        name: Its name in the model.
        parameter: The parameter.
        muon: Whether Muon updates it; AdamW otherwise.
        lr: Its peak learning rate.
        weight_decay: Its decay.
    """

    name: str
    parameter: nn.Parameter
    muon: bool
    lr: float
    weight_decay: float


def param_groups(optimizer: OptimizerConfig, model: nn.Module) -> list[ParamGroup]:
    """Return the settings of each trainable parameter, in the model's order.

    A hidden matrix is the 2-D weight of a module inside a stack of layers (an `nn.ModuleList`), or of the projection of
    smaller embeddings. An embedding table is the weight of an `nn.Embedding`, also if a head or a submodel is tied to it; it
    does not decay, because rare rows would shrink without ever being used. A head is any other 2-D weight in `model.heads`.
    """
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    layers = {id(p) for m in model.modules() if isinstance(m, nn.ModuleList) for p in m.parameters()}
    layers |= {
        id(m.project.weight) for m in model.modules() if isinstance(m, TransformerStack) and m.project is not None
    }
    embedding_lr = optimizer.lr if optimizer.embedding_lr is None else optimizer.embedding_lr
    scalar_lr = optimizer.lr if optimizer.scalar_lr is None else optimizer.scalar_lr
    lora = {id(p) for m in model.modules() if isinstance(m, LoraLayer) for p in m.parameters()}
    groups = []
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        table = id(p) in tables
        matrix = p.ndim == 2 and not table
        hidden = matrix and (id(p) in layers or id(p) in lora)
        decays = hidden or (matrix and name.startswith("heads."))
        lr = embedding_lr if table else optimizer.lr if hidden else scalar_lr
        if optimizer.critic_lr is not None and name.startswith(CRITIC_PREFIX):
            lr = optimizer.critic_lr
        decay = optimizer.weight_decay if decays else 0.0
        groups.append(ParamGroup(name, p, hidden and optimizer.name == "muon" and id(p) not in lora, lr, decay))
    return groups


class Optimizer:
    """Updates a model's weights with Muon and AdamW.

    Args:
        optimizer: The configuration.
        model: The model.
        sparse: Whether untied embedding tables on a CPU get sparse gradients (`firth.training.sparse_adam`). The numbers are the
            same; visiting all rows of a large vocabulary takes as long as a transformer block.

    Raises:
        UserError: Nothing in the model is trainable.
    """

    def __init__(self, optimizer: OptimizerConfig, model: nn.Module, sparse: bool = False) -> None:
        self.optimizer = optimizer
        self.groups = param_groups(optimizer, model)
        self.parameters = [p.parameter for p in self.groups]
        if not self.groups:
            raise UserError("there is nothing to train: every weight of the model is frozen")
        by_settings: dict[tuple[float, float], list[ParamGroup]] = {}
        by_shape: dict[tuple[float, tuple[int, ...]], list[ParamGroup]] = {}
        tables = {id(table.weight): table for table in untied_embeddings(model)} if sparse else {}
        self.rows: dict[str, tuple[SparseAdam, float]] = {}
        for p in self.groups:
            if id(p.parameter) in tables:
                tables[id(p.parameter)].sparse = True
                self.rows[p.name] = SparseAdam(p.parameter, (optimizer.beta1, optimizer.beta2), optimizer.eps), p.lr
            elif p.muon:
                by_shape.setdefault((p.lr, tuple(p.parameter.shape)), []).append(p)
            else:
                by_settings.setdefault((p.lr, p.weight_decay), []).append(p)
        self.stacks = [_Stack(group, optimizer.momentum) for group in by_shape.values()]
        self.lrs = [lr for lr, _ in by_settings]
        adam_groups = [
            {"params": [p.parameter for p in g], "weight_decay": decay} for (_, decay), g in by_settings.items()
        ]
        self.adam: torch.optim.AdamW | None = None
        if adam_groups:
            betas = (optimizer.beta1, optimizer.beta2)
            self.adam = torch.optim.AdamW(adam_groups, lr=optimizer.lr, betas=betas, eps=optimizer.eps, fused=True)

    def clip_grad_norm(self) -> Tensor:
        """Clip the gradients to the global norm `optimizer.max_grad_norm`; return the norm before clipping (a scalar)."""
        grads = [grad for p in self.parameters if (grad := sums(p)) is not None]
        norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)).float())
        if self.optimizer.max_grad_norm and norm > self.optimizer.max_grad_norm:
            torch._foreach_mul_(grads, self.optimizer.max_grad_norm / norm)
        return norm

    def step(self, factor: float) -> None:
        """Take a step with every learning rate times `factor`, the schedule's, and clear the gradients."""
        if self.adam is not None:
            for group, lr in zip(self.adam.param_groups, self.lrs, strict=True):
                group["lr"] = lr * factor
            self.adam.step()
        for rows, lr in self.rows.values():
            rows.update(lr * factor)
        for stack in self.stacks:
            stack.step(factor)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set the gradients to None, so that the next backward pass writes them instead of adding."""
        for p in self.parameters:
            p.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return the optimizer state by parameter: `mean/NAME`, `square/NAME` and `step/NAME`, or `momentum/NAME`."""
        state: dict[str, Tensor] = {}
        if self.adam is not None:
            for p in self.groups:
                for key, torch_name in _ADAM_STATE.items() if p.parameter in self.adam.state else ():
                    state[f"{key}/{p.name}"] = self.adam.state[p.parameter][torch_name]
        for name, (rows, _) in self.rows.items():
            state |= {f"{what}/{name}": value for what, value in rows.state().items()}
        for stack in self.stacks:
            state |= {f"momentum/{p.name}": m for p, m in zip(stack.groups, stack.momentum, strict=True)}
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned."""
        if self.adam is not None:
            for p in self.groups:
                if f"step/{p.name}" in state and p.name not in self.rows:
                    self.adam.state[p.parameter] = {
                        torch_name: state[f"{key}/{p.name}"].to(p.parameter.device, copy=True)
                        for key, torch_name in _ADAM_STATE.items()
                    }
        for name, (rows, _) in self.rows.items():
            if f"step/{name}" in state:
                rows.restore(*(state[f"{what}/{name}"] for what in ("mean", "square", "step")))
        for stack in self.stacks:
            for p, m in zip(stack.groups, stack.momentum, strict=True):
                m.copy_(state[f"momentum/{p.name}"])


def untied_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """Return the embedding tables on a CPU, of tokens and among the heads, whose weight is not shared."""
    heads = getattr(model, "heads", nn.ModuleDict())
    tables = [child for name, child in model.named_children() if name == "tokens"] + list(heads.children())
    count = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [t for t in tables if type(t) is nn.Embedding and t.weight.device.type == "cpu" and count[id(t.weight)] == 1]


_ADAM_STATE = {"mean": "exp_avg", "square": "exp_avg_sq", "step": "step"}
"""Names of AdamW's state in checkpoints -> names in torch."""


class _Stack:
    """Muon on all hidden matrices of one shape and learning rate at once: (K, rows, columns)."""

    def __init__(self, groups: list[ParamGroup], beta: float) -> None:
        self.groups, self.beta = groups, beta
        self.weights: list[Tensor] = [p.parameter for p in groups]
        shape, device = self.weights[0].shape, self.weights[0].device
        self.scale = 0.2 * math.sqrt(max(shape))
        self.momentum = torch.zeros((len(groups), *shape), device=device)
        self.dtype = muon.product_dtype(device)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Take a step. A weight without a gradient gets one of zeros, unless none has one: then the weights stay."""
        if all(w.grad is None for w in self.weights):
            return
        directions = self.momentum.new_empty(self.momentum.shape, dtype=self.dtype)
        for w, momentum, direction in zip(self.weights, self.momentum, directions, strict=True):
            grad = torch.zeros_like(momentum) if w.grad is None else w.grad.float()
            muon.nesterov(grad, momentum, direction, self.beta)
        updates = muon.orthogonalize(directions)
        lr, decay = self.groups[0].lr * factor, self.groups[0].weight_decay
        for w, update in zip(self.weights, updates, strict=True):
            muon.apply(w, update, 1 - lr * decay, lr * self.scale)
