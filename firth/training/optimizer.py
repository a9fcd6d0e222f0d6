"""Optimizers: parameter groups, AdamW and Muon, Adam on rows.

AdamW for embedding tables with sparse gradients: the same numbers as dense AdamW, at the cost of the rows used so far.

A row that has never been looked up has had a gradient of zero in every step: its moments are zero, AdamW changes it by
0 / (0 + eps), and embedding tables do not decay (`firth.training.optimizer`). So it can be skipped. A row that was looked up once
keeps changing by its mean, and is updated in every later step. (torch's SparseAdam skips those, which is another method.)

    3,000 of 30,522 x 384 embeddings used so far: 3 ms a step, where clearing, clipping and updating all take 45 ms

>>> table = nn.Embedding(5, 2, sparse=True, _weight=torch.zeros(5, 2))
>>> table(torch.tensor([3, 3])).sum().backward()
>>> rows = SparseAdam(table.weight, (0.9, 0.999), 1e-8)
>>> rows.update(0.5)
>>> [round(x, 4) for x in table.weight[:, 0].tolist()], rows.seen.tolist()
([0.0, 0.0, 0.0, -0.5, 0.0], [3])

The optimizer: Muon and AdamW with per-parameter learning rates and weight decay, and gradient clipping.

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
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from firth import kernel_choice
from firth.fields import NonNegativeFloat, PositiveFloat, ShareBelowOne, Validated
from firth.model import native
from firth.model.shard_tensors import gathered, local, local_parameter, shard_like, sharded_like
from firth.model.transformer import TransformerStack
from firth.peft.lora import LoraLayer
from firth.training import muon
from firth.training.distributed import Ranks
from firth.types import UserError

if TYPE_CHECKING:
    from firth.training.sharding import Shards


def sums(table: nn.Parameter) -> Tensor | None:
    """Return the values of a table's gradient, each row once, for changes in place; None without a gradient."""
    if table.grad is None or not table.grad.is_sparse:
        return table.grad
    table.grad = coalesced(table.grad)
    return table.grad.values()


def coalesced(grad: Tensor) -> Tensor:
    """Return a sparse gradient (V, hidden_size) with each row once, in ascending order."""
    index, values = grad._indices(), grad._values()
    if grad.is_coalesced() or not _use_native(values):
        return grad.coalesce()
    index, values = index[0].contiguous(), values.contiguous()
    rows, row_sums, unique = torch.empty_like(index), torch.empty_like(values), torch.empty(1, dtype=torch.int64)
    native.library().sum_rows(
        index.data_ptr(), values.data_ptr(), rows.data_ptr(), row_sums.data_ptr(), unique.data_ptr(), *values.shape, len(grad),
        native.threads(),
    )  # fmt: skip
    count = int(unique)
    return torch.sparse_coo_tensor(
        rows[:count][None], row_sums[:count], grad.shape, is_coalesced=True, check_invariants=False
    )


def _use_native(*tensors: Tensor) -> bool:
    """Whether the compiled passes support these tensors and are faster on this machine."""
    return native.supports(*tensors) and all(x.dtype == torch.float32 for x in tensors) and KERNEL.choice() == "native"


class SparseAdam:
    """AdamW on an embedding table; `seen` (n,) holds the rows that have moments, in the order of their first use.

    The gradient may be sparse or dense; after a dense one, all rows count as used.

    Args:
        table: (V, hidden_size).
        betas: Decay of the mean and of the second moment.
        eps: AdamW's epsilon.
    """

    def __init__(self, table: nn.Parameter, betas: tuple[float, float], eps: float) -> None:
        self.table, self.betas, self.eps = table, betas, eps
        self.seen = torch.empty(0, dtype=torch.long)
        self.slots = torch.full((len(table),), -1)
        self.mean, self.square = (
            table.detach().new_empty(0, table.shape[1]),
            table.detach().new_empty(0, table.shape[1]),
        )
        self.step = torch.zeros(())

    def _add_rows(self, rows: Tensor) -> None:
        """Assign slots to new rows; `rows` (n,) has no duplicates."""
        new = rows[self.slots[rows] < 0]
        if not len(new):
            return
        count = len(self.seen)
        self.slots[new] = torch.arange(count, count + len(new))
        self.seen = torch.cat((self.seen, new))
        if len(self.seen) > len(self.mean):  # grow by half, so that the amortized cost is small
            capacity = min(len(self.table), len(self.seen) * 3 // 2)
            self.mean, self.square = (
                torch.cat((x[:count], x.new_zeros(capacity - count, x.shape[1]))) for x in (self.mean, self.square)
            )

    @torch.no_grad()
    def update(self, lr: float) -> None:
        """Take a step with the table's gradient; do nothing without one."""
        grad = self.table.grad
        if grad is None:
            return
        grad = coalesced(grad) if grad.is_sparse else grad
        rows = grad.indices()[0] if grad.is_sparse else torch.arange(len(grad))
        self._add_rows(rows)
        values = grad.values() if grad.is_sparse else grad
        count = len(self.seen)
        self.step.add_(1)
        if self.table.is_contiguous() and _use_native(self.table, values):
            self._update_native(lr, rows, values)
            return
        dense = self.mean.new_zeros(count, self.mean.shape[1])
        dense[self.slots[rows]] = values
        weights = self.table.index_select(0, self.seen)
        torch._fused_adamw_(
            [weights], [dense], [self.mean[:count]], [self.square[:count]], [], [self.step], lr=lr,
            beta1=self.betas[0], beta2=self.betas[1], weight_decay=0.0, eps=self.eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        self.table.index_copy_(0, self.seen, weights)

    def _update_native(self, lr: float, rows: Tensor, values: Tensor) -> None:
        """Take the step in one compiled pass over the used rows."""
        origin = torch.full_like(self.seen, -1)
        origin[self.slots[rows]] = torch.arange(len(rows))
        values, step = values.contiguous(), int(self.step)
        first, second = (1 - beta**step for beta in self.betas)
        native.library().adamw_rows(
            self.table.data_ptr(), self.seen.data_ptr(), origin.data_ptr(), values.data_ptr(), self.mean.data_ptr(),
            self.square.data_ptr(), *self.betas, lr / first, math.sqrt(second), self.eps, *self.mean[: len(origin)].shape,
            native.threads(),
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """Return "mean" and "square" of the whole table, (V, hidden_size), and "step"; empty before the first step."""
        if not self.step:
            return {}
        dense = [torch.zeros_like(self.table.detach()) for _ in range(2)]
        for full, own in zip(dense, (self.mean, self.square), strict=True):
            full[self.seen] = own[: len(self.seen)]
        return {"mean": dense[0], "square": dense[1], "step": self.step.clone()}

    def restore(self, mean: Tensor, square: Tensor, step: Tensor) -> None:
        """Restore what `state` returned; a row whose moments are both zero counts as unused."""
        self.__init__(self.table, self.betas, self.eps)  # type: ignore[misc]
        self._add_rows(((mean != 0) | (square != 0)).any(-1).nonzero()[:, 0])
        count = len(self.seen)
        self.mean[:count], self.square[:count] = mean[self.seen], square[self.seen]
        self.step = step.clone()


def _workload(way: str) -> kernel_choice.Workload:
    """A step on 2,000 rows, each looked up twice, of 8,000 used before; hidden size 128."""
    table = nn.Parameter(torch.ones(8000, 128))
    rows = SparseAdam(table, (0.9, 0.99), 1e-8)
    rows._add_rows(torch.arange(8000))
    index = torch.arange(4000)[None] % 2000
    grad = torch.sparse_coo_tensor(index, torch.ones(4000, 128), (8000, 128), check_invariants=False)
    if way == "native":
        native.library()

    def work() -> None:
        table.grad = grad
        with kernel_choice.forced({KERNEL.name: way}):
            rows.update(1e-3)

    return work


KERNEL = kernel_choice.Kernel("table-rows", {way: partial(_workload, way) for way in ("torch", "native")})
"""How duplicate rows of a sparse gradient are summed and AdamW updates the used rows."""


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
"""Prefix of the names of a critic's weights (`firth.objectives.policy_gradient`)."""


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
        sparse: Whether untied embedding tables on a CPU get sparse gradients (`firth.training.optimizer`). The numbers are the
            same; visiting all rows of a large vocabulary takes as long as a transformer block.
        ranks: The ranks among which Muon's matrices are dealt; a single process by default.
        shards: The sharding of the model; None if it is not sharded.
        deferred: Whether the host reads no number of the device in a step.

    Raises:
        UserError: Nothing in the model is trainable.
    """

    def __init__(
        self, optimizer: OptimizerConfig, model: nn.Module, sparse: bool = False, ranks: Ranks | None = None,
        shards: Shards | None = None, deferred: bool = False,
    ) -> None:  # fmt: skip
        self.optimizer, self.shards, self.deferred = optimizer, shards, deferred
        groups = param_groups(optimizer, model)
        if not groups:
            raise UserError("there is nothing to train: every weight of the model is frozen")
        self.parameters = [p.parameter for p in groups]
        shapes = [tuple(p.shape) for p in self.parameters]
        # Of a sharded weight, the part on this rank is what is updated; its gradient is set before each step.
        self.groups = [replace(p, parameter=local_parameter(p.parameter)) for p in groups]
        by_settings: dict[tuple[float, float], list[ParamGroup]] = {}
        by_shape: dict[tuple[float, tuple[int, ...]], list[ParamGroup]] = {}
        tables = {id(table.weight): table for table in untied_embeddings(model)} if sparse else {}
        self.rows: dict[str, tuple[SparseAdam, float]] = {}
        for p, shape in zip(self.groups, shapes, strict=True):
            if id(p.parameter) in tables:
                tables[id(p.parameter)].sparse = True
                self.rows[p.name] = SparseAdam(p.parameter, (optimizer.beta1, optimizer.beta2), optimizer.eps), p.lr
            elif p.muon:
                by_shape.setdefault((p.lr, shape), []).append(p)
            else:
                by_settings.setdefault((p.lr, p.weight_decay), []).append(p)
        deal = (ranks or Ranks()).dealt

        def orthogonalize(rows: int) -> Callable[[Tensor], Tensor]:
            return (
                partial(deal, muon.orthogonalize)
                if shards is None
                else partial(shards.dealt, muon.orthogonalize, rows=rows)
            )

        self.stacks = [
            _Stack(group, shape, optimizer.momentum, orthogonalize(shape[0])) for (_, shape), group in by_shape.items()
        ]
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
        for p, own in zip(self.parameters, self.groups, strict=True):
            if own.parameter is not p:
                own.parameter.grad = None if p.grad is None else local(p.grad)
        grads = [grad for p in self.groups if (grad := sums(p.parameter)) is not None]
        norms = torch.stack(torch._foreach_norm(grads)).float()
        norm: Tensor = torch.linalg.vector_norm(norms)
        if self.shards is not None:
            norm = self.shards.norm(norms, [p for p in self.parameters if p.grad is not None])
        most = self.optimizer.max_grad_norm
        if most and self.deferred:
            torch._foreach_mul_(grads, (most / norm).clamp(max=1))
        elif most and norm > most:
            torch._foreach_mul_(grads, most / norm)
        return norm

    def step(self, factor: float, skip: Tensor | None = None) -> None:
        """Take a step with every learning rate times `factor`, the schedule's, and clear the gradients.

        Args:
            factor: The factor.
            skip: A number of the device: with 1, weights and state stay as they are; with 0, as without it, the step is taken.
        """
        if self.adam is not None:
            self.adam.found_inf = skip  # type: ignore[attr-defined]  # as `torch.amp.GradScaler` does
            for group, lr in zip(self.adam.param_groups, self.lrs, strict=True):
                group["lr"] = lr * factor
            self.adam.step()
        for rows, lr in self.rows.values():
            rows.update(lr * factor)
        for stack in self.stacks:
            stack.step(factor, skip)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Set the gradients to None, so that the next backward pass writes them instead of adding."""
        for p, own in zip(self.parameters, self.groups, strict=True):
            p.grad = own.parameter.grad = None

    def state(self) -> dict[str, Tensor]:
        """Return the optimizer state by parameter: `mean/NAME`, `square/NAME` and `step/NAME`, or `momentum/NAME`.

        The state of a sharded weight is sharded as the weight is.
        """
        state: dict[str, Tensor] = {}
        if self.adam is not None:
            for p, whole in zip(self.groups, self.parameters, strict=True):
                for key, torch_name in _ADAM_STATE.items() if p.parameter in self.adam.state else ():
                    value = self.adam.state[p.parameter][torch_name]
                    state[f"{key}/{p.name}"] = value if key == "step" else sharded_like(whole, value)
        for name, (rows, _) in self.rows.items():
            state |= {f"{what}/{name}": value for what, value in rows.state().items()}
        wholes = {p.name: whole for p, whole in zip(self.groups, self.parameters, strict=True)}
        for stack in self.stacks:
            for p, m in zip(stack.groups, stack.momentum, strict=True):
                state[f"momentum/{p.name}"] = sharded_like(wholes[p.name], m)
        return state

    def allocate(self, names: Collection[str]) -> dict[str, Tensor]:
        """Return uninitialized tensors for the parts of `state` with these names, to be read from a checkpoint."""
        state: dict[str, Tensor] = {}
        for p, whole in zip(self.groups, self.parameters, strict=True):
            for key in ("mean", "square", "momentum"):
                if f"{key}/{p.name}" in names:
                    state[f"{key}/{p.name}"] = sharded_like(whole, torch.empty_like(local(whole).detach()))
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state` returned, with the same sharding or none."""
        if self.adam is not None:
            for p, whole in zip(self.groups, self.parameters, strict=True):
                if f"step/{p.name}" in state and p.name not in self.rows:
                    self.adam.state[p.parameter] = {
                        torch_name: (
                            state[f"{key}/{p.name}"] if key == "step" else shard_like(whole, state[f"{key}/{p.name}"])
                        ).to(p.parameter.device, copy=True)
                        for key, torch_name in _ADAM_STATE.items()
                    }
        for name, (rows, _) in self.rows.items():
            if f"step/{name}" in state:
                rows.restore(*(gathered(state[f"{what}/{name}"]) for what in ("mean", "square", "step")))
        wholes = {p.name: whole for p, whole in zip(self.groups, self.parameters, strict=True)}
        for stack in self.stacks:
            for p, m in zip(stack.groups, stack.momentum, strict=True):
                m.copy_(shard_like(wholes[p.name], state[f"momentum/{p.name}"]))


def untied_embeddings(model: nn.Module) -> list[nn.Embedding]:
    """Return the embedding tables on a CPU, of tokens and among the heads, whose weight is not shared."""
    heads = getattr(model, "heads", nn.ModuleDict())
    tables = [child for name, child in model.named_children() if name == "tokens"] + list(heads.children())
    count = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    return [t for t in tables if type(t) is nn.Embedding and t.weight.device.type == "cpu" and count[id(t.weight)] == 1]


_ADAM_STATE = {"mean": "exp_avg", "square": "exp_avg_sq", "step": "step"}
"""Names of AdamW's state in checkpoints -> names in torch."""


class _Stack:
    """Muon on all hidden matrices of one shape and learning rate at once: (K, rows, columns), of which a rank may hold some rows.

    Each rank orthogonalizes its share of the K matrices, and all get the result, so that the ranks stay equal.

    Args:
        groups: The matrices.
        shape: Rows and columns of a whole matrix.
        beta: Decay of the momentum.
        orthogonalize: Returns the polar factors of the K matrices, for the rows that this rank holds.
    """

    def __init__(
        self, groups: list[ParamGroup], shape: tuple[int, ...], beta: float, orthogonalize: Callable[[Tensor], Tensor]
    ) -> None:
        self.groups, self.beta, self.orthogonalize = groups, beta, orthogonalize
        self.weights: list[Tensor] = [p.parameter for p in groups]
        device = self.weights[0].device
        self.scale = 0.2 * math.sqrt(max(shape))
        self.momentum = torch.zeros((len(groups), *self.weights[0].shape), device=device)
        self.dtype = muon.product_dtype(device)

    @torch.no_grad()
    def step(self, factor: float, skip: Tensor | None = None) -> None:
        """Take a step, unless `skip` is 1. A weight without a gradient gets one of zeros, unless none has one: then the weights stay."""
        if all(w.grad is None for w in self.weights):
            return
        directions = self.momentum.new_empty(self.momentum.shape, dtype=self.dtype)
        for w, momentum, direction in zip(self.weights, self.momentum, directions, strict=True):
            grad = torch.zeros_like(momentum) if w.grad is None else w.grad.float()
            if skip is not None:  # a mean with itself stays as it is
                grad = torch.where(skip > 0, momentum, grad)
            muon.nesterov(grad, momentum, direction, self.beta)
        updates = self.orthogonalize(directions)
        lr, decay = self.groups[0].lr * factor, self.groups[0].weight_decay
        for w, update in zip(self.weights, updates, strict=True):
            if skip is None:
                muon.apply(w, update, 1 - lr * decay, lr * self.scale)
            else:
                w.mul_(torch.where(skip > 0, 1.0, 1 - lr * decay))
                w.addcmul_(update.to(w.dtype), torch.where(skip > 0, 0.0, lr * self.scale), value=-1)
