"""Weights that may be sharded over ranks (`DTensor`), and the part of them that this rank holds.

PyTorch's package is imported where ranks exist, since it takes half a second.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def _tensor() -> ModuleType:
    import torch.distributed.tensor

    return torch.distributed.tensor


def is_sharded(x: Any) -> TypeGuard[DTensor]:
    """Return whether this rank holds only a part of a tensor."""
    return dist.is_initialized() and isinstance(x, _tensor().DTensor)


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into a weight, of which this rank may hold a shard only."""
    with torch.no_grad():
        local(target).copy_(own_part(target, value))


def own_part(target: Tensor, value: Tensor) -> Tensor:
    """Return the part of a whole tensor that this rank holds of a weight, as a view; all of it if the weight is not sharded."""
    if not is_sharded(target):
        return value
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(target.shape, target.device_mesh, target.placements)
    return value[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]


def local(x: Tensor) -> Tensor:
    """Return this rank's shard of a tensor, which shares its memory; the tensor itself if it is not sharded."""
    return x.to_local() if is_sharded(x) else x


def local_parameter(p: nn.Parameter) -> nn.Parameter:
    """Return this rank's shard of a weight as a parameter on the same memory; the weight itself if it is not sharded."""
    return nn.Parameter(p.to_local(), requires_grad=p.requires_grad) if is_sharded(p) else p


def sharded_like(weight: Tensor, x: Tensor) -> Tensor:
    """Return `x`, the shard of this rank, as a tensor that is sharded as a weight is."""
    if not is_sharded(weight):
        return x
    where = weight.device_mesh, weight.placements
    return _tensor().DTensor.from_local(x, *where, run_check=False, shape=weight.shape, stride=weight.stride())


def shard_like(weight: Tensor, x: Tensor) -> Tensor:
    """Return this rank's shard of `x`, which is sharded as a weight is, or whole."""
    if not is_sharded(weight) or is_sharded(x):
        return local(x)
    return _tensor().distribute_tensor(x, weight.device_mesh, weight.placements, src_data_rank=None).to_local()


def squares(weights: Iterable[Tensor], count: Tensor) -> Tensor:
    """Return count * the sum of the squares of the weights.

    Ranks that hold parts of the weights call this together, where they are not whole. What they return differs as their counts do.
    The gradient of a part is that for the counts of all ranks, since no other rank computes it.

    Args:
        weights: Weights, whole or sharded.
        count: A scalar, of this rank.
    """
    found = [*weights]
    parts = [x for x in found if is_sharded(x)]
    zero = torch.zeros((), device=count.device)
    total = count * torch.stack([zero, *(x.float().square().sum() for x in found if not is_sharded(x))]).sum()
    if not parts:
        return total
    mesh = parts[0].device_mesh
    own = torch.stack([local(x).float().square().sum() for x in parts]).sum()
    every, counts = own.detach().clone(), count.detach().float().clone()
    dist.all_reduce(every, group=mesh.get_group(mesh.ndim - 1))
    for axis in range(mesh.ndim):
        dist.all_reduce(counts, group=mesh.get_group(axis))
    return total + count * every + counts * (own - own.detach())


def gathered(x: Tensor) -> Tensor:
    """Return the whole tensor of which every rank has a shard. All ranks call this."""
    return x.full_tensor() if is_sharded(x) else x
