"""AdamW on a table of which few rows are read: the same numbers as on all of it, for the rows that were ever read alone.

A row that no text has had yet has a gradient of zero, and so had it in every step before: its mean and its square are
zero, AdamW moves it by 0 / (0 + eps), and tables do not decay (`firth.train.optimizer`). So it need not be visited. A row
that was read once goes on moving by its mean, and is visited in every step from then on. (torch's SparseAdam forgets those,
and is another method.)

    of 30,522 x 384 word vectors 3,000 have been read: 3 ms a step, where clearing, clipping and moving all take 45

>>> table = nn.Embedding(5, 2, sparse=True, _weight=torch.zeros(5, 2))
>>> table(torch.tensor([3, 3])).sum().backward()
>>> rows = SparseAdam(table.weight, (0.9, 0.999), 1e-8)
>>> rows.update(0.5)
>>> [round(x, 4) for x in table.weight[:, 0].tolist()], rows.seen.tolist()
([0.0, 0.0, 0.0, -0.5, 0.0], [3])
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from firth import kernels
from firth.model import native


def sums(table: nn.Parameter) -> Tensor | None:
    """The numbers of a table's gradient, each row once, to be read and changed in place; None if it has no gradient."""
    if table.grad is None or not table.grad.is_sparse:
        return table.grad
    table.grad = coalesced(table.grad)
    return table.grad.values()


def coalesced(grad: Tensor) -> Tensor:
    """Return a sparse gradient (V, width) with each row once, in rising order."""
    index, values = grad._indices(), grad._values()
    if grad.is_coalesced() or not _one_pass(values):
        return grad.coalesce()
    index, values = index[0].contiguous(), values.contiguous()
    rows, added, unique = torch.empty_like(index), torch.empty_like(values), torch.empty(1, dtype=torch.int64)
    native.library().sum_rows(
        index.data_ptr(), values.data_ptr(), rows.data_ptr(), added.data_ptr(), unique.data_ptr(), *values.shape, len(grad),
        native.threads(),
    )  # fmt: skip
    count = int(unique)
    return torch.sparse_coo_tensor(
        rows[:count][None], added[:count], grad.shape, is_coalesced=True, check_invariants=False
    )


def _one_pass(*tensors: Tensor) -> bool:
    """Whether the compiled passes read these, and this machine is quicker at them."""
    return native.supports(*tensors) and all(x.dtype == torch.float32 for x in tensors) and KERNEL.choice() == "native"


class SparseAdam:
    """The moments of a table (V, width), in the order in which its rows were first read: `seen` (n,).

    Its gradient may be sparse, or a whole one, after which all rows count as read.
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

    def _meet(self, rows: Tensor) -> None:
        """Give new rows (n,), each named once, a slot."""
        new = rows[self.slots[rows] < 0]
        if not len(new):
            return
        count = len(self.seen)
        self.slots[new] = torch.arange(count, count + len(new))
        self.seen = torch.cat((self.seen, new))
        if len(self.seen) > len(self.mean):  # room for half as many again, so that growing costs little in all
            room = min(len(self.table), len(self.seen) * 3 // 2)
            self.mean, self.square = (
                torch.cat((x[:count], x.new_zeros(room - count, x.shape[1]))) for x in (self.mean, self.square)
            )

    @torch.no_grad()
    def update(self, rate: float) -> None:
        """One step along the table's gradient; none without one."""
        grad = self.table.grad
        if grad is None:
            return
        grad = coalesced(grad) if grad.is_sparse else grad
        rows = grad.indices()[0] if grad.is_sparse else torch.arange(len(grad))
        self._meet(rows)
        values = grad.values() if grad.is_sparse else grad
        count = len(self.seen)
        self.step.add_(1)
        if self.table.is_contiguous() and _one_pass(self.table, values):
            self._move_native(rate, rows, values)
            return
        whole = self.mean.new_zeros(count, self.mean.shape[1])
        whole[self.slots[rows]] = values
        weights = self.table.index_select(0, self.seen)
        torch._fused_adamw_(
            [weights], [whole], [self.mean[:count]], [self.square[:count]], [], [self.step], lr=rate,
            beta1=self.betas[0], beta2=self.betas[1], weight_decay=0.0, eps=self.eps, amsgrad=False, maximize=False,
        )  # fmt: skip
        self.table.index_copy_(0, self.seen, weights)

    def _move_native(self, rate: float, rows: Tensor, values: Tensor) -> None:
        """The same in one pass over the rows that were read."""
        origin = torch.full_like(self.seen, -1)
        origin[self.slots[rows]] = torch.arange(len(rows))
        values, step = values.contiguous(), int(self.step)
        first, second = (1 - beta**step for beta in self.betas)
        native.library().adamw_rows(
            self.table.data_ptr(), self.seen.data_ptr(), origin.data_ptr(), values.data_ptr(), self.mean.data_ptr(),
            self.square.data_ptr(), *self.betas, rate / first, math.sqrt(second), self.eps, *self.mean[: len(origin)].shape,
            native.threads(),
        )  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        """{"mean", "square"}: of the whole table, (V, width); "step". Nothing before the first step."""
        if not self.step:
            return {}
        whole = [torch.zeros_like(self.table.detach()) for _ in range(2)]
        for full, own in zip(whole, (self.mean, self.square), strict=True):
            full[self.seen] = own[: len(self.seen)]
        return {"mean": whole[0], "square": whole[1], "step": self.step.clone()}

    def restore(self, mean: Tensor, square: Tensor, step: Tensor) -> None:
        """The inverse of `state`: a row whose moments are both zero is as if it had not been read."""
        self.__init__(self.table, self.betas, self.eps)  # type: ignore[misc]
        self._meet(((mean != 0) | (square != 0)).any(-1).nonzero()[:, 0])
        count = len(self.seen)
        self.mean[:count], self.square[:count] = mean[self.seen], square[self.seen]
        self.step = step.clone()


def _workload(way: str) -> kernels.Workload:
    """A step on 2,000 rows, each read twice, of 8,000 that were read before; width 128."""
    table = nn.Parameter(torch.ones(8000, 128))
    rows = SparseAdam(table, (0.9, 0.99), 1e-8)
    rows._meet(torch.arange(8000))
    read = torch.arange(4000)[None] % 2000
    grad = torch.sparse_coo_tensor(read, torch.ones(4000, 128), (8000, 128), check_invariants=False)
    if way == "native":
        native.library()

    def work() -> None:
        table.grad = grad
        with kernels.forced({KERNEL.name: way}):
            rows.update(1e-3)

    return work


KERNEL = kernels.Kernel("table-rows", {way: partial(_workload, way) for way in ("torch", "native")})
"""How the gradients of the rows that were read are added up, and AdamW moves them."""
