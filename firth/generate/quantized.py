"""A model that reads and writes with smaller weights: one step of a decoder reads each of them, which is what it costs.

    lowered(model, "int8")            # a second model, for reading only; the first is left as it is

    fp32            four bytes a weight
    bf16            two bytes; all arithmetic is in bf16 too, which a CPU without instructions for it must emulate
    int8            one byte: each output has a step of its own, and its weights are whole multiples of it, -127 to 127.
                    What they are multiplied with keeps 15 bits: as two digits, each a product of whole numbers
    int8-dynamic    the same weights; what they are multiplied with is rounded to 8 bits as well, between the least and
                    the largest number of a token: half of the products, and most of the error (docs/results/index.md)

All the maps of the blocks, the vocabulary head and the table of tokens are lowered; norms, places and biases are not.
A decoder that writes token by token reads these weights by a compiled step where there is one (`firth.generate.native_decoder`): what
they are multiplied with is then not rounded to 8 bits, in int8-dynamic neither. Prompts and scored texts are read as above.
The rounding is that of LLM.int8 (Dettmers 2022, arXiv:2208.07339, section 2.1, "vector-wise"): a step per row of the
weights and one per token. Where they take the few dimensions with outliers out and multiply those in fp16, we give all
dimensions a second digit: no column need be picked out, and the second product finds the weights in the cache.

Sums of whole numbers are exact, so a map gives a row the same bits in any batch and on any CPU: the step of a token is its
own, unlike that of torch's dynamic quantization, which is one for a whole batch. A CPU without instructions for the product
(VNNI, AMX) adds pairs of products in 16 bits, where they saturate: it gets smaller digits, and one product more
(`products_are_exact`). Attention and norms are fp32, which may add in another order for a row alone and in a batch. The last
bit of such a sum can move a number over the middle between two steps, which changes a log-probability by about as much as
the rounding itself does: 2^-15 of the largest number of a row for int8, 2^-8 for int8-dynamic.

>>> import torch
>>> whole, steps = quantize_rows(torch.tensor([[1.27, -0.5], [0.0, 0.0]]))
>>> whole.tolist(), [round(x, 4) for x in steps.tolist()]
([[127, -50], [0, 0]], [0.01, 0.0])
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from firth import kernels
from firth.model.block import MLP, Attention, Linear
from firth.model.cross_entropy import ABSENT
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.peft.lora import adapted
from firth.types import UserError

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}

DIGITS = {"int8": 2, "int8-dynamic": 1}
"""8-bit digits of what the weights are multiplied with."""

MOST = 127
"""The largest whole number of a weight or a digit."""

WIDEST = 128
"""The most that a first digit counts for: 127 and 64 then make 15 bits, and a second product of 8-bit numbers."""

SMALLEST = 1e-30
"""A step where all is zero, so that nothing is divided by it."""

NARROW = 64
"""What a digit counts for where products saturate: 255 * 64 + 255 * 64, the most that such a CPU adds, is below 2^15."""

ROWS = 256
"""Rows of logits that are held at once when texts are scored."""


@cache
def products_are_exact() -> bool:
    """Return whether this CPU multiplies whole numbers of 8 bits without saturating (oneDNN's int8 product)."""
    ones = torch.full((2, 64), MOST, dtype=torch.int8)
    return bool((torch._int_mm(ones, ones.t()) == 64 * MOST * MOST).all())


EXACT = 1 << 24
"""Whole numbers up to here are exact in fp32, which is what oneDNN's quantized linear map puts out."""


def _workload(way: str) -> kernels.Workload:
    """Sixteen rows through a map of 1024 x 1024."""
    layer = Int8Linear.of(
        torch.arange(1 << 20).remainder(15).sub(7).to(torch.int8).view(1024, 1024), torch.ones(1024), None, 1
    )
    rows = torch.ones(16, 1024, dtype=torch.int8)
    return lambda: layer.multiply(rows, way)


WAYS = ("int_mm", "qlinear") if torch.backends.mkldnn.is_available() else ("int_mm",)

KERNEL = kernels.Kernel("int8", {way: partial(_workload, way) for way in WAYS})
"""How whole numbers of 8 bits are multiplied: by torch's plain product, or by oneDNN's quantized linear map, which wants the
weights in an order of its own and so holds them twice."""


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix (out, in) as whole numbers (out, in) int8 and the step of each row (out,) float32."""
    weight = weight.detach().float()
    steps = weight.abs().amax(-1).div_(MOST).clamp_(min=SMALLEST)
    return (weight / steps[:, None]).round_().to(torch.int8), steps


@cache
def _unscaled(outputs: int) -> tuple[Tensor, Tensor]:
    """Scales of 1 and offsets of 0 for each output."""
    return torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32)


class Int8Linear(nn.Module):
    """A linear map of int8 weights: (..., in) float -> (..., out) float32.

    weight (out, in) int8; steps (out,); base: what the first digit of the input counts for, 1 where it is the only one.
    """

    def __init__(self, weight: Tensor, steps: Tensor, bias: Tensor | None, base: int):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("steps", steps)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.weight: Tensor
        self.steps: Tensor
        self.bias: Tensor | None
        self.base = base
        self.register_buffer("least", torch.tensor(SMALLEST))
        self.register_buffer("sums", weight.sum(-1, dtype=torch.int32) * steps if base == 1 else None)
        self.least: Tensor
        self.sums: Tensor | None
        self.packed: Tensor | None = None
        self.fits_fp32: bool | None = None

    @staticmethod
    def of(weight: Tensor, steps: Tensor, bias: Tensor | None, digits: int) -> Int8Linear:
        """No sum can overflow: the first digit counts for as much as the rows of this very matrix allow.

        Raises UserError where even one digit could, which takes more than 131,072 inputs.
        """
        sums = max(1, int(weight.abs().sum(-1, dtype=torch.int64).amax()))
        room = (2**31 - 1) / ((MOST + 1) * sums)
        if room < 1:
            raise UserError(f"a map of {weight.shape[1]:,} inputs cannot be summed in 32 bits: take weights bf16")
        return Int8Linear(weight, steps, bias, min(WIDEST, 2 ** int(math.log2(room))) if digits == 2 else 1)

    def part(self, start: int, stop: int) -> Int8Linear:
        """Some of its outputs as a map of their own, over the same memory."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Int8Linear(self.weight[start:stop], self.steps[start:stop], bias, self.base)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        y = self._read(rows) if self.sums is None else self._centred(rows, self.sums)
        if self.bias is not None:
            y += self.bias
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def _read(self, rows: Tensor) -> Tensor:
        """Two digits: (n, in) -> (n, out)."""
        # Two calls, since a norm over the largest number takes ten times as long.
        step = torch.add(self.least, rows.abs().amax(-1, True), alpha=1 / (MOST * self.base))
        return (self._product((rows / step).round_()) * self.steps).mul_(step)

    def _centred(self, rows: Tensor, sums: Tensor) -> Tensor:
        """One digit, counted from the middle between the least and the largest number of a row: (n, in) -> (n, out)."""
        most, least = rows.amax(-1, True), rows.amin(-1, True)
        middle = torch.add(most, least).mul_(0.5)
        step = torch.add(self.least, most.sub_(least), alpha=0.5 / MOST)
        return (self._product((rows - middle).div_(step).round_()) * self.steps).mul_(step).addcmul_(middle, sums)

    def _product(self, whole: Tensor) -> Tensor:
        """Whole numbers, at most MOST * base, times the weights: (n, in) float -> (n, out), exact for each digit."""
        if not products_are_exact():
            return self._narrow_product(whole)
        way = KERNEL.choice()
        if self.base == 1:
            return self.multiply(whole.to(torch.int8), way)
        first = (whole * (1 / self.base)).round_()
        second = whole.sub_(first, alpha=self.base)
        if len(whole) == 1:  # a product of one row is so much quicker that two of them are quicker than one of two
            high, low = self.multiply(first.to(torch.int8), way), self.multiply(second.to(torch.int8), way)
        else:
            high, low = self.multiply(torch.cat((first, second)).to(torch.int8), way).chunk(2)
        return torch.add(low, high, alpha=self.base)

    def multiply(self, digits: Tensor, way: str) -> Tensor:
        """Return digits (n, in) int8 times the weights: (n, out) int32, or float32 of the same values. way: as in KERNEL."""
        if way == "qlinear" and self.fits_fp32 is None:
            self.fits_fp32 = MOST * int(self.weight.abs().sum(-1, dtype=torch.int64).amax()) <= EXACT
        if way == "int_mm" or not self.fits_fp32:
            return torch._int_mm(digits, self.weight.t())
        if self.packed is None:
            self.packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        ones, zeros = _unscaled(len(self.weight))
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            digits, 1.0, 0, self.packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out

    def _narrow_product(self, whole: Tensor) -> Tensor:
        """`_product` with digits of at most NARROW. The weights come first, for that side is the one that may be large."""
        digits = []
        for _ in range(2 if self.base == 1 else 3):
            rest = (whole * (1 / NARROW)).round_()
            digits.append(whole.sub(rest, alpha=NARROW))
            whole = rest
        parts = torch._int_mm(self.weight, torch.cat(digits).to(torch.int8).t()).chunk(len(digits), -1)
        total = parts[-1]
        for part in parts[-2::-1]:
            total = torch.add(part, total, alpha=NARROW)
        return total.t().contiguous()


class Int8Embedding(nn.Module):
    """An embedding of int8 rows: ids (...) -> (..., width) float32."""

    def __init__(self, weight: Tensor, steps: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("steps", steps)
        self.weight: Tensor
        self.steps: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float().mul_(self.steps[ids][..., None])


class Int8LMHead(nn.Module):
    """The vocabulary head over an int8 matrix: what `Vocabulary` is to those who read, without gradients."""

    def __init__(self, head: LMHead, matrix: Int8Linear):
        super().__init__()
        self.config, self.softcap, self.head, self.matrix = head.config, head.softcap, head, matrix
        head.weight, head.bias = None, None  # type: ignore[assignment]

    def restrict_vocab(self, absent: Tensor | None) -> None:
        """Give no probability to some ids (n,), as `Vocabulary.restrict` does."""
        self.head.restrict_vocab(absent)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., width) -> logits (..., vocab)."""
        return self._capped(self.head.transform(hidden))

    def _capped(self, read: Tensor) -> Tensor:
        return self.to_logits(self.matrix(read))

    def to_logits(self, logits: Tensor) -> Tensor:
        """Return products (..., vocab) as logits, in place: capped, absent ids left out."""
        if self.softcap:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.head.absent is None else logits.index_fill_(-1, self.head.absent, ABSENT)

    def log_probs(self, states: Tensor, labels: Tensor) -> Tensor:
        """log p(label) of each row: states (N, width), labels (N,) -> (N,) float32."""
        return self._label(self.head.transform(states), labels)

    def nll(self, states: Tensor, labels: Tensor) -> Tensor:
        """Sum of -log p(label): scalar float32."""
        return -self.log_probs(states, labels).sum()

    def nll_of_transformed(self, read: Tensor, labels: Tensor) -> Tensor:
        """`nll` of what another head has read."""
        return -self._label(read, labels).sum()

    def _label(self, read: Tensor, labels: Tensor) -> Tensor:
        out = read.new_empty(len(read), dtype=torch.float32)
        for at in range(0, len(read), ROWS):
            logits, label = self._capped(read[at : at + ROWS]), labels[at : at + ROWS, None]
            out[at : at + ROWS] = logits.gather(1, label)[:, 0] - logits.logsumexp(-1)
        return out


def quantize(model: LM, weights: str) -> LM:
    """The model with such weights, for reading only; it shares with the given one whatever is not lowered.

    Raises UserError for weights that are not known, and for int8 where there are no products for it.
    """
    if any(type(module) is Int8Linear for module in model.modules()):
        raise UserError("the weights of this model are int8 already: lower the model that it was made from")
    if weights in FLOATS:
        return _twin(model, FLOATS[weights])
    if weights not in DIGITS:
        raise UserError(f"weights={weights!r} is not one of {', '.join((*FLOATS, *DIGITS))}")
    device = model.tokens.weight.device
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise UserError(
            f"weights={weights} needs a CPU and a torch with oneDNN, and this model is on {device}: take bf16"
        )
    if model.config.rnn_type:
        raise UserError(f"weights={weights} is for attention, and this model is {model.config.description}: take bf16")
    if adapted(model):
        raise UserError(
            f"weights={weights} rounds a model's own weights: fold its adapters into them first (lora.fold)"
        )
    twin, digits = _twin(model, torch.float32), DIGITS[weights]
    tokens: Any = twin.tokens
    table = None if model.config.max_characters else quantize_rows(tokens.weight)
    if "lm" in twin.heads:
        head: Any = twin.heads["lm"]
        whole = table if table is not None and model.config.tie_embeddings else quantize_rows(head.weight)
        twin.heads["lm"] = Int8LMHead(head, Int8Linear.of(*whole, head.bias, digits))
    if table is not None:
        twin.tokens = Int8Embedding(*table)  # type: ignore[assignment]
    _lower(twin, digits)
    return twin


def _twin(model: LM, dtype: torch.dtype) -> LM:
    """A second model for reading, in another precision, over the same memory where that is the same."""
    tensors: dict[int, Any] = {}
    for p in model.parameters():
        tensors[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
    for b in model.buffers():
        tensors[id(b)] = b.to(dtype) if b.is_floating_point() else b
    return copy.deepcopy(model, tensors).eval()


def _lower(module: nn.Module, digits: int) -> None:
    """Put int8 maps in the place of those in floating point, here and in all that is within."""
    QUANTIZERS.get(type(module), _children)(module, digits)


def _children(module: nn.Module, digits: int) -> None:
    for name, child in list(module.named_children()):
        if type(child) is Linear:
            setattr(module, name, Int8Linear.of(*quantize_rows(child.weight), child.bias, digits))
        else:
            _lower(child, digits)


def _joined(maps: list[nn.Linear], digits: int) -> tuple[Int8Linear, list[Int8Linear]]:
    """Several maps of one input as one, and each of them over its share of the memory."""
    bias = None if maps[0].bias is None else torch.cat([m.bias.detach() for m in maps])
    whole = Int8Linear.of(*quantize_rows(torch.cat([m.weight.detach() for m in maps])), bias, digits)
    ends = torch.tensor([m.out_features for m in maps]).cumsum(0).tolist()
    return whole, [whole.part(a, b) for a, b in zip([0, *ends], ends, strict=False)]


def _attention(module: Any, digits: int) -> None:
    module.joined, (module.q, module.k, module.v) = _joined([module.q, module.k, module.v], digits)
    _children(module, digits)


def _mlp(module: Any, digits: int) -> None:
    if module.gate is not None:
        module.joined, (module.gate, module.up) = _joined([module.gate, module.up], digits)
    _children(module, digits)


QUANTIZERS: dict[type[nn.Module], Callable[[Any, int], None]] = {Attention: _attention, MLP: _mlp}
