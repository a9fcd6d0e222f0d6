"""Inference with bf16 and int8 weights, since a decoding step is bound by reading the weights.

    quantize(model, "int8")           # returns a second model, for inference only; the first is unchanged

    fp32    four bytes per weight
    bf16    two bytes; the arithmetic is bf16 too, which a CPU without instructions for it must emulate
    int8    one byte: weights are integers in -127..127 times a bf16 scale for each group of 64 inputs of an output.
            Activations keep 15 bits, as two digits, each of which is one product of 8-bit integers

All linear layers of the blocks, the LM head and the token embeddings are quantized; norms, position embeddings and biases are
not. Scales per group are those of Q8_0 in llama.cpp, with twice its group; a second digit of activations takes the place of
the fp16 product of LLM.int8 for dimensions with outliers (Dettmers 2022, arXiv:2208.07339), and finds the weights in the CPU's
cache.

Products of a group are exact integers and groups are added in one order (`firth/model/int8.h`), so a row has the same bits in
any batch. Without a C compiler torch multiplies the same numbers as floats, which is slow.

>>> import torch
>>> integers, steps = quantize_groups(torch.tensor([[127.0, -50.0], [0.0, 0.0]]))
>>> integers.shape, steps.shape, (integers[0, 0, :2].int() - 128).tolist()
(torch.Size([1, 16, 16, 4]), torch.Size([1, 1, 16]), [[127, -50, 0, 0], [0, 0, 0, 0]])
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth import kernel_choice
from firth.generate.native_kernels import few_rows
from firth.model.block import Block, Linear
from firth.model.cross_entropy import ABSENT
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.peft.lora import adapted
from firth.types import UserError

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}

FORMATS = (*FLOATS, "int8")
"""Weight formats."""

MAX_WEIGHT = 127
"""The largest integer of a weight."""

MAX_ACTIVATION = 127 * 128
"""The largest integer of an activation: two digits, the first of which has the place value 128."""

GROUP, PANEL = 64, 16
"""Inputs with one scale, and outputs whose bytes lie together (`firth/model/int8.h`)."""

MIN_STEP = 1e-30
"""The scale of a group of zeros, which avoids a division by zero."""

MIN_ACTIVATION = 1e-30
"""A group of activations that are all smaller is zeros: the inverse of its scale would be infinite."""

SCORED_ROWS = 256
"""Rows of logits that are in memory at once when texts are scored."""


def quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a matrix (out, in).

    Returns:
        Its integers + 128 in panels, (out / PANEL, in / 4, PANEL, 4) uint8, and their scales (out / PANEL, in / GROUP, PANEL)
        bfloat16; out and in are rounded up with zeros.
    """
    out, inputs = weight.shape
    padded = F.pad(weight.detach().float(), (0, -inputs % GROUP, 0, -out % PANEL))
    groups = padded.view(len(padded), -1, GROUP)
    # A scale is rounded before the division, and an integer that its rounding makes too large is clamped.
    steps = groups.abs().amax(-1).div_(MAX_WEIGHT).clamp_(min=MIN_STEP).bfloat16()
    integers = (groups / steps.float()[..., None]).round_().clamp_(-MAX_WEIGHT, MAX_WEIGHT).add_(128).to(torch.uint8)
    panels = integers.view(-1, PANEL, padded.shape[1] // 4, 4).transpose(1, 2).contiguous()
    return panels, steps.view(-1, PANEL, steps.shape[1]).transpose(1, 2).contiguous()


def dequantize(panels: Tensor, steps: Tensor, out: int, inputs: int) -> Tensor:
    """Return the matrix (out, inputs) float32 that `quantize_groups` has stored."""
    integers = panels.transpose(1, 2).reshape(len(panels) * PANEL, -1, GROUP).float().sub_(128)
    scales = steps.transpose(1, 2).reshape(len(integers), -1, 1).float()
    return (integers * scales).flatten(1)[:out, :inputs]


def round_activations(x: Tensor) -> Tensor:
    """Return x (..., in) rounded to integers of at most MAX_ACTIVATION, times a scale per row and group."""
    groups = F.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    largest = groups.abs().amax(-1, keepdim=True)
    # The inverse of the scale, as in int8.h: a quotient may round otherwise.
    inverse = torch.where(largest >= MIN_ACTIVATION, MAX_ACTIVATION / largest, 0.0)
    return ((groups * inverse).round_() * (largest / MAX_ACTIVATION)).flatten(-2)[..., : x.shape[-1]]


class Int8Linear(nn.Module):
    """A linear layer with int8 weights: (..., in) float -> (..., out) float32.

    Args:
        weight: Its integers in panels (`quantize_groups`).
        steps: Their scales.
        size: (out, in).
        bias: (out,) or None.
    """

    is_plain = False

    def __init__(self, weight: Tensor, steps: Tensor, size: tuple[int, int], bias: Tensor | None):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("steps", steps)
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self.weight: Tensor
        self.steps: Tensor
        self.bias: Tensor | None
        self.out_features, self.in_features = size

    @staticmethod
    def of(weight: Tensor, bias: Tensor | None) -> Int8Linear:
        """Quantize a matrix (out, in)."""
        return Int8Linear(*quantize_groups(weight), (len(weight), weight.shape[1]), bias)

    def part(self, start: int, stop: int) -> Int8Linear:
        """Return a layer of some of the outputs, whole panels, that shares the memory of this one."""
        bias = None if self.bias is None else self.bias[start:stop]
        panels = slice(start // PANEL, -(-stop // PANEL))
        return Int8Linear(self.weight[panels], self.steps[panels], (stop - start, self.in_features), bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).float().contiguous()
        y = self.multiply(rows, KERNEL.choice())
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def multiply(self, rows: Tensor, way: str) -> Tensor:
        """Multiply rows (n, in) float32 by the weights: (n, out) float32.

        Args:
            rows: Contiguous.
            way: "native" or "torch".
        """
        if way == "native":
            return few_rows(rows, self.weight, self.steps, self.bias, self.out_features)
        weight = dequantize(self.weight, self.steps, self.out_features, self.in_features)
        return F.linear(round_activations(rows), weight, self.bias)


def _workload(way: str) -> kernel_choice.Workload:
    """Sixteen rows through a linear layer of 1024 x 1024."""
    layer, rows = Int8Linear.of(torch.arange(1 << 20).remainder(15).sub(7).view(1024, 1024), None), torch.ones(16, 1024)
    return lambda: layer.multiply(rows, way)


KERNEL = kernel_choice.Kernel("int8", {way: partial(_workload, way) for way in ("torch", "native")})
"""How 8-bit integers are multiplied: as floats by torch, or by the compiled kernel."""


class Int8Embedding(nn.Module):
    """An embedding with int8 rows: ids (...) -> (..., embedding_dim) float32.

    Args:
        weight: Integers in panels (`quantize_groups`).
        steps: Their scales.
        size: (vocab, embedding_dim).
    """

    def __init__(self, weight: Tensor, steps: Tensor, size: tuple[int, int]):
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("steps", steps)
        self.weight: Tensor
        self.steps: Tensor
        self.num_embeddings, self.embedding_dim = size

    def forward(self, ids: Tensor) -> Tensor:
        panel, lane = ids // PANEL, ids % PANEL
        integers = self.weight[panel, :, lane].float().sub_(128).view(*ids.shape, self.steps.shape[1], GROUP)
        return integers.mul_(self.steps[panel, :, lane].float()[..., None]).flatten(-2)[..., : self.embedding_dim]


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
        weights: One of FORMATS.

    Raises:
        UserError: The weight format is unknown, or the model or this machine does not support it.
    """
    if any(type(module) is Int8Linear for module in model.modules()):
        raise UserError("the weights of this model are int8 already: quantize the original model")
    if weights in FLOATS:
        return _copy_as(model, FLOATS[weights])
    if weights not in FORMATS:
        raise UserError(f"weights={weights!r} is not one of {', '.join(FORMATS)}")
    device = model.tokens.weight.device
    if device.type != "cpu":
        raise UserError(f"weights={weights} needs a CPU, and this model is on {device}: use bf16")
    if model.config.rnn.type:
        raise UserError(
            f"weights={weights} needs attention layers, and this model is {model.config.description}: use bf16"
        )
    if adapted(model):
        raise UserError(f"weights={weights} needs a model without adapters: merge them first (lora.merge_and_unload)")
    copied = _copy_as(model, torch.float32)
    tokens: Any = copied.tokens
    table = None
    if not model.config.embedding.characters.max_length:
        table = Int8Embedding(*quantize_groups(tokens.weight), tuple(tokens.weight.shape))
    if "lm" in copied.heads:
        head: Any = copied.heads["lm"]
        if table is not None and model.config.tie_embeddings:
            matrix = Int8Linear(table.weight, table.steps, tuple(head.weight.shape), head.bias)
        else:
            matrix = Int8Linear.of(head.weight, head.bias)
        copied.heads["lm"] = Int8LMHead(head, matrix)
    if table is not None:
        copied.tokens = table  # type: ignore[assignment]
    _quantize_layers(copied)
    return copied


def _copy_as(model: LM, dtype: torch.dtype) -> LM:
    """Return a copy for inference in another precision; tensors that have it already are shared."""
    tensors: dict[int, Any] = {}
    for p in model.parameters():
        tensors[id(p)] = nn.Parameter(p.detach().to(dtype), requires_grad=False)
    for b in model.buffers():
        tensors[id(b)] = b.to(dtype) if b.is_floating_point() else b
    return copy.deepcopy(model, tensors).eval()


def _quantize_layers(model: LM) -> None:
    """Replace the linear layers of all blocks with int8 layers; those that read the same input become one layer."""
    blocks: list[Any] = [module for module in model.modules() if isinstance(module, Block)]
    for block in blocks:
        for attention in (block.attention, block.cross):
            if attention is not None:
                layers = [attention.q, attention.k, attention.v]
                attention.joined, (attention.q, attention.k, attention.v) = _join(layers)
        mlp = block.mlp
        if mlp.gate is not None:
            mlp.joined, (mlp.gate, mlp.up) = _join([mlp.gate, mlp.up])
    for name, layer in list(model.named_modules()):
        if type(layer) is Linear:
            model.set_submodule(name, Int8Linear.of(layer.weight, layer.bias))


def _join(layers: list[nn.Linear]) -> tuple[Int8Linear | None, list[Int8Linear]]:
    """Return layers with the same input as one layer, and each of them as a view of its memory.

    Layers whose outputs do not fill whole panels stay separate; there is none for all of them then.
    """
    if any(m.out_features % PANEL for m in layers):
        return None, [Int8Linear.of(m.weight, m.bias) for m in layers]
    bias = None if layers[0].bias is None else torch.cat([m.bias.detach() for m in layers])
    joint = Int8Linear.of(torch.cat([m.weight.detach() for m in layers]), bias)
    ends = torch.tensor([m.out_features for m in layers]).cumsum(0).tolist()
    return joint, [joint.part(a, b) for a, b in zip([0, *ends], ends, strict=False)]
