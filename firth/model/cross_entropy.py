"""Cross-entropy over a vocabulary without holding all logits; gradients are computed in the forward pass.

The logits of a chunk of rows are computed, replaced by their gradient in place, multiplied into the gradients of states and
weight, and discarded. Memory: one chunk in place of three (N, vocab_size) tensors. Products take a whole chunk, since in half
precision the sum of several costs a pass over the gradient of the weight for each. Elementwise operations take a few rows at
a time, in fp32, so that their ten passes stay in the cache (PART_LOGITS).

With scores e = exp(logit - shift) and their row sum s, p = e / s is never formed: s is subtracted from the label's e, the
derivative of the soft cap is multiplied in, and the division by s is done on the narrow side of each product.

The method is that of Wijmans 2024 (arXiv:2411.09009) and of Liger's fused linear cross-entropy, with torch's operators.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from firth import kernel_choice
from firth.model import native
from firth.model.native import address, half

CHUNK_BYTES = 1 << 26
"""Bytes of logits held at a time on a CPU; accelerators hold four times as many."""

PART_LOGITS = 1 << 19
"""Logits processed at a time on a CPU: 2 MB in fp32, which stay in the cache of a core."""


LARGE_CAP = 80.0
"""Soft cap above which its exponential overflows: the largest logit of a row is then subtracted, as without a cap."""

ABSENT = -1e30
"""Logit of an id that the tokenizer does not have: its probability is 0. It is finite because a KL divergence subtracts two
of them."""


class _Rows:
    """Scores of rows in chunks, shared by the two functions below.

    Args:
        states: (N, width).
        weight: (vocab_size, width).
        bias: (vocab_size,) or None.
        cap: Soft cap of the logits; 0: none.
        absent: (n,) ids of probability 0; None: none.
        kernel: "torch" or "native"; empty: the choice of KERNEL.
    """

    def __init__(
        self,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        cap: float,
        absent: Tensor | None = None,
        kernel: str = "",
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
        self.native = plain and native.supports(self.products) and (kernel or KERNEL[self.dtype].choice()) == "native"
        small = (0 if self.native else min(self.part, self.step), len(weight))
        self.scores = None if self.dtype == self.wide else states.new_empty(small, dtype=self.wide)
        self.tanh = states.new_empty(small, dtype=self.wide) if cap else None

    def chunks(self) -> Iterator[slice]:
        for start in range(0, len(self.states), self.step):
            yield slice(start, min(start + self.step, len(self.states)))

    def read(self, at: slice, labels: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores of some rows.

        Args:
            at: The rows.
            labels: (N,) token ids of all rows.
            needs_grad: Whether the buffer gets s times the gradient of -log p(label) by the uncapped logits.

        Returns:
            log p(label) (n,), the sums s (n, 1) of the scores e, and a buffer (n, vocab_size), valid until the next call.
        """
        states, labels = self.states[at], labels[at, None]
        products = self.products[: len(states)]
        torch.mm(states, self.weight.t(), out=products)
        right, total = (states.new_empty(len(states), 1, dtype=self.wide) for _ in range(2))
        if self.native:
            _score_native(products, labels, self.bias, self.absent, self.cap, needs_grad, right, total)
            return right[:, 0], total, products
        for start in range(0, len(states), self.part):
            some = slice(start, start + self.part)
            right[some], total[some] = self._score(products[some], labels[some], needs_grad)
        return right[:, 0], total, products

    def _score(self, products: Tensor, labels: Tensor, needs_grad: bool) -> tuple[Tensor, Tensor]:
        """Return log p(label) and s (n, 1) of a few rows; `products` is overwritten as in `read`."""
        scores = products if self.scores is None else self.scores[: len(products)].copy_(products)
        if self.bias is not None:
            scores += self.bias
        tanh = None
        if self.tanh is not None:
            tanh = torch.tanh(scores.div_(self.cap), out=self.tanh[: len(products)])
            torch.mul(tanh, self.cap, out=scores)
        if self.absent is not None:
            scores.index_fill_(1, self.absent, ABSENT)
        if tanh is None or self.cap > LARGE_CAP:  # |logit| <= a small cap: no need to subtract the row's maximum
            scores -= scores.amax(-1, keepdim=True)
        label = scores.gather(1, labels)
        scores.exp_()
        total = scores.sum(-1, keepdim=True)
        if needs_grad:
            scores.scatter_add_(1, labels, -total)
            if tanh is not None:
                torch.ops.aten.tanh_backward.grad_input(scores, tanh, grad_input=scores)
            if self.scores is not None:
                products.copy_(scores)
        return label - total.log(), total


def _score_native(
    products: Tensor, labels: Tensor, bias: Tensor | None, absent: Tensor | None, cap: float, needs_grad: bool,
    right: Tensor, total: Tensor,
) -> None:  # fmt: skip
    """Compute `_Rows._score` of all rows in one compiled pass; writes to products, right and total."""
    labels, bias = labels.to(torch.int64).contiguous(), None if bias is None else bias.contiguous()
    absent = None if absent is None else absent.to(torch.int64).contiguous()
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < products.shape[1]:
        raise IndexError(f"a label is not in the vocabulary of {products.shape[1]} ids")
    native.library().cross_entropy(
        products.data_ptr(), half(products), labels.data_ptr(), address(bias), address(absent),
        0 if absent is None else len(absent), ABSENT, cap, needs_grad, right.data_ptr(), total.data_ptr(), *products.shape,
        native.threads(),
    )  # fmt: skip


def _workload(dtype: torch.dtype, kernel: str) -> kernel_choice.Workload:
    """Return 512 rows of 2,048 logits with a soft cap and states of width 128."""
    states, weight = (torch.linspace(-1, 1, n * 128).view(n, 128).to(dtype) for n in (512, 2048))
    rows, labels = _Rows(states, weight, None, 15.0, kernel=kernel), torch.arange(512)
    if kernel == "native":
        native.library()
    return lambda: rows.read(slice(0, 512), labels, needs_grad=True)


KERNEL = {
    dtype: kernel_choice.Kernel(
        f"cross-entropy-{name}", {choice: partial(_workload, dtype, choice) for choice in ("torch", "native")}
    )
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
}
"""dtype of the products -> measured choice for scoring their logits on a CPU."""


class _Gradients:
    """Gradients of states, weight and bias, accumulated by chunk; only those that are needed."""

    def __init__(self, rows: _Rows, states: bool, weight: bool, bias: bool):
        self.rows = rows
        self.states = torch.empty_like(rows.states) if states else None
        self.weight = torch.zeros_like(rows.weight, dtype=rows.wide) if weight and not len(rows.states) else None
        self.needs_weight = weight
        self.bias = rows.weight.new_zeros(len(rows.weight), dtype=rows.wide) if bias else None

    def add(self, at: slice, logit_grad: Tensor, factor: Tensor) -> None:
        """Add a chunk: logit gradients `logit_grad` (n, vocab_size), to be multiplied by `factor` (n, 1)."""
        factor = factor.to(logit_grad.dtype)
        if self.states is not None:
            torch.mm(logit_grad, self.rows.weight, out=self.states[at])
            self.states[at] *= factor
        if self.needs_weight:
            product = logit_grad.t() @ (self.rows.states[at] * factor)
            if self.weight is None:  # most steps have one chunk: no zeros to add to
                self.weight = product.to(self.rows.wide)
            else:
                self.weight += product
        if self.bias is not None:
            self.bias += torch.mv(logit_grad.t(), factor[:, 0])


class SumNLL(torch.autograd.Function):
    """Sum of -log p(label): states (N, width), weight (vocab_size, width), bias (vocab_size,), labels (N,) -> scalar."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cap: float, needs_grad: bool,
        absent: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        rows = _Rows(states, weight, bias, cap, absent)
        needs = ctx.needs_input_grad if needs_grad else (False, False, False)
        gradients = _Gradients(rows, *needs[:3])
        loss = states.new_zeros((), dtype=rows.wide)
        for at in rows.chunks():
            right, total, logit_grad = rows.read(at, labels, needs_grad=any(needs[:3]))
            loss -= right.sum()
            if any(needs[:3]):
                gradients.add(at, logit_grad, 1 / total)
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
    """log p(label) of each row (N,). The backward pass recomputes the logits: a fourth product saves their memory."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, cap: float,
        absent: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        rows = _Rows(states, weight, bias, cap, absent)
        out = states.new_empty(len(states), dtype=rows.wide)
        for at in rows.chunks():
            out[at] = rows.read(at, labels, needs_grad=False)[0]
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
                _, total, logit_grad = rows.read(at, labels, needs_grad=True)
                gradients.add(at, logit_grad, -grad[at, None] / total)
        pairs = ((gradients.states, states), (gradients.weight, weight), (gradients.bias, bias))
        return *(None if g is None else g.to(of.dtype) for g, of in pairs), None, None, None
