"""Several processes as one: sums over ranks, and waiting for each other.

Every number the trainer divides by is a count over all ranks, so a plain SUM of losses and of gradients is right,
whatever share of the labels each rank holds. Started by torchrun, `join()` reads what it sets:

    torchrun --nproc-per-node 2 -m firth train gpt

Ranks hold whole copies of the model and take the same step; data is split by global index (`firth.data.collate`). Whatever
takes long on one rank alone is waited for without a collective, and a rank that fails or is stopped ends the others with a
sentence that names it (`firth.train.peer_watch`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor, nn

from firth.train.peer_watch import PeerWatch, silence_seconds

BUCKET = 32 << 20
"""Bytes of gradients that are summed in one call: large enough to fill a link, small beside the model."""


@dataclass(frozen=True)
class Ranks:
    """This process among its peers; alone by default."""

    rank: int = 0
    world: int = 1
    peers: PeerWatch | None = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and speaks."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """The sum of `x` over all ranks, in place."""
        if self.world > 1:
            self._call(lambda: dist.all_reduce(x))
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
                self._call(lambda x=x: dist.broadcast(x, 0))  # type: ignore[misc]

    def gather(self, x: Tensor) -> Tensor:
        """Every rank's `x`, stacked: (...) -> (world, ...)."""
        if self.world == 1:
            return x[None]
        out = [torch.empty_like(x) for _ in range(self.world)]
        self._call(lambda: dist.all_gather(out, x))
        return torch.stack(out)

    def wait(self) -> None:
        """Go on when every rank has come here, however long that takes. Raises UserError when another rank has failed."""
        if self.peers is not None:
            self.peers.wait()

    def from_first(self, value: str) -> str:
        """Return rank 0's value on every rank."""
        return value if self.peers is None else self.peers.from_first(value)

    def together(self) -> AbstractContextManager[None]:
        """Return a context in which this rank ends with a sentence when another one fails, is stopped or is killed."""
        return nullcontext() if self.peers is None else self.peers.together()

    def _call(self, collective: Callable[[], object]) -> None:
        """Run a collective. Raises UserError that names the rank for which it failed."""
        try:
            collective()
        except RuntimeError as error:
            if self.peers is None:
                raise
            raise self.peers.explain(error) from error


def join(device: torch.device | None = None) -> Ranks:
    """Join the processes that torchrun started (gloo on CPU, nccl on CUDA); alone when it did not start this one."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    if not dist.is_initialized():
        on_cuda = device is not None and device.type == "cuda"
        dist.init_process_group("nccl" if on_cuda else "gloo")
    peers = _peers() if dist.get_world_size() > 1 else None
    return Ranks(dist.get_rank(), dist.get_world_size(), peers)


@cache
def _peers() -> PeerWatch:
    """This process's contact with the other ranks, over the store of the process group."""
    store = dist.distributed_c10d._get_default_store()
    return PeerWatch(store, dist.get_rank(), dist.get_world_size(), silence_seconds())


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
