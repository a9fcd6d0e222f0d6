"""Tokens through a whole decoder in a single compiled call (`firth/model/decode.c`), for CPUs.

    decoder = NativeDecoder.of(model, cache)       # None where torch's operators are used
    logits = decoder(tokens)                       # of the last token of each row of a DecodingCache
    states = decoder.read(prompt_cache, tokens, rows, positions, starts)       # of prompts, where `reads_prompts`

The cost of a step is reading the weights and the KV cache once. Weights may be fp32, bf16 or int8; activations and sums are
fp32, except that int8 weights multiply activations of 15 bits (`firth.generate.quantized`). The sums of a token are added in
the same order whatever other tokens are in the batch. Prompts of models with fp32 and bf16 weights are prefilled with torch's
operators, whose matrix products are faster for many tokens.

Supported: grouped-query attention, rotary, learned, sinusoidal and T5 positions, LayerNorm and RMSNorm in pre-norm or post-norm
blocks, every activation, cross-attention. Not supported: unmerged adapters, recurrent layers, XLNet's and MPNet's positions.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from firth import kernel_choice
from firth.generate.native_kernels import DTYPE_CODES, FEW_ROWS, INT8, LONG, POINTER, LinearMap
from firth.generate.quantized import Int8Linear, Int8LMHead
from firth.model import native
from firth.model.block import Attention, Block, LayerNorm, Linear, RMSNorm
from firth.model.config import decoder_config
from firth.model.forward_context import ForwardContext
from firth.model.heads import LMHead
from firth.model.kv_cache import DecodingCache, KVCache
from firth.model.model import LM
from firth.model.native import ACTIVATIONS
from firth.model.positions import rope_angles
from firth.model.transformer import TransformerStack
from firth.types import Batch

POSITIONS = ("learned", "sinusoidal", "marian", "rotary", "t5", "none")
"""Supported values of `ModelConfig.position`."""

MAX_PRODUCT = 1 << 31
"""Most multiplications of a step: many rows of a large model are faster with the matrix instructions that torch uses."""

READ_TOKENS = 256
"""Tokens of prompts in one call: more of them would leave the cores' caches."""

MAX_ROWS = 1024
"""Most rows of a step: each thread keeps a few sums of every row on its stack."""

DOUBLE = ctypes.c_double


class _Norm(ctypes.Structure):
    _fields_ = [("gain", POINTER), ("offset", POINTER), ("kind", LONG), ("eps", DOUBLE)]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, LinearMap) for name in ("q", "k", "v", "o")),
        *((name, POINTER) for name in ("q_gain", "k_gain")),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("attention_norm", "cross_norm", "mlp_norm")),
        *((name, _Attention) for name in ("attention", "cross")),
        *((name, LinearMap) for name in ("gate", "up", "down")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", POINTER),
        *((name, LONG) for name in ("depth", "width", "heads", "kv_heads", "head_dim", "hidden")),
        *((name, LONG) for name in ("post_norm", "activation", "tiles")),
        *((name, DOUBLE) for name in ("scale", "qk_eps")),
        *((name, POINTER) for name in ("cosine", "sine")),
        ("norm", _Norm),
        ("head", LinearMap),
    ]


class _Cache(ctypes.Structure):
    _fields_ = [("keys", POINTER), ("values", POINTER), ("capacity", LONG), ("kind", LONG)]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("x", "logits", "lengths", "slots", "bias", "source_lengths")),
        *((name, LONG) for name in ("rows", "longest")),
        *((name, _Cache) for name in ("cache", "source")),
    ]


class UnsupportedError(Exception):
    """The model, or the state of its cache, is not supported by the compiled step."""


class NativeDecoder:
    """The compiled step of one model.

    Args:
        model: The model; its weights are not copied, so in-place changes take effect.
        cache: Holds prompts; its tensors may be replaced later (`bind`).

    Attributes:
        max_rows: Most rows of a step: more rows of a large model are faster with torch's operators.
        reads_prompts: Whether `read` is faster than torch's operators: the weights are int8.

    Raises:
        UnsupportedError: The model is not supported.
        NoCompilerError: There are no compiled kernels on this machine.
    """

    def __init__(self, model: LM, cache: DecodingCache | None = None):
        self.library = native.library()
        config = model.config
        head: Any = model.heads["lm"] if "lm" in model.heads else None  # noqa: SIM401
        _need(not (config.rnn.type or config.attention.linformer.k), "the blocks are not attention")
        _need(config.position.type in POSITIONS, f"position {config.position.type}")
        _need(type(head) in (LMHead, Int8LMHead), "another type of head")
        self.model, self.head = model, head
        self.stack: TransformerStack = model.stack  # type: ignore[assignment]
        self.referenced: list[Any] = []
        """Objects that the C structures point to."""
        self.layers = (_Layer * self.stack.depth)()
        for i, block in enumerate(self.stack.layers()):
            self._fill_layer(self.layers[i], block)
        inner = head.head if type(head) is Int8LMHead else head
        self.head_is_linear = inner.dense is None and inner.scale == 1
        """Whether the LM head is a single linear layer, which the compiled step then includes."""
        tiles = FEW_ROWS.choice() == "tiles" and bool(self.library.has_tiles())
        first = self.stack.layers()[0]
        self.structure = _Model(
            ctypes.addressof(self.layers), self.stack.depth, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
            config.intermediate_size, config.norm.placement == "post", ACTIVATIONS[first.mlp.activation],
            tiles, first.attention.scale, config.norm.eps if config.attention.qk_norm else -1.0, None, None,
            self._norm(self.stack.norm), self._map(head.matrix, head) if self.head_is_linear else LinearMap(),
        )  # fmt: skip
        weights = sum(p.numel() for p in model.stack.parameters()) + sum(b.numel() for b in model.stack.buffers())
        up: Any = first.mlp.up
        int8 = type(up) is Int8Linear
        self.max_rows = MAX_ROWS if tiles or int8 else min(MAX_ROWS, MAX_PRODUCT // max(1, weights))
        causal = not (config.encoder.num_layers or config.attention.prefix_lm or model.num_virtual_tokens())
        self.reads_prompts = int8 and causal and self.stack.relative is None
        self._angles: tuple[Tensor, Tensor] | None = None
        _need(cache is None or self.bind(cache), "keys and values of several dtypes")

    @staticmethod
    def of(model: LM, cache: DecodingCache | None = None) -> NativeDecoder | None:
        """Return the compiled step, or None if it is not supported or torch's operators are faster on this machine."""
        if model.tokens.weight.device.type != "cpu" or model.config.rnn.type or DECODE.choice() != "native":
            return None
        try:
            return NativeDecoder(model, cache)
        except (UnsupportedError, native.NoCompilerError):
            return None

    def bind(self, cache: DecodingCache) -> bool:
        """Use the current tensors of a cache for the next steps; return whether their dtypes are supported."""
        tensors = (*cache.keys, *cache.values, *(x for pair in cache.encoder_kv for x in pair))
        if len({x.dtype for x in tensors} | DTYPE_CODES.keys()) > len(DTYPE_CODES):
            return False
        self.cache = cache
        self.own = self._cache(cache.keys, cache.values)
        self.source = self._cache([k for k, _ in cache.encoder_kv], [v for _, v in cache.encoder_kv])
        self._extend_angles(cache.capacity)
        return True

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits (rows, vocab) float32 of the new tokens (rows, 1), and store their keys and values."""
        cache, model = self.cache, self.model
        lengths = cache.next_slots()
        fields = {"tokens": tokens, "positions": lengths[:, None]}
        bias = None
        if self.stack.relative is not None:
            bias = self.stack.relative(fields["positions"], cache.key_positions())[:, :, 0].float().contiguous()
        source = cache.source_size() if self.layers[0].cross.o.weight else None
        logits = torch.empty(cache.rows, self.structure.head.output) if self.head_is_linear else None
        x = self._run(fields, self.own, self.source, logits, lengths, cache.length + 1, None, bias, source)
        cache.advance(1)
        if logits is not None:
            return self.head.to_logits(logits)
        weight = model.tokens.weight
        return self.head(x.to(weight.dtype) if weight.is_floating_point() else x).float()

    def read(
        self, cache: KVCache, tokens: Tensor, rows: Sequence[int], positions: Tensor, starts: Sequence[int], count: int
    ) -> Tensor:
        """Run tokens of prompts, store their keys and values, and return their final states (n, hidden_size) float32.

        Args:
            cache: Holds the tokens before these, if there are any; all tensors are allocated at first.
            tokens: (n,); those of a row are consecutive tokens.
            rows: The row of each token in the cache.
            positions: (n,), the position of each token in its row.
            starts: The slot in which the row of each token begins.
            count: Slots that the cache has in use afterwards, beyond those it has now.
        """
        config = self.model.config
        if not cache.keys:
            shape = (cache.rows, config.num_kv_heads, cache.capacity, config.head_dim)
            cache.keys = [torch.empty(shape) for _ in self.layers]
            cache.values = [torch.empty(shape) for _ in self.layers]
        self._extend_angles(cache.capacity)
        slots = torch.tensor([rows, starts]).t().contiguous()
        own, states = self._cache(cache.keys, cache.values), []
        for part in (slice(at, at + READ_TOKENS) for at in range(0, len(tokens), READ_TOKENS)):
            fields = {"tokens": tokens[part, None], "positions": positions[part, None]}
            states.append(
                self._run(fields, own, _Cache(), None, positions[part], cache.capacity, slots[part], None, None)
            )
        cache.advance(count)
        return torch.cat(states)

    def _run(
        self, fields: Batch, cache: _Cache, source: _Cache, logits: Tensor | None, lengths: Tensor, longest: int,
        slots: Tensor | None, bias: Tensor | None, source_lengths: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Call the compiled step and return the final states (n, hidden_size)."""
        count = len(fields["tokens"])
        x = self.stack.project_embeddings(self.model.embed(fields)).float().reshape(count, -1).contiguous()
        step = _Step(
            x.data_ptr(), native.address(logits), lengths.data_ptr(), native.address(slots), native.address(bias),
            native.address(source_lengths), count, longest, cache, source,
        )  # fmt: skip
        self.library.decode(ctypes.addressof(self.structure), ctypes.addressof(step), native.threads())
        return x

    def _cache(self, keys: Sequence[Tensor], values: Sequence[Tensor]) -> _Cache:
        """Return the C structure of keys and values of all layers, which keeps them alive."""
        if not keys:
            return _Cache()
        pointers = [(POINTER * len(side))(*(x.data_ptr() for x in side)) for side in (keys, values)]
        cache = _Cache(*map(ctypes.addressof, pointers), keys[0].shape[2], DTYPE_CODES[keys[0].dtype])
        cache.referenced = (pointers, keys, values)
        return cache

    def _extend_angles(self, positions: int) -> None:
        """Have cosines and sines of at least so many positions."""
        if self.model.config.position.type != "rotary" or (self._angles and len(self._angles[0]) >= positions):
            return
        cos, sin = rope_angles(torch.arange(positions)[None], self.model.config)
        self._angles = cos[0, :, 0].float().contiguous(), sin[0, :, 0].float().contiguous()
        self.structure.cosine, self.structure.sine = (x.data_ptr() for x in self._angles)

    def _pointer(self, x: Tensor | None) -> int | None:
        """Return the address of a parameter, or of its float32 copy if it has another dtype."""
        if x is None:
            return None
        x = x.detach().float().contiguous()
        self.referenced.append(x)
        return x.data_ptr()

    def _map(self, module: Any, head: Any = None) -> LinearMap:
        """Return the C structure of a linear layer, or of the weight matrix of an LM head (with the head's bias)."""
        weight: Any
        steps, bias = None, None
        if type(module) is Int8Linear:
            weight, steps, bias, kind = module.weight, module.steps, module.bias, INT8
            size = module.out_features, module.in_features
            self.referenced.append(steps)
        elif type(module) is Linear or isinstance(module, Tensor):
            weight = module.weight if type(module) is Linear else module
            bias = module.bias if type(module) is Linear else head.bias
            _need(weight.dtype in DTYPE_CODES, f"weights of {weight.dtype}")
            kind, size = DTYPE_CODES[weight.dtype], tuple(weight.shape)
        else:
            raise UnsupportedError(f"a linear layer of {type(module).__name__}")
        _need(weight.is_contiguous(), "weights that are not contiguous")
        self.referenced.append(weight)
        return LinearMap(weight.data_ptr(), native.address(steps), self._pointer(bias), size[1], size[0], kind)

    def _norm(self, module: nn.Module | None) -> _Norm:
        if module is None or type(module) is nn.Identity:
            return _Norm()
        if type(module) not in (RMSNorm, LayerNorm):
            raise UnsupportedError(f"a norm of {type(module).__name__}")
        norm: Any = module
        return _Norm(self._pointer(norm.weight), self._pointer(norm.bias), 2 if norm.center else 1, norm.eps)

    def _fill_layer(self, to: Any, block: Block) -> None:
        to.attention_norm, to.mlp_norm = self._norm(block.attention_norm), self._norm(block.mlp_norm)
        self._fill_attention(to.attention, block.attention)
        if block.cross is not None:
            to.cross_norm = self._norm(block.cross_norm)
            self._fill_attention(to.cross, block.cross)
            to.cross.k = to.cross.v = LinearMap()
        mlp = block.mlp
        to.gate = LinearMap() if mlp.gate is None else self._map(mlp.gate)
        to.up, to.down = self._map(mlp.up), self._map(mlp.down)

    def _fill_attention(self, to: Any, module: Attention) -> None:
        _need(module.distance is None, "XLNet's relative distances")
        for name in ("q", "k", "v", "o"):
            setattr(to, name, self._map(getattr(module, name)))
        to.q_gain, to.k_gain = self._pointer(module.q_gain), self._pointer(module.k_gain)


def _need(condition: bool, reason: str) -> None:
    """Raise an UnsupportedError unless the condition holds."""
    if not condition:
        raise UnsupportedError(reason)


def _workload(way: str) -> kernel_choice.Workload:
    """One decoding step of 4 rows with a decoder of 4 layers and hidden size 256."""
    config = decoder_config(vocab_size=1024, hidden_size=256, num_layers=4, num_heads=4)
    with torch.random.fork_rng(devices=[]):
        model = LM(config, {"lm": LMHead(config)}).eval()
    tokens, positions = torch.ones(4, 1, dtype=torch.int64), torch.full((4, 1), 16)
    with torch.no_grad():
        prompts, cache = model.make_cache(4, 16), DecodingCache(4)
        model({"tokens": tokens.expand(-1, 16)}, ForwardContext(prompts))
        cache.add(prompts, range(4), [16] * 4, capacity=32)
    step = NativeDecoder(model, cache) if way == "native" else None

    @torch.no_grad()
    def work() -> None:
        if step is None:
            model.heads["lm"](model({"tokens": tokens, "positions": positions}, ForwardContext(cache))[:, -1])
        else:
            step(tokens)
        cache.rewind([16] * 4)

    return work


DECODE = kernel_choice.Kernel("decode", {way: partial(_workload, way) for way in ("torch", "native")})
"""How a decoding step is computed on a CPU."""
