"""Attention weights of a text, by layer and head, for a page that shows them.

    [one] = attention_maps(model, Text(tokens, pieces))     a decoder or an encoder
    one.weights.shape                                       (layers, heads, T, S)

An encoder-decoder has three: of the encoder, of the decoder, and of the decoder over the encoder ("cross"). The weights are those of
the pass itself: they are computed from the queries and keys of each layer, with the mask and the bias of that layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from firth.generate.decoding_batch import inference_mode, rectangle
from firth.model.attention import attention_weights
from firth.model.block import Attention
from firth.model.model import LM
from firth.model.transformer import TransformerStack
from firth.types import UserError

Kind = Literal["self", "encoder", "decoder", "cross"]

MAX_WEIGHTS = 1 << 22
"""Most weights of a text: 16 MB in float32."""


@dataclass(frozen=True, eq=False)
class Text:
    """A text as a model reads it.

    Args:
        tokens: Token ids, (n,).
        pieces: What is shown of each token.
    """

    tokens: np.ndarray
    pieces: Sequence[str]


@dataclass(frozen=True, eq=False)
class AttentionMap:
    """The weights of one kind of attention.

    Args:
        kind: "self", or of an encoder-decoder "encoder", "decoder" or "cross".
        queries: What is shown of each token that attends.
        keys: What is shown of each key. A trained prefix, a Linformer's slots and a latent have names of their own.
        weights: (layers, heads, queries, keys) float32; those of a query add up to 1.
    """

    kind: Kind
    queries: Sequence[str]
    keys: Sequence[str]
    weights: np.ndarray


def attention_maps(model: LM, text: Text, source: Text | None = None) -> list[AttentionMap]:
    """Return the attention weights of a text.

    Args:
        model: A transformer.
        text: The text; of an encoder-decoder what the decoder reads, beginning with its start token.
        source: What the encoder of an encoder-decoder reads.

    Raises:
        UserError: The model has no attention, or the text is too long.
    """
    config = model.config
    if not isinstance(model.stack, TransformerStack) or not model.stack.blocks:
        raise UserError("this model has no attention: it is recurrent, or a table of word vectors")
    longest = max(len(one.tokens) for one in (text, source) if one is not None)
    if longest > model.context:
        raise UserError(f"the text has {longest:,} tokens and this model reads at most {model.context:,}: shorten it")
    depth = config.num_layers + config.encoder.num_layers * 2
    if depth * config.num_heads * longest**2 > MAX_WEIGHTS:
        shorter = int((MAX_WEIGHTS / (depth * config.num_heads)) ** 0.5)
        raise UserError(f"the text has {longest:,} tokens, and at most {shorter:,} are shown of this model: shorten it")
    device = model.tokens.weight.device
    batch = rectangle([text.tokens], device, config.causal)
    if source is not None:
        read = rectangle([source.tokens], device, causal=False)
        batch |= {f"source_{name}": field for name, field in read.items()}
    with inference_mode(model), _recorded(model) as found:
        model(batch)
    own: Kind = "self" if source is None else "decoder"
    kinds: dict[Kind, tuple[Any, Any]] = {own: (text, text), "encoder": (source, source), "cross": (text, source)}
    return [_labeled(model, kind, *kinds[kind], found[kind]) for kind in kinds if kind in found]


@contextmanager
def _recorded(model: LM) -> Iterator[dict[str, list[Tensor]]]:
    """Yield a mapping that receives the weights (heads, T, S) of each layer by kind of attention, in the order of the layers."""
    found: dict[str, list[Tensor]] = {}
    hooks: list[Any] = []

    def record(kind: str, module: Attention, arguments: tuple[Any, ...]) -> None:
        x, context, *rest = arguments
        q, k, _, bias = module.inputs(x, context, *rest)
        found.setdefault(kind, []).append(attention_weights(q, k, context.mask, module.scale, bias)[0].cpu())

    def watch(kind: str, modules: Sequence[Attention]) -> None:
        for module in dict.fromkeys(modules):  # a shared layer is called several times
            hook: Callable[..., None] = partial(record, kind)
            hooks.append(module.register_forward_pre_hook(hook))

    assert isinstance(model.stack, TransformerStack)
    if model.encoder is not None:
        watch("encoder", [block.attention for block in model.encoder.layers()])
        watch("cross", [block.cross for block in model.stack.layers() if block.cross is not None])
    watch("self" if model.encoder is None else "decoder", [block.attention for block in model.stack.layers()])
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def _labeled(model: LM, kind: Kind, queries: Text, keys: Text, layers: Sequence[Tensor]) -> AttentionMap:
    """Return the weights of the layers with names of queries and keys; the rows of a trained prompt are left out."""
    weights = torch.stack(list(layers)).numpy()[:, :, -len(queries.tokens) :]
    count, names = weights.shape[-1], list(keys.pieces)
    if kind == "cross" and model.latent is not None:
        names = [f"latent {i + 1}" for i in range(count)]
    elif model.config.attention.linformer.k and kind != "cross":
        names = [f"slot {i + 1}" for i in range(count)]
    else:
        names = [f"prefix {i + 1}" for i in range(count - len(names))] + names
    return AttentionMap(kind, list(queries.pieces), names, weights)
