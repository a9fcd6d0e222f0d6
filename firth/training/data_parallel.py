"""How a training step runs on the ranks of a run: a single process, or a copy of the model on every rank.

`Parallel` is what `firth.training.step` and the trainer ask for: run the forward pass, run the backward pass, sum the
gradients over ranks. `Replicas` sums them in buckets while the last backward pass of a step still runs: a bucket is sent as
soon as its gradients are complete, in the same order on every rank. The sums are those of one all-reduce after the backward
pass: to the bit on two ranks, where a sum has two terms, and up to rounding on more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from firth.training.distributed import Ranks

T = TypeVar("T")

BUCKET_BYTES = 32 << 20
"""Bytes of gradients that are summed in one call: large enough to saturate a link, small compared with the model."""


class Parallel:
    """A single process."""

    def forward(self, function: Callable[[], T]) -> T:
        """Return `function()`, which runs the model and computes the loss."""
        return function()

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradients of a loss to those of the parameters.

        Args:
            loss: The loss of a micro-batch on this rank.
            last: Whether it is the last of the step: the gradients are then summed over ranks.
        """
        torch.autograd.backward(loss)


class Replicas(Parallel):
    """A copy of the model on every rank.

    A parameter that no rank uses in a step keeps no gradient; one that another rank uses has a gradient of zeros here.

    Args:
        parameters: The trained parameters, in the same order on every rank.
        ranks: The process group.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], ranks: Ranks) -> None:
        self.ranks = ranks
        self.buckets = [list(bucket) for bucket in buckets(parameters[::-1])]  # the backward pass starts at the end
        self._missing: list[int] = []
        self._sent: list[dist.Work] = []
        self._used: list[bool] = []
        self._overlap = False
        for number, bucket in enumerate(self.buckets):
            for p in bucket:
                p.register_post_accumulate_grad_hook(self._hook(number))

    def _hook(self, number: int) -> Callable[[Tensor], None]:
        def complete(_: Tensor) -> None:
            if self._overlap:
                self._missing[number] -= 1
                while len(self._sent) < len(self.buckets) and not self._missing[len(self._sent)]:
                    self._send()

        return complete

    def backward(self, loss: Tensor, last: bool) -> None:
        self._missing = [len(bucket) for bucket in self.buckets]
        self._sent, self._used, self._overlap = [], [], last
        super().backward(loss, last)
        self._overlap = False
        if not last:
            return
        while len(self._sent) < len(self.buckets):
            self._send()
        for work in self._sent:
            self.ranks.finish(work)
        parameters = [p for bucket in self.buckets for p in bucket]
        for p, count in zip(parameters, self.ranks.sum_numbers(*self._used), strict=True):
            if not count:
                p.grad = None

    def _send(self) -> None:
        """Start to sum the next bucket. Its gradients become views of one tensor, which is summed in place."""
        bucket = self.buckets[len(self._sent)]
        self._used += [p.grad is not None for p in bucket]
        flat = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in bucket])
        for p, piece in zip(bucket, torch.split(flat, [p.numel() for p in bucket]), strict=True):
            p.grad = piece.view_as(p)
        self._sent.append(self.ranks.begin_sum(flat))


def buckets(tensors: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield consecutive tensors of one dtype, together at most BUCKET_BYTES (a larger tensor is alone)."""
    bucket: list[nn.Parameter] = []
    size = 0
    for x in tensors:
        if bucket and (size + x.nbytes > BUCKET_BYTES or x.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(x)
        size += x.nbytes
    if bucket:
        yield bucket
