"""Data parallelism: sums over ranks, and synchronization.

The trainer divides by counts over all ranks, so a plain SUM of losses and gradients is correct, however the labels are
distributed over ranks. `join()` reads the environment variables that torchrun sets:

    torchrun --nproc-per-node 2 -m firth train gpt

Each rank has a copy of the model and takes the same step; data is split by global index (`firth.data.collate`). Ranks wait for
long work on a single rank without a collective, and a rank that fails or stops ends the others with an error that names it
(`firth.training.peer_watch`).
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

from firth.training.peer_watch import PeerWatch, silence_seconds

BUCKET_BYTES = 32 << 20
"""Bytes of gradients that are summed in one call: large enough to saturate a link, small compared with the model."""


@dataclass(frozen=True)
class Ranks:
    """This process and its process group; a single process by default.

    Args:
        rank: The rank of this process.
        world: The number of ranks.
        peers: The contact with the other ranks; None in a single process.
    """

    rank: int = 0
    world: int = 1
    peers: PeerWatch | None = field(default=None, compare=False, repr=False)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which writes files and reports progress."""
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Sum `x` over all ranks in place and return it."""
        if self.world > 1:
            self._call(lambda: dist.all_reduce(x))
        return x

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Replace every gradient by its sum over ranks. A parameter that no rank has used keeps no gradient."""
        if self.world == 1:
            return
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        with_gradient = [p for p, n in zip(parameters, self.sum(used).tolist(), strict=True) if n]
        for p in with_gradient:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets([p.grad for p in with_gradient if p.grad is not None]):
            flat = self.sum(torch.cat([g.flatten() for g in bucket]))
            pieces = torch.split(flat, [g.numel() for g in bucket])
            torch._foreach_copy_(bucket, [piece.view_as(g) for piece, g in zip(pieces, bucket, strict=True)])

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Overwrite the tensors with those of rank 0."""
        if self.world > 1:
            for x in tensors:
                self._call(lambda x=x: dist.broadcast(x, 0))  # type: ignore[misc]

    def gather(self, x: Tensor) -> Tensor:
        """Stack `x` of every rank: (...) -> (world, ...)."""
        if self.world == 1:
            return x[None]
        out = [torch.empty_like(x) for _ in range(self.world)]
        self._call(lambda: dist.all_gather(out, x))
        return torch.stack(out)

    def wait(self) -> None:
        """Wait until every rank calls this, however long that takes.

        Raises:
            UserError: Another rank has failed.
        """
        if self.peers is not None:
            self.peers.wait()

    def from_first(self, value: str) -> str:
        """Return rank 0's value on every rank."""
        return value if self.peers is None else self.peers.from_first(value)

    def together(self) -> AbstractContextManager[None]:
        """Return a context in which this rank ends with an error message if another one fails, stops or is killed."""
        return nullcontext() if self.peers is None else self.peers.together()

    def _call(self, collective: Callable[[], object]) -> None:
        """Run a collective.

        Raises:
            UserError: It failed; the message names the rank that caused it.
        """
        try:
            collective()
        except RuntimeError as error:
            if self.peers is None:
                raise
            raise self.peers.explain(error) from error


def join(device: torch.device | None = None) -> Ranks:
    """Join the process group of torchrun (gloo on CPU, nccl on CUDA), or return a single rank without torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Ranks()
    if not dist.is_initialized():
        on_cuda = device is not None and device.type == "cuda"
        dist.init_process_group("nccl" if on_cuda else "gloo")
    peers = _peers() if dist.get_world_size() > 1 else None
    return Ranks(dist.get_rank(), dist.get_world_size(), peers)


@cache
def _peers() -> PeerWatch:
    """Return this process's contact with the other ranks, which uses the store of the process group."""
    store = dist.distributed_c10d._get_default_store()
    return PeerWatch(store, dist.get_rank(), dist.get_world_size(), silence_seconds())


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield consecutive tensors of one dtype, together at most BUCKET_BYTES (a larger tensor is alone)."""
    bucket: list[Tensor] = []
    size = 0
    for x in tensors:
        if bucket and (size + x.nbytes > BUCKET_BYTES or x.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(x)
        size += x.nbytes
    if bucket:
        yield bucket
