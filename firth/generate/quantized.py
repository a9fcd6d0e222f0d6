"""Inference with bf16 and int8 weights, since a decoding step is bound by reading the weights.

    quantize(model, "int8")           # returns a second model, for inference only; the first is unchanged

    fp32            four bytes per weight
    bf16            two bytes; the arithmetic is bf16 too, which a CPU without instructions for it must emulate
    int8            one byte: weights are integers in -127..127 times a scale per output row.
                    Activations keep 15 bits, as two digits, each of which is one integer product
    int8-dynamic    the same weights; activations are rounded to 8 bits between the minimum and maximum of a token:
                    half of the products, and most of the error (docs/results/index.md)

All linear layers of the blocks, the LM head and the token embeddings are quantized; norms, position embeddings and biases are
not. Where the compiled decoding step is used (`firth.generate.native_decoder`), activations are not rounded, with int8-dynamic
neither; prompts and scored texts are computed as above. The rounding is that of LLM.int8 (Dettmers 2022, arXiv:2208.07339,
section 2.1, "vector-wise"): a scale per row of the weights and one per token. Where LLM.int8 multiplies the few dimensions
with outliers in fp16, all dimensions get a second digit here: no column has to be extracted, and the second product finds the
weights in the CPU's cache.

Integer sums are exact, so a linear layer gives a row the same bits in any batch and on any CPU: each token has its own scale,
unlike in torch's dynamic quantization, which has one per batch. A CPU without VNNI or AMX adds pairs of products in 16 bits,
which saturate; there, digits are smaller and there is one product more (`products_are_exact`). Attention and norms are fp32,
whose order of additions may depend on the number of rows. The last bit of such a sum can move a number over a rounding
boundary, which changes a log-probability by about as much as the rounding itself: 2^-15 of the largest number of a row for
int8, 2^-8 for int8-dynamic.

>>> import torch
>>> integers, steps = quantize_rows(torch.tensor([[1.27, -0.5], [0.0, 0.0]]))
>>> integers.tolist(), [round(x, 4) for x in steps.tolist()]
([[127, -50], [0, 0]], [0.01, 0.0])
"""

from __future__ import annotations

import copy
import math
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from firth import kernel_choice
from firth.model.block import Block, Linear
from firth.model.cross_entropy import ABSENT
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.peft.lora import adapted
from firth.types import UserError

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}

DIGITS = {"int8": 2, "int8-dynamic": 1}
"""Weight format -> number of 8-bit digits of an activation."""

MAX_DIGIT = 127
"""The largest integer of a weight or a digit."""

MAX_BASE = 128
"""The largest place value of the first digit: 127 and 64 then make 15 bits."""

MIN_STEP = 1e-30
"""The scale of a row of zeros, which avoids a division by zero."""

SATURATION_SAFE_BASE = 64
"""The place value of a digit where products saturate: 255 * 64 + 255 * 64, the most that such a CPU adds, is below 2^15."""

SCORED_ROWS = 256
"""Rows of logits that are in memory at once when texts are scored."""


@cache
def products_are_exact() -> bool:
    """Return whether this CPU multiplies 8-bit integers without saturation (oneDNN's int8 product)."""
    ones = torch.full((2, 64), MAX_DIGIT, dtype=torch.int8)
    return bool((torch._int_mm(ones, ones.t()) == 64 * MAX_DIGIT * MAX_DIGIT).all())


MAX_EXACT_FP32 = 1 << 24
"""Integers up to this are exact in fp32, which oneDNN's quantized linear layer returns."""


def _workload(way: str) -> kernel_choice.Workload:
    """Sixteen rows through a linear layer of 1024 x 1024."""
    layer = Int8Linear.of(
        torch.arange(1 << 20).remainder(15).sub(7).to(torch.int8).view(1024, 1024), torch.ones(1024), None, 1
    )
    rows = torch.ones(16, 1024, dtype=torch.int8)
    return lambda: layer.multiply(rows, way)


METHODS = ("int_mm", "qlinear") if torch.backends.mkldnn.is_available() else ("int_mm",)

KERNEL = kernel_choice.Kernel("int8", {way: partial(_workload, way) for way in METHODS})
"""How 8-bit integers are multiplied: by torch's `_int_mm`, or by oneDNN's quantized linear layer, which needs a second, packed
copy of the weights."""


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a matrix (out, in): return the integers (out, in) int8 and the scale of each row (out,) float32."""
    weight = weight.detach().float()
    steps = weight.abs().amax(-1).div_(MAX_DIGIT).clamp_(min=MIN_STEP)
    return (weight / steps[:, None]).round_().to(torch.int8), steps


@cache
def _unscaled(outputs: int) -> tuple[Tensor, Tensor]:
    """Return scales of 1 and offsets of 0 for each output."""
    return torch.ones(outputs), torch.zeros(outputs, dtype=torch.int32)


class Int8Linear(nn.Module):
    """A linear layer with int8 weights: (..., in) float -> (..., out) float32.

    Args:
        weight: (out, in) int8.
        steps: (out,) float32, the scale of each row.
        bias: (out,) or None.
        base: The place value of the first digit of an activation; 1 if it is the only one.
    """

    is_plain = False

    def __init__(self, weight: Tensor, steps: Tensor, bias: Tensor | None, base: int):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("steps", steps)
        self.register_buffer("bias", None if bias is None else bias.detach())
        self.weight: Tensor
        self.steps: Tensor
        self.bias: Tensor | None
        self.base = base
        self.register_buffer("least", torch.tensor(MIN_STEP))
        self.register_buffer("sums", weight.sum(-1, dtype=torch.int32) * steps if base == 1 else None)
        self.least: Tensor
        self.sums: Tensor | None
        self.packed: Tensor | None = None
        self.fits_fp32: bool | None = None

    @staticmethod
    def of(weight: Tensor, steps: Tensor, bias: Tensor | None, digits: int) -> Int8Linear:
        """Return a layer whose first digit has the largest place value with which no sum of this matrix overflows.

        Args:
            weight: (out, in) int8.
            steps: (out,) float32.
            bias: (out,) or None.
            digits: Digits of an activation, 1 or 2.

        Raises:
            UserError: Even one digit can overflow, which takes more than 131,072 inputs.
        """
        sums = max(1, int(weight.abs().sum(-1, dtype=torch.int64).amax()))
        max_base = (2**31 - 1) / ((MAX_DIGIT + 1) * sums)
        if max_base < 1:
            raise UserError(
                f"a linear layer of {weight.shape[1]:,} inputs cannot be summed in 32 bits: use weights=bf16"
            )
        return Int8Linear(weight, steps, bias, min(MAX_BASE, 2 ** int(math.log2(max_base))) if digits == 2 else 1)

    def part(self, start: int, stop: int) -> Int8Linear:
        """Return a layer of some of the outputs that shares the memory of this one."""
        bias = None if self.bias is None else self.bias[start:stop]
        return Int8Linear(self.weight[start:stop], self.steps[start:stop], bias, self.base)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float()
        y = self._two_digits(rows) if self.sums is None else self._one_digit(rows, self.sums)
        if self.bias is not None:
            y += self.bias
        return y if x.dim() == 2 else y.view(*x.shape[:-1], -1)

    def _two_digits(self, rows: Tensor) -> Tensor:
        """Multiply activations rounded to two digits: (n, in) -> (n, out)."""
        # abs and amax in two calls, since a norm of infinite order takes ten times as long.
        step = torch.add(self.least, rows.abs().amax(-1, True), alpha=1 / (MAX_DIGIT * self.base))
        return (self._product((rows / step).round_()) * self.steps).mul_(step)

    def _one_digit(self, rows: Tensor, sums: Tensor) -> Tensor:
        """Multiply activations rounded to one digit around the middle of each row's range: (n, in) -> (n, out)."""
        high, low = rows.amax(-1, True), rows.amin(-1, True)
        middle = torch.add(high, low).mul_(0.5)
        step = torch.add(self.least, high.sub_(low), alpha=0.5 / MAX_DIGIT)
        return (self._product((rows - middle).div_(step).round_()) * self.steps).mul_(step).addcmul_(middle, sums)

    def _product(self, integers: Tensor) -> Tensor:
        """Multiply integers of at most MAX_DIGIT * base by the weights: (n, in) float -> (n, out), exact for each digit."""
        if not products_are_exact():
            return self._narrow_product(integers)
        way = KERNEL.choice()
        if self.base == 1:
            return self.multiply(integers.to(torch.int8), way)
        first = (integers * (1 / self.base)).round_()
        second = integers.sub_(first, alpha=self.base)
        if len(integers) == 1:  # two products of one row are faster than one product of two
            high, low = self.multiply(first.to(torch.int8), way), self.multiply(second.to(torch.int8), way)
        else:
            high, low = self.multiply(torch.cat((first, second)).to(torch.int8), way).chunk(2)
        return torch.add(low, high, alpha=self.base)

    def multiply(self, digits: Tensor, way: str) -> Tensor:
        """Multiply digits by the weights.

        Args:
            digits: (n, in) int8.
            way: One of METHODS.

        Returns:
            (n, out) int32, or the same values in float32.
        """
        if way == "qlinear" and self.fits_fp32 is None:
            self.fits_fp32 = MAX_DIGIT * int(self.weight.abs().sum(-1, dtype=torch.int64).amax()) <= MAX_EXACT_FP32
        if way == "int_mm" or not self.fits_fp32:
            return torch._int_mm(digits, self.weight.t())
        if self.packed is None:
            self.packed = torch.ops.onednn.qlinear_prepack(self.weight, None)
        ones, zeros = _unscaled(len(self.weight))
        out: Tensor = torch.ops.onednn.qlinear_pointwise(
            digits, 1.0, 0, self.packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out

    def _narrow_product(self, integers: Tensor) -> Tensor:
        """`_product` with digits of at most SATURATION_SAFE_BASE; the weights are the left operand, which may be larger."""
        digits = []
        for _ in range(2 if self.base == 1 else 3):
            rest = (integers * (1 / SATURATION_SAFE_BASE)).round_()
            digits.append(integers.sub(rest, alpha=SATURATION_SAFE_BASE))
            integers = rest
        parts = torch._int_mm(self.weight, torch.cat(digits).to(torch.int8).t()).chunk(len(digits), -1)
        total = parts[-1]
        for part in parts[-2::-1]:
            total = torch.add(part, total, alpha=SATURATION_SAFE_BASE)
        return total.t().contiguous()


class Int8Embedding(nn.Module):
    """An embedding with int8 rows: ids (...) -> (..., embedding_dim) float32.

    Args:
        weight: (vocab, embedding_dim) int8.
        steps: (vocab,) float32, the scale of each row.
    """

    def __init__(self, weight: Tensor, steps: Tensor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("steps", steps)
        self.weight: Tensor
        self.steps: Tensor

    def forward(self, ids: Tensor) -> Tensor:
        return self.weight[ids].float().mul_(self.steps[ids][..., None])


class Int8LMHead(nn.Module):
    """An LM head with an int8 matrix: the interface of `LMHead`, without gradients.

    Args:
        head: The LM head; its weight and bias are removed.
        matrix: The quantized weight and bias.
    """

    def __init__(self, head: LMHead, matrix: Int8Linear):
        super().__init__()
        self.config, self.softcap, self.head, self.matrix = head.config, head.softcap, head, matrix
        head.weight, head.bias = None, None  # type: ignore[assignment]

    def restrict_vocab(self, absent: Tensor | None) -> None:
        """Give no probability to some ids (n,), as `LMHead.restrict_vocab` does."""
        self.head.restrict_vocab(absent)

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states (..., hidden_size) -> logits (..., vocab)."""
        return self._logits(self.head.transform(hidden))

    def _logits(self, transformed: Tensor) -> Tensor:
        return self.to_logits(self.matrix(transformed))

    def to_logits(self, logits: Tensor) -> Tensor:
        """Turn products (..., vocab) into logits in place: apply the softcap and exclude absent ids."""
        if self.softcap:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.head.absent is None else logits.index_fill_(-1, self.head.absent, ABSENT)

    def log_probs(self, states: Tensor, labels: Tensor) -> Tensor:
        """Return log p(label) of each row: states (N, hidden_size), labels (N,) -> (N,) float32."""
        return self._label_log_probs(self.head.transform(states), labels)

    def nll(self, states: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of -log p(label): scalar float32."""
        return -self.log_probs(states, labels).sum()

    def nll_of_transformed(self, read: Tensor, labels: Tensor) -> Tensor:
        """Return the `nll` of states that another head has transformed."""
        return -self._label_log_probs(read, labels).sum()

    def _label_log_probs(self, transformed: Tensor, labels: Tensor) -> Tensor:
        out = transformed.new_empty(len(transformed), dtype=torch.float32)
        for at in range(0, len(transformed), SCORED_ROWS):
            rows = slice(at, at + SCORED_ROWS)
            logits, label = self._logits(transformed[rows]), labels[rows, None]
            out[rows] = logits.gather(1, label)[:, 0] - logits.logsumexp(-1)
        return out


def quantize(model: LM, weights: str) -> LM:
    """Return a model for inference with other weights; it shares the tensors that are unchanged with the given one.

    Args:
        model: The model.
        weights: "fp32", "bf16", "int8" or "int8-dynamic".

    Raises:
        UserError: The weight format is unknown, or the model or this machine does not support it.
    """
    if any(type(module) is Int8Linear for module in model.modules()):
        raise UserError("the weights of this model are int8 already: quantize the original model")
    if weights in FLOATS:
        return _copy_as(model, FLOATS[weights])
    if weights not in DIGITS:
        raise UserError(f"weights={weights!r} is not one of {', '.join((*FLOATS, *DIGITS))}")
    device = model.tokens.weight.device
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        raise UserError(
            f"weights={weights} needs a CPU and a torch with oneDNN, and this model is on {device}: use bf16"
        )
    if model.config.rnn.type:
        raise UserError(
            f"weights={weights} needs attention layers, and this model is {model.config.description}: use bf16"
        )
    if adapted(model):
        raise UserError(f"weights={weights} needs a model without adapters: merge them first (lora.merge_and_unload)")
    copied, digits = _copy_as(model, torch.float32), DIGITS[weights]
    tokens: Any = copied.tokens
    table = None if model.config.embedding.characters.max_length else quantize_rows(tokens.weight)
    if "lm" in copied.heads:
        head: Any = copied.heads["lm"]
        matrix = table if table is not None and model.config.tie_embeddings else quantize_rows(head.weight)
        copied.heads["lm"] = Int8LMHead(head, Int8Linear.of(*matrix, head.bias, digits))
    if table is not None:
        copied.tokens = Int8Embedding(*table)  # type: ignore[assignment]
    _quantize_layers(copied, digits)
    return copied


def _copy_as(model: LM, dtype: torch.dtype) -> LM:
    """Return a copy for inference in another precision; tensors that have it already are shared."""
    tensors: dict[int, Any] = {}
    for p in model.parameters():
        tensors[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
    for b in model.buffers():
        tensors[id(b)] = b.to(dtype) if b.is_floating_point() else b
    return copy.deepcopy(model, tensors).eval()


def _quantize_layers(model: LM, digits: int) -> None:
    """Replace the linear layers of all blocks with int8 layers; those that read the same input become one layer."""
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        for attention in (block.attention, block.cross):
            if attention is not None:
                layers = [attention.q, attention.k, attention.v]
                attention.joined, (attention.q, attention.k, attention.v) = _join(layers, digits)
        mlp = block.mlp
        if mlp.gate is not None:
            mlp.joined, (mlp.gate, mlp.up) = _join([mlp.gate, mlp.up], digits)
    for name, layer in list(model.named_modules()):
        if type(layer) is Linear:
            model.set_submodule(name, Int8Linear.of(*quantize_rows(layer.weight), layer.bias, digits))


def _join(layers: list[nn.Linear], digits: int) -> tuple[Int8Linear, list[Int8Linear]]:
    """Return layers with the same input as one layer, and each of them as a view of its memory."""
    bias = None if layers[0].bias is None else torch.cat([m.bias.detach() for m in layers])
    joint = Int8Linear.of(*quantize_rows(torch.cat([m.weight.detach() for m in layers])), bias, digits)
    ends = torch.tensor([m.out_features for m in layers]).cumsum(0).tolist()
    return joint, [joint.part(a, b) for a, b in zip([0, *ends], ends, strict=False)]
