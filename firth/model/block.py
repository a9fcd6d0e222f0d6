"""Norms and the transformer block.

Norms: LayerNorm (Ba 2016) and RMSNorm (Zhang and Sennrich 2019), each with or without gain and offset.

>>> import torch
>>> RMSNorm(4, weight=False, bias=False, eps=0.0)(torch.tensor([1.0, -1.0, 1.0, -1.0]) * 3).tolist()
[1.0, -1.0, 1.0, -1.0]

Transformer block: attention, cross-attention where there is an encoder, and an MLP, with residual connections.

Pre-norm (GPT-2, Llama, T5): x + f(norm(x)). Post-norm (BERT): norm(x + f(x)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.model import native
from firth.model.attention import AttentionMask, attend
from firth.model.config import ModelConfig
from firth.model.config_groups import GATED
from firth.model.fused import (
    ACTIVATION,
    Dropout,
    heads,
    normalized,
    project,
    relu2,
    rotate,
    rotate_by_matrix,
    runs_native,
    unit_rms,
)
from firth.model.kv_cache import KVCache
from firth.model.positions import DistanceIndex, RelativeDistance
from firth.model.variants import LinformerSlots


class _Norm(nn.Module):
    """A norm over the last axis, (..., width) -> (..., width).

    Args:
        width: Size of the last axis.
        weight: Whether there is a gain.
        bias: Whether there is an offset.
        eps: Added to the variance.
        to_maps: Whether the output goes to linear maps only. Autocast rounds it there, so it is written rounded.
    """

    center: bool

    def __init__(self, width: int, weight: bool, bias: bool, eps: float, to_maps: bool = False):
        super().__init__()
        self.width, self.eps, self.to_maps = width, eps, to_maps
        self.weight = nn.Parameter(torch.ones(width)) if weight else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if self.to_maps and torch.is_autocast_enabled(device) else None
        return normalized(x, self.weight, self.bias, self.eps, self.center, dtype)


class LayerNorm(_Norm):
    """Layer norm: zero mean and unit variance, then gain and offset if there are any (see `_Norm`)."""

    center = True


class RMSNorm(_Norm):
    """RMS norm: unit root mean square, then gain if there is one (see `_Norm`)."""

    center = False


def make_norm(config: ModelConfig, width: int = 0, to_maps: bool = False) -> nn.Module:
    """Return the configured norm over `width` numbers (0: hidden_size); `to_maps` as in `_Norm`."""
    width = width or config.hidden_size
    if config.norm.type == "layer":
        return LayerNorm(width, config.norm.weight, config.norm.bias, config.norm.eps, to_maps)
    return RMSNorm(width, config.norm.weight, False, config.norm.eps, to_maps)


def gelu_tanh(x: Tensor) -> Tensor:
    """Return GELU in its tanh approximation: `gelu_new` of GPT-2 and T5."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
}


class Linear(nn.Linear):
    """nn.Linear that is fast for a few rows too (`firth.model.fused.project`): (..., in) -> (..., out).

    Attributes:
        is_plain: Whether the layer is its weight and bias and nothing else, so that it can be part of one product.
    """

    is_plain = True

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias)


def joint_projection(x: Tensor, maps: Sequence[Linear]) -> Tensor:
    """Return the concatenated outputs of several linear maps of one input: (..., in) -> (..., sum of out).

    In training this is one product, so that the backward pass reads x once and adds up no three gradients of x. Decoding
    keeps separate products: concatenating the weights of 29 M parameters takes 10 ms and saves 0.3 ms.
    """
    if not torch.is_grad_enabled() or not all(m.is_plain for m in maps):
        return torch.cat([m(x) for m in maps], -1)
    bias = None if maps[0].bias is None else torch.cat([m.bias for m in maps])
    return F.linear(x, torch.cat([m.weight for m in maps]), bias)


def can_join(x: Tensor, maps: Sequence[Linear]) -> bool:
    """Return whether `joint_projection` is faster: all maps are plain, and x has more numbers than their weights."""
    return all(m.is_plain for m in maps) and x.numel() >= sum(m.weight.numel() for m in maps)


@dataclass(frozen=True)
class PositionSubset:
    """The positions of each row that have queries; all others are keys only.

    Args:
        index: (B, W) positions, each once in a row.
        rope: Rotary cosines and sines at these positions, or None.
    """

    index: Tensor
    rope: tuple[Tensor, Tensor] | None

    def gather(self, x: Tensor) -> Tensor:
        """Return x at the positions: (B, T, width) -> (B, W, width)."""
        return x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))

    def scatter(self, x: Tensor, length: int) -> Tensor:
        """Return x at its positions, with zeros elsewhere: (B, W, width) -> (B, length, width)."""
        index = self.index[..., None].expand(-1, -1, x.shape[-1])
        return x.new_zeros(len(x), length, x.shape[-1]).scatter(1, index, x)


@dataclass(frozen=True)
class AttentionContext:
    """What the attention of a layer reads besides the states of its tokens; shared by all layers, or "of the layer".

    Args:
        mask: Attention mask; with `subset`, of its queries only.
        rope: Rotary cosines (B or 1, T, 1, head_dim) and sines (B or 1, T, 1, head_dim / 2).
        rotation: The same as matrices (B or 1, 1, head_dim, head_dim), while decoding.
        bias: T5's relative bias (B or 1, heads, T, S).
        cache: Keys and values of earlier tokens.
        distances: XLNet's relative positions.
        slots: Linformer's projections of keys and values; of the layer.
        prefix_kv: Keys and values (KV, V, D) of a trained prefix; of the layer.
        memory_states: States (B, M, hidden_size) of positions before the row, at the input of the layer.
        encoder_kv: Keys and values (B, KV, S, D) of the encoder's states, for cross-attention; of the layer.
        subset: The positions that have queries; None: all. Of the last layer.
    """

    mask: AttentionMask
    rope: tuple[Tensor, Tensor] | None = None
    rotation: Tensor | None = None
    bias: Tensor | None = None
    cache: KVCache | None = None
    distances: DistanceIndex | None = None
    slots: LinformerSlots | None = None
    prefix_kv: tuple[Tensor, Tensor] | None = None
    memory_states: Tensor | None = None
    encoder_kv: tuple[Tensor, Tensor] | None = None
    subset: PositionSubset | None = None

    def queries(self, x: Tensor) -> Tensor:
        """Return x (B, T, width) at the positions that have queries."""
        return x if self.subset is None else self.subset.gather(x)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values, (B, T, hidden_size) -> the same: self- or cross-attention."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_width, self.qk_norm, self.eps = config.head_dim, config.attention.qk_norm, config.norm.eps
        self.scale = config.head_dim**-0.5 if config.attention.scale_scores else 1.0
        self.dropout = config.dropout
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.distance = RelativeDistance(config, Linear) if config.position.type == "xlnet" else None
        bias = config.bias and self.distance is None  # XLNet's own offsets replace them
        self.q_gain = nn.Parameter(torch.ones(config.head_dim)) if config.attention.qk_norm_weight else None
        self.k_gain = nn.Parameter(torch.ones(config.head_dim)) if config.attention.qk_norm_weight else None
        self.q = Linear(config.hidden_size, config.num_heads * config.head_dim, bias=bias)
        self.k = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=bias)
        self.v = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=bias)
        self.o = Linear(
            config.num_heads * config.head_dim, config.hidden_size, bias=bias and config.bias_location != "qkv"
        )
        self.joined: nn.Module | None = None
        """q, k and v as one map, once quantized (`firth.generate.quantized`)."""

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_width)  # unflatten takes three times as long

    def keys_values(self, states: Tensor, context: AttentionContext | None = None) -> tuple[Tensor, Tensor]:
        """Return keys and values of states (B, S, hidden_size): two of (B, KV, S, D). None: without positions."""
        rope = None if context is None else context.rope
        if self.k_gain is None and (context is None or context.rotation is None) and can_join(states, (self.k, self.v)):
            joined, eps = joint_projection(states, (self.k, self.v)), self.eps if self.qk_norm else -1.0
            return heads(joined, rope, eps, 0, self.kv_heads, self.head_width)[1:]
        k = self._position(self.k(states), context, self.k_gain)
        return k.transpose(1, 2), self._heads(self.v(states)).transpose(1, 2)

    def queries(self, x: Tensor, context: AttentionContext) -> Tensor:
        """Return the queries of x (B, T, hidden_size): (B, heads, T, D), or (B, heads, W, D) with `context.subset`."""
        own = context if context.subset is None else replace(context, rope=context.subset.rope)
        return self._position(self.q(context.queries(x)), own, self.q_gain).transpose(1, 2)

    def _position(self, x: Tensor, context: AttentionContext | None, gain: Tensor | None) -> Tensor:
        """Return queries or keys split into heads, with rotary positions and unit RMS as configured.

        Without a gain (head_dim,) the norm commutes with the rotation and is done with it; with one it comes before.
        """
        x, eps = self._heads(x), self.eps if self.qk_norm else -1.0
        if gain is not None:
            x, eps = unit_rms(x, eps) * gain, -1.0
        if context is not None and context.rotation is not None:
            return rotate_by_matrix(x, context.rotation, eps)
        if context is not None and context.rope is not None:
            return rotate(x, *context.rope, eps)
        return unit_rms(x, eps) if eps >= 0 else x

    def _project(self, x: Tensor, context: AttentionContext, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, heads, T, D) of x, and keys and values (B, KV, M + T, D) of `before` and x."""
        one_input = before is None and context.subset is None
        if not one_input or (context.cache is None and not can_join(x, (self.q, self.k, self.v))):
            q, whole = self.queries(x, context), x if before is None else torch.cat((before, x), 1)
            return q, *self.keys_values(whole, context)
        joined = joint_projection(x, (self.q, self.k, self.v)) if self.joined is None else self.joined(x)
        if self.q_gain is None and context.rotation is None:
            eps = self.eps if self.qk_norm else -1.0
            return heads(joined, context.rope, eps, self.heads, self.kv_heads, self.head_width)
        values = self.kv_heads * self.head_width
        qk, v = joined.split((joined.shape[-1] - values, values), -1)
        gains = None
        if self.q_gain is not None and self.k_gain is not None:
            each = ((self.q_gain, self.heads), (self.k_gain, self.kv_heads))
            gains = torch.cat([gain.expand(count, -1) for gain, count in each])
        both = self._position(qk, context, gains).transpose(1, 2)
        q, k = both.split((self.heads, self.kv_heads), 1)
        return q, k, self._heads(v).transpose(1, 2)

    def forward(self, x: Tensor, context: AttentionContext, before: Tensor | None = None) -> Tensor:
        """Return the attention output (B, T, hidden_size), or (B, W, hidden_size) with `context.subset`.

        Args:
            x: (B, T, hidden_size).
            context: Mask, positions and further keys and values.
            before: (B, M, hidden_size), the states before x that are attended to (`context.memory_states`, with the norm).
        """
        q, k, v, bias = self.inputs(x, context, before)
        out = attend(q, k, v, context.mask, self.scale, bias, self.dropout if self.training else 0.0)
        return self.o(out.transpose(1, 2).flatten(2))

    def inputs(
        self, x: Tensor, context: AttentionContext, before: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return queries (B, heads, T, D), keys and values (B, KV, S, D), and the bias of the scores; arguments of `forward`."""
        if context.encoder_kv is not None:
            q, (k, v) = self.queries(x, context), context.encoder_kv
        else:
            q, k, v = self._project(x, context, before)
            k, v = _after_prefix(context.prefix_kv, k, v)
            if context.cache is not None:
                k, v = context.cache.extend(k, v)
        if context.slots is not None:
            k, v = (context.slots.mix(each, side) for side, each in enumerate((k, v)))
        bias = context.bias
        if self.distance is not None and context.distances is not None:
            q, bias = self.distance(q, context.distances, self.scale)
        return q, k, v, bias


def _after_prefix(prefix: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values after those of a prefix: two of (B, KV, V + T, D)."""
    if prefix is None:
        return k, v
    first, second = (
        torch.cat((f.to(x.dtype).expand(len(x), -1, -1, -1), x), 2) for f, x in zip(prefix, (k, v), strict=True)
    )
    return first, second


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x)) * up(x)) for a gated activation."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.activation = GATED.get(config.activation, config.activation)
        bias = config.bias and config.bias_location == "all"
        self.up = Linear(config.hidden_size, config.intermediate_size, bias=bias)
        self.gate = Linear(config.hidden_size, config.intermediate_size, bias=bias) if config.gated else None
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=bias)
        self.joined: nn.Module | None = None
        """gate and up as one map, once quantized (`firth.generate.quantized`)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.inner(self.up(x)))
        if self.joined is not None:
            return self.down(self.inner(self.joined(x)))
        if can_join(x, (self.gate, self.up)):
            return self.down(self.inner(joint_projection(x, (self.gate, self.up))))
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))

    def inner(self, x: Tensor) -> Tensor:
        """Return act(up), or act(gate) * up of x = [gate, up]: (..., 1 or 2 intermediate_size) -> (..., intermediate_size)."""
        if runs_native(ACTIVATION, x):
            return native.activation(self.activation, x, gated=self.gate is not None)
        if self.gate is None:
            return ACTIVATIONS[self.activation](x)
        gate, up = x.chunk(2, -1)
        return ACTIVATIONS[self.activation](gate) * up


class Block(nn.Module):
    """One layer, or several that share its weights; `cross` adds cross-attention to an encoder."""

    def __init__(self, config: ModelConfig, layer: int, cross: bool):
        super().__init__()
        self.post = config.norm.placement == "post"
        self.attention_norm = (
            make_norm(config, to_maps=not self.post) if config.norm.first_attention or layer > 0 else nn.Identity()
        )
        self.attention = Attention(config)
        self.cross_norm = make_norm(config, to_maps=not self.post) if cross else None
        self.cross = Attention(config) if cross else None
        self.mlp_norm = make_norm(config, to_maps=not self.post)
        self.mlp = MLP(config)
        self.drop = Dropout(config.dropout) if config.dropout else nn.Identity()

    def encoder_kv(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cross-attention's keys and values of encoder states (B, S, hidden_size): two of (B, KV, S, D)."""
        assert self.cross is not None
        return self.cross.keys_values(states)

    def forward(self, x: Tensor, context: AttentionContext, cross: AttentionContext | None = None) -> Tensor:
        """Return the output states (B, T, hidden_size), or (B, W, hidden_size) with `context.subset`.

        Args:
            x: (B, T, hidden_size).
            context: Of self-attention.
            cross: Of cross-attention.
        """
        before = context.memory_states
        if self.post:
            x = self.attention_norm(context.queries(x) + self.drop(self.attention(x, context, before)))
            if self.cross is not None and self.cross_norm is not None and cross is not None:
                x = self.cross_norm(x + self.drop(self.cross(x, cross)))
            return self.mlp_norm(x + self.drop(self.mlp(x)))
        before = None if before is None else self.attention_norm(before)
        x = context.queries(x) + self.drop(self.attention(self.attention_norm(x), context, before))
        if self.cross is not None and self.cross_norm is not None and cross is not None:
            x = x + self.drop(self.cross(self.cross_norm(x), cross))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


def initialize(module: nn.Module, config: ModelConfig) -> None:
    """Initialize the linear maps of a module as configured; biases, and output maps with `init.zero_output`, with zeros."""
    for name, child in module.named_modules():
        if type(child) is Linear:
            last = name.rpartition(".")[2]
            residual = last in ("o", "down")
            std = config.init.std or child.in_features**-0.5
            if last == "q" and not config.attention.scale_scores:  # as in T5: the scale of the scores is in the weight
                std *= config.head_dim**-0.5
            nn.init.normal_(child.weight, std=0.0 if residual and config.init.zero_output else std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
