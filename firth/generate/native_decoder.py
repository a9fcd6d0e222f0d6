"""One decoding step as a single compiled call (`firth/model/decode.c`), for CPUs.

    decoder = NativeDecoder.of(model, cache)       # None where torch's operators are used
    logits = decoder(tokens)                       # logits of the model for the last token of each row

Prompts are prefilled with torch's operators. After that, the cost of a token is reading the weights and the KV cache once.
Weights may be fp32, bf16 or int8; activations and sums are fp32, so int8 weights multiply unrounded activations. The sums of a
row are added in the same order whatever other rows are in the batch.

Supported: grouped-query attention, rotary, learned, sinusoidal and T5 positions, LayerNorm and RMSNorm in pre-norm or post-norm
blocks, every activation, cross-attention. Not supported: unmerged adapters, recurrent layers, XLNet's and MPNet's positions.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from firth import kernel_choice
from firth.generate.quantized import Int8Linear, Int8LMHead
from firth.model import native
from firth.model.block import Attention, Block, LayerNorm, Linear, RMSNorm
from firth.model.config import decoder_config
from firth.model.forward_context import ForwardContext
from firth.model.heads import LMHead
from firth.model.kv_cache import DecodingCache
from firth.model.model import LM
from firth.model.native import ACTIVATIONS
from firth.model.positions import rope_angles
from firth.model.transformer import TransformerStack

POSITIONS = ("learned", "sinusoidal", "marian", "rotary", "t5", "none")
"""Supported values of `ModelConfig.position`."""

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""dtype of weights, keys and values -> its number in decode.c; int8 is 2."""

INT8 = 2

MAX_PRODUCT = 1 << 31
"""Most multiplications of a step: many rows of a large model are faster with the matrix instructions that torch uses."""

MAX_ROWS = 1024
"""Most rows of a step: each thread keeps a few sums of every row on its stack."""

POINTER, LONG, DOUBLE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


class _Map(ctypes.Structure):
    _fields_ = [("weight", POINTER), ("steps", POINTER), ("bias", POINTER), ("input", LONG), ("output", LONG), ("kind", LONG)]  # fmt: skip


class _Norm(ctypes.Structure):
    _fields_ = [("gain", POINTER), ("offset", POINTER), ("kind", LONG), ("eps", DOUBLE)]


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, _Map) for name in ("q", "k", "v", "o")),
        *((name, POINTER) for name in ("q_gain", "k_gain", "keys", "values")),
        ("capacity", LONG),
    ]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Norm) for name in ("attention_norm", "cross_norm", "mlp_norm")),
        *((name, _Attention) for name in ("attention", "cross")),
        *((name, _Map) for name in ("gate", "up", "down")),
    ]


class _Model(ctypes.Structure):
    _fields_ = [
        ("layers", POINTER),
        *((name, LONG) for name in ("depth", "width", "heads", "kv_heads", "head_dim", "hidden")),
        *((name, LONG) for name in ("post_norm", "activation", "cache_kind", "tiles")),
        *((name, DOUBLE) for name in ("scale", "qk_eps")),
        *((name, POINTER) for name in ("cosine", "sine")),
        ("norm", _Norm),
        ("head", _Map),
    ]


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, POINTER) for name in ("x", "logits", "lengths", "bias", "source_lengths")),
        *((name, LONG) for name in ("rows", "longest")),
    ]


class UnsupportedError(Exception):
    """The model, or the state of its cache, is not supported by the compiled step."""


class NativeDecoder:
    """The compiled step of one model with one cache; a new one is needed when the cache is reallocated.

    Args:
        model: The model; its weights are not copied, so in-place changes take effect.
        cache: Holds the prompts.

    Attributes:
        max_rows: Most rows of a step: more rows of a large model are faster with torch's operators.

    Raises:
        UnsupportedError: The model is not supported.
        NoCompilerError: There are no compiled kernels on this machine.
    """

    def __init__(self, model: LM, cache: DecodingCache):
        self.library = native.library()
        config = model.config
        head: Any = model.heads["lm"] if "lm" in model.heads else None  # noqa: SIM401
        _need(not (config.rnn.type or config.attention.linformer.k), "the blocks are not attention")
        _need(config.position.type in POSITIONS, f"position {config.position.type}")
        _need(type(head) in (LMHead, Int8LMHead), "another type of head")
        _need(bool(cache.keys), "the cache is empty")
        self.model, self.cache, self.head = model, cache, head
        self.stack: TransformerStack = model.stack  # type: ignore[assignment]
        self.referenced: list[Any] = []
        """Objects that the C structures point to."""
        dtypes = {x.dtype for pair in (cache.keys, cache.values) for x in pair}
        dtypes |= {x.dtype for pair in cache.encoder_kv for x in pair}
        _need(len(dtypes) == 1 and dtypes <= DTYPE_CODES.keys(), "keys and values of several dtypes")
        self.layers = (_Layer * self.stack.depth)()
        for i, block in enumerate(self.stack.layers()):
            self._fill_layer(self.layers[i], block, i)
        self.head_is_linear = self._is_linear(head)
        """Whether the LM head is a single linear layer, which the compiled step then includes."""
        tiles = FEW_ROWS.choice() == "tiles" and bool(self.library.has_tiles())
        cosine, sine = self._angles()
        first = self.stack.layers()[0]
        self.structure = _Model(
            ctypes.addressof(self.layers), self.stack.depth, config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim,
            config.intermediate_size, config.norm.placement == "post", ACTIVATIONS[first.mlp.activation], DTYPE_CODES[dtypes.pop()],
            tiles, first.attention.scale, config.norm.eps if config.attention.qk_norm else -1.0, cosine, sine,
            self._norm(self.stack.norm), self._map(head.matrix, head) if self.head_is_linear else _Map(),
        )  # fmt: skip
        weights = sum(p.numel() for p in model.stack.parameters()) + sum(b.numel() for b in model.stack.buffers())
        self.max_rows = MAX_ROWS if tiles else min(MAX_ROWS, MAX_PRODUCT // max(1, weights))

    @staticmethod
    def of(model: LM, cache: DecodingCache) -> NativeDecoder | None:
        """Return the compiled step, or None if it is not supported or torch's operators are faster on this machine."""
        if model.tokens.weight.device.type != "cpu" or model.config.rnn.type or DECODE.choice() != "native":
            return None
        try:
            return NativeDecoder(model, cache)
        except (UnsupportedError, native.NoCompilerError):
            return None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits (rows, vocab) float32 of the new tokens (rows, 1), and store their keys and values."""
        cache, model = self.cache, self.model
        lengths = cache.next_slots()
        fields = {"tokens": tokens, "positions": lengths[:, None]}
        x = self.stack.project_embeddings(model.embed(fields)).float().reshape(cache.rows, -1).contiguous()
        logits = x.new_empty(cache.rows, self.structure.head.output) if self.head_is_linear else None
        bias = None
        if self.stack.relative is not None:
            bias = self.stack.relative(fields["positions"], cache.key_positions())[:, :, 0].float().contiguous()
        source = cache.source_size() if self.layers[0].cross.o.weight else None
        step = _Step(
            x.data_ptr(), native.address(logits), lengths.data_ptr(), native.address(bias), native.address(source), cache.rows,
            cache.length + 1,
        )  # fmt: skip
        self.library.decode(ctypes.addressof(self.structure), ctypes.addressof(step), native.threads())
        cache.advance(1)
        if logits is not None:
            return self.head.to_logits(logits)
        weight = model.tokens.weight
        return self.head(x.to(weight.dtype) if weight.is_floating_point() else x).float()

    def _pointer(self, x: Tensor | None) -> int | None:
        """Return the address of a parameter, or of its float32 copy if it has another dtype."""
        if x is None:
            return None
        x = x.detach().float().contiguous()
        self.referenced.append(x)
        return x.data_ptr()

    def _map(self, module: Any, head: Any = None) -> _Map:
        """Return the C structure of a linear layer, or of the weight matrix of an LM head (with the head's bias)."""
        weight: Any
        steps, bias = None, None
        if type(module) is Int8Linear:
            weight, steps, bias, kind = module.weight, module.steps, module.bias, INT8
        elif type(module) is Linear or isinstance(module, Tensor):
            weight = module.weight if type(module) is Linear else module
            bias = module.bias if type(module) is Linear else head.bias
            _need(weight.dtype in DTYPE_CODES, f"weights of {weight.dtype}")
            kind = DTYPE_CODES[weight.dtype]
        else:
            raise UnsupportedError(f"a linear layer of {type(module).__name__}")
        _need(weight.is_contiguous(), "weights that are not contiguous")
        self.referenced.append(weight)
        return _Map(
            weight.data_ptr(), self._pointer(steps), self._pointer(bias), weight.shape[1], weight.shape[0], kind
        )

    def _norm(self, module: nn.Module | None) -> _Norm:
        if module is None or type(module) is nn.Identity:
            return _Norm()
        if type(module) not in (RMSNorm, LayerNorm):
            raise UnsupportedError(f"a norm of {type(module).__name__}")
        norm: Any = module
        return _Norm(self._pointer(norm.weight), self._pointer(norm.bias), 2 if norm.center else 1, norm.eps)

    def _fill_layer(self, to: Any, block: Block, layer: int) -> None:
        cache = self.cache
        to.attention_norm, to.mlp_norm = self._norm(block.attention_norm), self._norm(block.mlp_norm)
        self._fill_attention(to.attention, block.attention, cache.keys[layer], cache.values[layer])
        if block.cross is not None:
            to.cross_norm = self._norm(block.cross_norm)
            self._fill_attention(to.cross, block.cross, *cache.encoder_kv[layer])
            to.cross.k = to.cross.v = _Map()
        mlp = block.mlp
        to.gate = _Map() if mlp.gate is None else self._map(mlp.gate)
        to.up, to.down = self._map(mlp.up), self._map(mlp.down)

    def _fill_attention(self, to: Any, module: Attention, keys: Tensor, values: Tensor) -> None:
        _need(module.distance is None, "XLNet's relative distances")
        for name in ("q", "k", "v", "o"):
            setattr(to, name, self._map(getattr(module, name)))
        to.q_gain, to.k_gain = self._pointer(module.q_gain), self._pointer(module.k_gain)
        self.referenced += (keys, values)
        to.keys, to.values, to.capacity = keys.data_ptr(), values.data_ptr(), keys.shape[2]

    def _angles(self) -> tuple[int | None, int | None]:
        """Return the addresses of the cosines and sines of all positions of the cache."""
        if self.model.config.position.type != "rotary":
            return None, None
        positions = torch.arange(self.cache.capacity)[None]
        cos, sin = rope_angles(positions, self.model.config)
        return self._pointer(cos[0, :, 0]), self._pointer(sin[0, :, 0])

    def _is_linear(self, head: Any) -> bool:
        inner = head.head if type(head) is Int8LMHead else head
        return inner.dense is None and inner.scale == 1


def _need(condition: bool, reason: str) -> None:
    """Raise an UnsupportedError unless the condition holds."""
    if not condition:
        raise UnsupportedError(reason)


def few_rows(x: Tensor, weight: Tensor, steps: Tensor | None = None, tiles: bool = False) -> Tensor:
    """Return x @ weight.T for a few rows: (rows, out) float32.

    Args:
        x: (rows, in) float32, contiguous.
        weight: (out, in) float32, bfloat16 or int8, contiguous.
        steps: (out,) float32, the scales of int8 weights.
        tiles: Whether to use matrix instructions (AMX), which round activations to 16 bits.

    Raises:
        NoCompilerError: There are no compiled kernels, or none with matrix instructions.
    """
    library = native.library()
    if tiles and not library.has_tiles():
        raise native.NoCompilerError("this machine has no matrix instructions")
    y = x.new_empty(len(x), len(weight))
    linear = _Map(
        weight.data_ptr(), native.address(steps), None, x.shape[1], len(weight), DTYPE_CODES.get(weight.dtype, INT8)
    )
    library.few_rows(ctypes.addressof(linear), x.data_ptr(), y.data_ptr(), len(x), tiles, native.threads())
    return y


def _rows_workload(way: str) -> kernel_choice.Workload:
    """Sixteen rows times 8 matrices of 512 x 2048 in bf16."""
    x, weights = torch.ones(16, 512), torch.ones(8, 2048, 512, dtype=torch.bfloat16).unbind()

    def work() -> None:
        for weight in weights:
            few_rows(x, weight, tiles=way == "tiles")

    return work


FEW_ROWS = kernel_choice.Kernel("few-rows", {way: partial(_rows_workload, way) for way in ("vectors", "tiles")})
"""How the compiled step multiplies five or more rows by bf16 and int8 weights."""


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
