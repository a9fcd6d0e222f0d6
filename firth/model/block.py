"""One block: attention, cross-attention where there is an encoder, and an MLP, each added to the residual stream.

Pre-norm (GPT-2, Llama, T5): x + f(norm(x)). Post-norm (BERT): norm(x + f(x)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.model import native_ops
from firth.model.attention import AttentionMask, KVCache, attend
from firth.model.config import ModelConfig
from firth.model.fused import ACTIVATION, Dropout, heads, project, relu2, rotated, runs_native, turn, unit_rms
from firth.model.linformer import LinformerSlots
from firth.model.norm import make_norm
from firth.model.parameter_count import GATED
from firth.model.relative_distance import DistanceIndex, RelativeDistance


def gelu_tanh(x: Tensor) -> Tensor:
    """The tanh form of GELU: GPT-2's and T5's `gelu_new`."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": F.relu,
    "relu2": relu2,
    "silu": F.silu,
}


class Linear(nn.Linear):
    """nn.Linear, quick for a few rows too: (..., in) -> (..., out)."""

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias)


def joint_projection(x: Tensor, maps: Sequence[nn.Module]) -> Tensor:
    """Return what maps of one input put out, side by side: (..., in) -> (..., sum of out).

    In training one product does it. The backward pass then reads x once, and has no three gradients of x to add up. A decoder
    that writes a token at a time keeps its products: to join the weights takes 10 ms of 29 M parameters, and saves 0.3.
    """
    plain = [m for m in maps if type(m) is Linear]
    if not torch.is_grad_enabled() or len(plain) < len(maps):
        return torch.cat([m(x) for m in maps], -1)
    bias = None if plain[0].bias is None else torch.cat([m.bias for m in plain])
    return F.linear(x, torch.cat([m.weight for m in plain]), bias)


def can_join(x: Tensor, maps: Sequence[nn.Module]) -> bool:
    """Whether maps of one input are quicker as one: they are plain, and x has more numbers than their weights."""
    plain = [m for m in maps if type(m) is Linear]
    return len(plain) == len(maps) and x.numel() >= sum(m.weight.numel() for m in plain)


@dataclass(frozen=True)
class PositionSubset:
    """The tokens of each row that ask, where the others are only read: index (B, W), each once; their rotary turns."""

    index: Tensor
    rope: tuple[Tensor, Tensor] | None

    def gather(self, x: Tensor) -> Tensor:
        """x (B, T, width) -> (B, W, width)."""
        return x.gather(1, self.index[..., None].expand(-1, -1, x.shape[-1]))

    def scatter(self, x: Tensor, length: int) -> Tensor:
        """Back to their places, with zeros elsewhere: (B, W, width) -> (B, length, width)."""
        index = self.index[..., None].expand(-1, -1, x.shape[-1])
        return x.new_zeros(len(x), length, x.shape[-1]).scatter(1, index, x)


@dataclass(frozen=True)
class AttentionContext:
    """What all blocks of a trunk share in one pass: who sees whom, the rotary turns (as matrices where a row grows by
    a token), T5's bias, how far apart XLNet's tokens stand, the slots that a Linformer mixes keys and values into;
    and what each has of its own: the keys and values (KV, V, D) of a trained prefix that stand before those of the row.
    narrow: who asks, where not all do; `sees` is of these then."""

    mask: AttentionMask
    rope: tuple[Tensor, Tensor] | None = None
    rotation: Tensor | None = None
    bias: Tensor | None = None
    cache: KVCache | None = None
    distances: DistanceIndex | None = None
    slots: LinformerSlots | None = None
    prefix_kv: tuple[Tensor, Tensor] | None = None
    subset: PositionSubset | None = None

    def queries(self, x: Tensor) -> Tensor:
        """What of x (B, T, width) asks."""
        return x if self.subset is None else self.subset.gather(x)


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values. x (B, T, width), memory (B, S, width) -> (B, T, width)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_width, self.qk_norm, self.eps = config.head_dim, config.qk_norm, config.norm_eps
        self.scale = config.head_dim**-0.5 if config.scale_attention else 1.0
        self.dropout = config.dropout
        self.heads, self.kv_heads = config.num_heads, config.num_kv_heads
        self.distance = RelativeDistance(config, Linear) if config.position == "xlnet" else None
        bias = config.bias and self.distance is None  # XLNet's offsets stand in their place
        self.q_gain = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm_weight else None
        self.k_gain = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm_weight else None
        self.q = Linear(config.hidden_size, config.num_heads * config.head_dim, bias=bias)
        self.k = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=bias)
        self.v = Linear(config.hidden_size, config.num_kv_heads * config.head_dim, bias=bias)
        self.o = Linear(
            config.num_heads * config.head_dim, config.hidden_size, bias=bias and config.bias_location != "qkv"
        )
        self.joined: nn.Module | None = None
        """q, k and v as one map, where they have been lowered."""

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:-1], -1, self.head_width)  # unflatten says the same and takes three times as long

    def memorize(self, memory: Tensor, context: AttentionContext | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values of what is attended to: two of (B, KV, S, D)."""
        turned = None if context is None else context.rope
        if self.k_gain is None and (context is None or context.rotation is None) and can_join(memory, (self.k, self.v)):
            joined, eps = joint_projection(memory, (self.k, self.v)), self.eps if self.qk_norm else -1.0
            return heads(joined, turned, eps, 0, self.kv_heads, self.head_width)[1:]
        k = self._place(self.k(memory), context, self.k_gain)
        return k.transpose(1, 2), self._heads(self.v(memory)).transpose(1, 2)

    def _place(self, x: Tensor, context: AttentionContext | None, gain: Tensor | None) -> Tensor:
        """Queries or keys, split into heads, turned to their positions and made unit RMS, as the shape says.

        Without a gain (head_width,) the norm commutes with turning, and is done with it; with one it comes before.
        """
        x, eps = self._heads(x), self.eps if self.qk_norm else -1.0
        if gain is not None:
            x, eps = unit_rms(x, eps) * gain, -1.0
        if context is not None and context.rotation is not None:
            return rotated(x, context.rotation, eps)
        if context is not None and context.rope is not None:
            return turn(x, *context.rope, eps)
        return unit_rms(x, eps) if eps >= 0 else x

    def _read(self, x: Tensor, context: AttentionContext) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of x, placed: (B, heads, T, D), and two of (B, KV, T, D)."""
        joined = joint_projection(x, (self.q, self.k, self.v)) if self.joined is None else self.joined(x)
        if self.q_gain is None and context.rotation is None:
            eps = self.eps if self.qk_norm else -1.0
            return heads(joined, context.rope, eps, self.heads, self.kv_heads, self.head_width)
        values = self.kv_heads * self.head_width
        placed, v = joined.split((joined.shape[-1] - values, values), -1)
        gains = None
        if self.q_gain is not None and self.k_gain is not None:
            each = ((self.q_gain, self.heads), (self.k_gain, self.kv_heads))
            gains = torch.cat([gain.expand(count, -1) for gain, count in each])
        both = self._place(placed, context, gains).transpose(1, 2)
        q, k = both.split((self.heads, self.kv_heads), 1)
        return q, k, self._heads(v).transpose(1, 2)

    def forward(
        self,
        x: Tensor,
        context: AttentionContext,
        memory: tuple[Tensor, Tensor] | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """memory: keys and values made elsewhere. before (B, M, width): states that stand in front of x and are read."""
        if memory is None and context.cache is not None and context.subset is None:
            q, k, v = self._read(x, context)
            k, v = context.cache.extend(*_behind(context.prefix_kv, k, v))
        elif memory is None and before is None and context.subset is None and can_join(x, (self.q, self.k, self.v)):
            q, k, v = self._read(x, context)
            k, v = _behind(context.prefix_kv, k, v)
        else:
            mine = context if context.subset is None else replace(context, rope=context.subset.rope)
            q = self._place(self.q(context.queries(x)), mine, self.q_gain).transpose(1, 2)
            whole = x if before is None else torch.cat((before, x), 1)
            k, v = _behind(context.prefix_kv, *self.memorize(whole, context)) if memory is None else memory
            if memory is None and context.cache is not None:
                k, v = context.cache.extend(k, v)
        if context.slots is not None:
            k, v = (context.slots.mix(each, side) for side, each in enumerate((k, v)))
        bias = context.bias
        if self.distance is not None and context.distances is not None:
            q, bias = self.distance(q, context.distances, self.scale)
        dropout = self.dropout if self.training else 0.0
        out = attend(q, k, v, context.mask, self.scale, bias, dropout)
        return self.o(out.transpose(1, 2).flatten(2))


def _behind(front: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values behind those of a prefix: two of (B, KV, V + T, D)."""
    if front is None:
        return k, v
    first, second = (
        torch.cat((f.to(x.dtype).expand(len(x), -1, -1, -1), x), 2) for f, x in zip(front, (k, v), strict=True)
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
        """gate and up as one map, where they have been lowered."""

    def forward(self, x: Tensor) -> Tensor:
        if self.gate is None:
            return self.down(self.inner(self.up(x)))
        if self.joined is not None:
            return self.down(self.inner(self.joined(x)))
        if can_join(x, (self.gate, self.up)):
            return self.down(self.inner(joint_projection(x, (self.gate, self.up))))
        return self.down(ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))

    def inner(self, x: Tensor) -> Tensor:
        """What `down` reads, made of what `up` says, or gate and up side by side: (..., hidden or 2 hidden) -> (..., hidden)."""
        if runs_native(ACTIVATION, x):
            return native_ops.activation(self.activation, x, gated=self.gate is not None)
        if self.gate is None:
            return ACTIVATIONS[self.activation](x)
        gate, up = x.chunk(2, -1)
        return ACTIVATIONS[self.activation](gate) * up


class Block(nn.Module):
    """One layer of a trunk, or several that share its weights; `cross` adds attention to an encoder's memory."""

    def __init__(self, config: ModelConfig, layer: int, cross: bool):
        super().__init__()
        self.post = config.norm_placement == "post"
        self.attention_norm = (
            make_norm(config, to_maps=not self.post) if config.first_attention_norm or layer > 0 else nn.Identity()
        )
        self.attention = Attention(config)
        self.cross_norm = make_norm(config, to_maps=not self.post) if cross else None
        self.cross = Attention(config) if cross else None
        self.mlp_norm = make_norm(config, to_maps=not self.post)
        self.mlp = MLP(config)
        self.drop = Dropout(config.dropout) if config.dropout else nn.Identity()

    def crossing(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-attention's keys and values of an encoder's memory (B, S, width)."""
        assert self.cross is not None
        return self.cross.memorize(memory)

    def forward(
        self,
        x: Tensor,
        context: AttentionContext,
        across: AttentionContext | None = None,
        memory: tuple[Tensor, Tensor] | None = None,
        before: Tensor | None = None,
    ) -> Tensor:
        """before: the states of earlier tokens at the entrance of this block, which go through its norm as x does.

        Returns the states of the tokens that ask, which are all of them but where `reading.narrow` says.
        """
        if self.post:
            x = self.attention_norm(context.queries(x) + self.drop(self.attention(x, context, None, before)))
            if self.cross is not None and self.cross_norm is not None and across is not None:
                x = self.cross_norm(x + self.drop(self.cross(x, across, memory)))
            return self.mlp_norm(x + self.drop(self.mlp(x)))
        past = None if before is None else self.attention_norm(before)
        x = context.queries(x) + self.drop(self.attention(self.attention_norm(x), context, None, past))
        if self.cross is not None and self.cross_norm is not None and across is not None:
            x = x + self.drop(self.cross(self.cross_norm(x), across, memory))
        return x + self.drop(self.mlp(self.mlp_norm(x)))


def initialize(module: nn.Module, config: ModelConfig) -> None:
    """Fill a module's matrices as the shape says; offsets and the projections of zero_init with zeros."""
    for name, child in module.named_modules():
        if type(child) is Linear:
            last = name.rpartition(".")[2]
            residual = last in ("o", "down")
            std = config.init_std or child.in_features**-0.5
            if last == "q" and not config.scale_attention:  # the scale of the scores is in the weight, as in T5
                std *= config.head_dim**-0.5
            nn.init.normal_(child.weight, std=0.0 if residual and config.zero_init else std)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
