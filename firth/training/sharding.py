"""Training with sharded weights: FSDP2 (Zhao 2023, "PyTorch FSDP"; `torch.distributed.fsdp.fully_shard`).

Each rank holds a part of every weight, of its gradient and of its optimizer state. The weights of a block are gathered when the
block runs and dropped afterwards; its gradients are summed and scattered as soon as they are complete. Everything outside the
blocks (embedding tables, norms, heads) is one group, which stays whole from the start of a forward pass to its backward pass.

What a step computes runs inside the forward pass of one root module (`Root`): the passes of the model and of its submodels, the
heads, the loss. So objectives read `model.heads["lm"].weight` and call `model.encode` as without sharding.

Gradients are summed, not averaged: the loss of firth is a sum divided by counts over all ranks.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from firth.model.shard_tensors import assign, gathered
from firth.model.transformer import TransformerStack
from firth.training.device import return_freed_memory
from firth.training.distributed import Parallel, Ranks

if TYPE_CHECKING:
    from firth.model.init import Recorded
    from firth.model.model import LM

T = TypeVar("T")


class Root(nn.Module):
    """The root module of FSDP: its forward pass runs a function, which may use the whole model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], T]) -> T:
        return function()


class Shards(Parallel):
    """A model whose weights are sharded over ranks.

    Args:
        model: The model, changed in place; on the CPU, the training device or the meta device.
        ranks: The process group.
        degree: How many ranks share one copy of the model.
        device: The training device.
        precision: Of the forward and backward pass; in bf16, weights are gathered in bf16, and gradients are summed in fp32.
        record: The initialization of a model on the meta device, which is run now.
    """

    def __init__(
        self,
        model: LM,
        ranks: Ranks,
        degree: int,
        device: torch.device,
        precision: Literal["fp32", "bf16"] = "fp32",
        record: Recorded | None = None,
    ) -> None:
        return_freed_memory()
        self.model, self.ranks = model, ranks
        self._sharded: dict[tuple[bool, ...], Tensor] = {}
        self._skeleton = _on_meta(model)
        if record is not None:
            record.bind(model)
        self.mesh = make_mesh(ranks, degree, device)
        # A weight without dimensions cannot be divided: each rank has it, and its gradient is summed like a loss.
        self.scalars = [p for p in model.parameters() if not p.ndim]
        self.blocks, self.root = divide(model, self.mesh, precision)
        self.root._apply(lambda x: torch.empty_like(x, device=device) if x.is_meta else x.to(device))
        if record is not None:
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
            record.replay(lambda name, x: assign(tensors[name], x))
        with torch.no_grad():  # the first forward pass makes it the root
            self.forward(lambda: None)
        model.whole = self.whole  # type: ignore[method-assign]

    def forward(self, function: Callable[[], T]) -> T:
        out: T = self.ranks.call(lambda: self.root(function), only=False)
        if not torch.is_grad_enabled():
            self._forget()
        return out

    def _forget(self) -> None:
        """Shard all weights after passes without a backward pass, and forget the order of these passes.

        The next backward pass gathers weights in the reverse order of the passes, which must be the same on all ranks.
        """
        self.root.reset_iter_state()

    def backward(self, loss: Tensor, last: bool) -> None:
        self.root.set_requires_gradient_sync(last)
        self.ranks.call(lambda: super(Shards, self).backward(loss, last), only=False)
        if last and self.scalars:
            used = self.ranks.sum_numbers(*(p.grad is not None for p in self.scalars))
            for p in (p for p, count in zip(self.scalars, used, strict=True) if count):
                p.grad = self.ranks.sum(torch.zeros_like(p) if p.grad is None else p.grad)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Have all weights on every rank, for generation and evaluation: ranks then need not run the same passes."""
        for block in self.blocks:
            block.set_reshard_after_forward(False)
        for module in (*self.blocks, self.root):
            self.ranks.call(module.unshard)
        try:
            yield
        finally:
            self._forget()
            for block in self.blocks:
                block.set_reshard_after_forward(True)

    @torch.no_grad()
    def unsharded(self) -> LM | None:
        """Return the model with all weights in main memory, on the first rank; None on the others. All ranks call this.

        Weights are gathered one by one: the first rank then holds the model and its own shards.
        """
        sharded = dict(self.model.named_parameters())
        whole: dict[int, nn.Parameter] = {}
        for name, p in self._skeleton.named_parameters():
            x = self.ranks.call(partial(gathered, sharded[name].detach())).to("cpu", copy=True)
            if self.ranks.first:
                whole[id(p)] = nn.Parameter(x, requires_grad=p.requires_grad)
        if not self.ranks.first:
            return None
        buffers = dict(self.model.named_buffers())
        for prefix, module in self._skeleton.named_modules():
            for name, own in [*module.named_parameters(recurse=False, remove_duplicate=False)]:
                setattr(module, name, whole[id(own)])
            for name, _ in [*module.named_buffers(recurse=False)]:
                setattr(module, name, buffers[f"{prefix}.{name}" if prefix else name].cpu())
        return self._skeleton.eval()

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks that share this rank's copy of the model."""
        return self.mesh.get_group(self.mesh.ndim - 1)

    def sum(self, x: Tensor) -> Tensor:
        """Sum `x` in place over the ranks that share this rank's copy of the model."""
        self.ranks.call(lambda: dist.all_reduce(x, group=self.group))
        return x

    def norm(self, norms: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """Return the norm of all gradients, a scalar.

        Args:
            norms: (n,) The norm of the part of each gradient on this rank.
            parameters: The weights of these gradients.
        """
        which = tuple(isinstance(p, DTensor) for p in parameters)
        if which not in self._sharded:  # kept, since a copy from the host waits for the device
            self._sharded[which] = torch.tensor(which, device=norms.device)
        squares, sharded = norms.square(), self._sharded[which]
        total = self.sum((squares * sharded).sum()) + (squares * ~sharded).sum()
        return total.sqrt()

    def dealt(self, function: Callable[[Tensor], Tensor], x: Tensor, rows: int) -> Tensor:
        """Apply a function to whole matrices of which every rank holds some rows; each rank computes a share of them.

        Args:
            function: Maps matrices (k, rows, columns) to matrices of the same shape and dtype, each by itself.
            x: (K, rows of this rank, columns).
            rows: Rows of a whole matrix. FSDP gives each rank as many, and the last ones fewer or none.

        Returns:
            The results, (K, rows of this rank, columns).
        """
        degree, number, (count, own, columns) = self.group.size(), self.group.rank(), x.shape
        most = -(-rows // degree)
        held = [min(max(rows - r * most, 0), most) for r in range(degree)]
        assert held[number] == own
        shares = [count * (r + 1) // degree - count * r // degree for r in range(degree)]
        share = shares[number]
        pieces = self._exchange(
            [x[sum(shares[:r]) :][: shares[r]] for r in range(degree)], [(share, n, columns) for n in held]
        )
        whole = torch.cat(pieces, 1)
        out = function(whole) if share else whole
        return torch.cat(self._exchange(list(out.split(held, 1)), [(k, own, columns) for k in shares]))

    def _exchange(self, pieces: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Send piece r to rank r of the group, and return what the ranks have sent, in the given shapes."""
        sent = torch.cat([piece.reshape(-1) for piece in pieces])
        sizes = [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(sizes))
        self.ranks.call(
            lambda: dist.all_to_all_single(received, sent, sizes, [piece.numel() for piece in pieces], group=self.group)
        )
        return [flat.view(shape) for flat, shape in zip(received.split(sizes), shapes, strict=True)]


def divide(model: LM, mesh: DeviceMesh, precision: Literal["fp32", "bf16"] = "fp32") -> tuple[list[FSDPModule], Any]:
    """Shard the weights of a model over a mesh: each block, then the rest. Weights on the meta device stay there.

    Returns:
        The blocks, and the root module, whose forward pass runs a function.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bf16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # autocast does
    )
    whole = {p for p in model.parameters() if not p.ndim}
    settings: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "ignored_params": whole}
    blocks: list[FSDPModule] = []
    stacks = [module for module in model.modules() if isinstance(module, TransformerStack)]
    for block in (block for stack in stacks for block in stack.blocks):
        blocks.append(fully_shard(block, **settings))
        register_fsdp_forward_method(block, "encoder_kv")
    root: Any = fully_shard(Root(model), **settings)
    for module in (*blocks, root):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    return blocks, root


def _on_meta(model: LM) -> LM:
    """Return a copy of a model whose parameters take no memory; shared ones stay shared."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, {**empty})


def make_mesh(ranks: Ranks, degree: int, device: torch.device) -> DeviceMesh:
    """Return a mesh of the ranks: those that share a copy, and before that dimension the copies, if there are several."""
    copies = ranks.world // degree
    if copies == 1:
        return init_device_mesh(device.type, (degree,), mesh_dim_names=("shard",))
    return init_device_mesh(device.type, (copies, degree), mesh_dim_names=("replicate", "shard"))
