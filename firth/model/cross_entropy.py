"""Cross-entropy over a vocabulary without ever holding all the logits, gradients made on the way forward.

The logits of a chunk of rows are computed, scored, turned into their own gradient in place, multiplied into the
gradients of states and weight, and forgotten. Memory: one chunk in place of three (N, vocab) tensors. Products take a
whole chunk, since in half precision the sum of several costs a pass over the gradient of the weight for each. Elementwise
work takes a few rows at a time, in fp32: ten passes then read what is in the cache (PART_LOGITS).

With scores e = exp(logit - shift) and their row sum s, p = e / s is never formed: the label's e is lowered by s, the
slope of the soft cap multiplied in, and the division by s done on the narrow side of each product.

The idea is Wijmans 2024 (arXiv:2411.09009) and Liger's fused linear cross-entropy, here in a dozen plain calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from firth import kernels
from firth.model import native
from firth.model.native import address, half

CHUNK_BYTES = 1 << 26
"""Bytes of logits that are held at a time on a CPU; accelerators take four times that."""

PART_LOGITS = 1 << 19
"""Logits that are scored at a time on a CPU: 2 MB in fp32, which the caches next to the cores hold from pass to pass."""


LARGE_CAP = 80.0
"""Soft cap above which e to its power overflows: the largest logit of a row is taken off then, as without a cap."""

ABSENT = -1e30
"""The logit of an id that the tokenizer does not have: its probability is 0. It is finite, since the difference of two of
them, which a KL divergence takes, must be a number."""


class _Rows:
    """One pass over chunks of rows; all its arithmetic, shared by the two functions below.

    absent: ids (n,) that have no probability, None where all have some. way: one of KERNEL; empty: its choice.
    """

    def __init__(
        self,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cap: float,
        absent: Tensor | None = None,
        way: str = "",
    ):
        self.dtype = (
            torch.get_autocast_dtype(states.device.type)
            if torch.is_autocast_enabled(states.device.type)
            else states.dtype
        )
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        self.states = states if self.dtype == states.dtype else states.to(self.dtype)
        self.weight = weight if self.dtype == weight.dtype else weight.to(self.dtype)
        self.bias, self.cap, self.absent = bias, cap, absent
        cpu = states.device.type == "cpu"
        size = (CHUNK_BYTES if cpu else 4 * CHUNK_BYTES) // self.dtype.itemsize
        self.step = min(max(1, size // len(weight)), max(1, len(states)))
        self.part = max(1, PART_LOGITS // len(weight)) if cpu else self.step
        self.products = states.new_empty((self.step, len(weight)), dtype=self.dtype)
        plain = {None if bias is None else bias.dtype, self.wide} <= {None, torch.float32}
        self.native = plain and native.supports(self.products) and (way or KERNEL[self.dtype].choice()) == "native"
        small = (0 if self.native else min(self.part, self.step), len(weight))
        self.scores = None if self.dtype == self.wide else states.new_empty(small, dtype=self.wide)
        self.tanh = states.new_empty(small, dtype=self.wide) if cap else None

    def chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.states), self.step):
            yield slice(start, min(start + self.step, len(self.states)))

    def read(self, at: slice, labels: Tensor, learn: bool) -> tuple[Tensor, Tensor, Tensor]:
        """log p(label) (n,) of some rows; sums s (n, 1) of their scores e; and a buffer (n, vocab), valid until the next call.

        learn: let the buffer hold s times the gradient of -log p(label) by the uncapped logits.
        """
        states, labels = self.states[at], labels[at, None]
        products = self.products[: len(states)]
        torch.mm(states, self.weight.t(), out=products)
        right, total = (states.new_empty(len(states), 1, dtype=self.wide) for _ in range(2))
        if self.native:
            _score_native(products, labels, self.bias, self.absent, self.cap, learn, right, total)
            return right[:, 0], total, products
        for start in range(0, len(states), self.part):
            some = slice(start, start + self.part)
            right[some], total[some] = self._score(products[some], labels[some], learn)
        return right[:, 0], total, products

    def _score(self, products: Tensor, labels: Tensor, learn: bool) -> tuple[Tensor, Tensor]:
        """log p(label) and s (n, 1) of a few rows; see `read` for what becomes of their logits."""
        scores = products if self.scores is None else self.scores[: len(products)].copy_(products)
        if self.bias is not None:
            scores += self.bias
        tanh = None
        if self.tanh is not None:
            tanh = torch.tanh(scores.div_(self.cap), out=self.tanh[: len(products)])
            torch.mul(tanh, self.cap, out=scores)
        if self.absent is not None:
            scores.index_fill_(1, self.absent, ABSENT)
        if tanh is None or self.cap > LARGE_CAP:  # a small |logit| <= cap has no need of the row's maximum
            scores -= scores.amax(-1, keepdim=True)
        label = scores.gather(1, labels)
        scores.exp_()
        total = scores.sum(-1, keepdim=True)
        if learn:
            scores.scatter_add_(1, labels, -total)
            if tanh is not None:
                torch.ops.aten.tanh_backward.grad_input(scores, tanh, grad_input=scores)
            if self.scores is not None:
                products.copy_(scores)
        return label - total.log(), total


def _score_native(
    products: Tensor, labels: Tensor, bias: Tensor | None, absent: Tensor | None, cap: float, learn: bool,
    right: Tensor, total: Tensor,
) -> None:  # fmt: skip
    """`_Rows._score` of all rows at once, by one compiled pass; writes to products, right and total."""
    labels, bias = labels.to(torch.int64).contiguous(), None if bias is None else bias.contiguous()
    absent = None if absent is None else absent.to(torch.int64).contiguous()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < products.shape[1]:
        raise IndexError(f"a label is not one of the {products.shape[1]} ids of the vocabulary")
    native.library().cross_entropy(
        products.data_ptr(), half(products), labels.data_ptr(), address(bias), address(absent),
        0 if absent is None else len(absent), ABSENT, cap, learn, right.data_ptr(), total.data_ptr(), *products.shape,
        native.threads(),
    )  # fmt: skip


def _workload(dtype: torch.dtype, way: str) -> kernels.Workload:
    """512 rows of 2,048 logits with a soft cap, 128 numbers a state."""
    states, weight = (torch.linspace(-1, 1, n * 128).view(n, 128).to(dtype) for n in (512, 2048))
    rows, labels = _Rows(states, weight, None, 15.0, way=way), torch.arange(512)
    if way == "native":
        native.library()
    return lambda: rows.read(slice(0, 512), labels, learn=True)


KERNEL = {
    dtype: kernels.Kernel(f"cross-entropy-{name}", {way: partial(_workload, dtype, way) for way in ("torch", "native")})
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
}
"""dtype of the products -> how their logits are scored on a CPU."""


class _Gradients:
    """The gradients of states, weight and bias, summed up chunk by chunk; only those that are needed."""

    def __init__(self, rows: _Rows, states: bool, weight: bool, bias: bool):
        self.rows = rows
        self.states = torch.empty_like(rows.states) if states else None
        self.weight = torch.zeros_like(rows.weight, dtype=rows.wide) if weight and not len(rows.states) else None
        self.learns_weight = weight
        self.bias = rows.weight.new_zeros(len(rows.weight), dtype=rows.wide) if bias else None

    def add(self, at: slice, slope: Tensor, factor: Tensor) -> None:
        """Take in a chunk: slope (n, vocab), and what each row of it is to be multiplied by (n, 1)."""
        factor = factor.to(slope.dtype)
        if self.states is not None:
            torch.mm(slope, self.rows.weight, out=self.states[at])
            self.states[at] *= factor
        if self.learns_weight:
            product = slope.t() @ (self.rows.states[at] * factor)
            if self.weight is None:  # most steps have one chunk: nothing to fill with zeros and add to
                self.weight = product.to(self.rows.wide)
            else:
                self.weight += product
        if self.bias is not None:
            self.bias += torch.mv(slope.t(), factor[:, 0])


class SumNLL(torch.autograd.Function):
    """states (N, width), weight (vocab, width), bias (vocab,) or None, labels (N,) -> sum of -log p(label)."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cap: float, learn: bool,
        absent: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        rows = _Rows(states, weight, bias, cap, absent)
        needs = ctx.needs_input_grad if learn else (False, False, False)
        gradients = _Gradients(rows, *needs[:3])
        loss = states.new_zeros((), dtype=rows.wide)
        for at in rows.chunks():
            right, total, slope = rows.read(at, labels, learn=any(needs[:3]))
            loss -= right.sum()
            if any(needs[:3]):
                gradients.add(at, slope, 1 / total)
        ctx.save_for_backward(gradients.states, gradients.weight, gradients.bias)
        ctx.dtypes = states.dtype, weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias = ctx.saved_tensors
        return (
            None if states is None else (states * grad).to(ctx.dtypes[0]),
            None if weight is None else (weight * grad).to(ctx.dtypes[1]),
            None if bias is None else (bias * grad).to(ctx.dtypes[1]),
            None, None, None, None,
        )  # fmt: skip


class LogProbs(torch.autograd.Function):
    """log p(label) of each row (N,); the logits are computed again on the way back, a fourth product for their memory."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cap: float,
        absent: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        rows = _Rows(states, weight, bias, cap, absent)
        out = states.new_empty(len(states), dtype=rows.wide)
        for at in rows.chunks():
            out[at] = rows.read(at, labels, learn=False)[0]
        ctx.save_for_backward(states, weight, bias, labels)
        ctx.cap, ctx.absent = cap, absent
        ctx.autocast = (states.device.type, rows.dtype if rows.dtype != states.dtype else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, labels = ctx.saved_tensors
        device, dtype = ctx.autocast
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            rows = _Rows(states, weight, bias, ctx.cap, ctx.absent)
            gradients = _Gradients(rows, *ctx.needs_input_grad[:3])
            for at in rows.chunks():
                _, total, slope = rows.read(at, labels, learn=True)
                gradients.add(at, slope, -grad[at, None] / total)
        found = ((gradients.states, states), (gradients.weight, weight), (gradients.bias, bias))
        return *(None if g is None else g.to(of.dtype) for g, of in found), None, None, None
