"""Several processes as one: sums over ranks, and nothing else.

Every number the trainer divides by is a count over all ranks, so a plain SUM of losses and of gradients is right,
whatever share of the labels each rank holds. Started by torchrun, `join()` reads what it sets:

    torchrun --nproc-per-node 2 -m firth train gpt

Ranks hold whole copies of the model and take the same step; data is split by global index (`firth.data.batch`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET = 32 << 20
"""Bytes of gradients that are summed in one call: large enough to fill a link, small beside the model."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; alone by default."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks. A parameter that no rank has used stays without one."""
        if self.world == 1:
            return
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        taking = [p for p, n in zip(parameters, self.sum(used).tolist(), strict=True) if n]
        for p in taking:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets([p.grad for p in taking if p.grad is not None]):
            flat = self.sum(torch.cat([g.flatten() for g in bucket]))
            parts = torch.split(flat, [g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [part.view_as(g) for part, g in zip(parts, bucket, strict=True)])

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with rank 0's."""
        if self.world > 1:
            for x in tensors:
                dist.broadcast(x, 0)

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's `x`, stacked: (...) -> (world, ...)."""
        if self.world == 1:
            return x[None]
        out = [torch.empty_like(x) for _ in range(self.world)]
        dist.all_gather(out, x)
        return torch.stack(out)

    def wait(self) -> None:
        """Go on when every rank has come here."""
        if self.world > 1:
            dist.barrier()


def join(device: torch.device | None = None) -> Ranks:
    """Join the processes that torchrun started (gloo on CPU, nccl on CUDA); alone when it did not start this one."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    if not dist.is_initialized():
        on_cuda = device is not None and device.type == "cuda"
        dist.init_process_group("nccl" if on_cuda else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size())


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype, together at most BUCKET bytes (a larger tensor is alone)."""
    bucket: list[Tensor] = []
    size = 0
    for x in tensors:
        if bucket and (size + x.nbytes > BUCKET or x.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(x)
        size += x.nbytes
    if bucket:
        yield bucket
