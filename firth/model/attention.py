"""The one attention, and the one rule of who sees whom.

    position i may attend to token j   iff   document[i] == document[j] and appears[j] <= looks[i]

Full attention: zeros. Causal: 0..n-1. Prefix: the prefix at 0, then counting. Permutation: the drawn order.
Padding: appears NEVER. `Visibility` lowers the rule once per batch to the cheapest form that expresses it; a
position that sees nothing reads zeros.

>>> import torch
>>> when = torch.arange(3)[None]
>>> Visibility.lower(when, when).causal
True
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from firth.model import blocked
from firth.types import NEVER


@dataclass(frozen=True)
class Visibility:
    """Who sees whom, lowered. `causal`: position i sees slots 0..i. `mask`: (B, 1, 1 or T, S) bool; None: everything."""

    causal: bool = False
    mask: Tensor | None = None

    @staticmethod
    def lower(
        looks: Tensor, appears: Tensor, document: Tensor | None = None, key_document: Tensor | None = None
    ) -> Visibility:
        """looks (B, T) of the queries, appears (B, S) of the keys; documents (B, T) and (B, S), None for one each."""
        same = document is None or key_document is None or bool((document[:, :1] == key_document).all() and (document == document[:, :1]).all())
        if same and bool((appears.amax(-1) <= looks.amin(-1)).all()):
            return Visibility()
        if same and looks.shape == appears.shape:
            after = appears.flip(-1).cummin(-1).values.flip(-1)[:, 1:]
            if bool((appears.cummax(-1).values <= looks).all() and (after > looks[:, :-1]).all()):
                return Visibility(causal=True)
        return Visibility(mask=rule(looks, appears, document, key_document)[:, None])


def rule(looks: Tensor, appears: Tensor, document: Tensor | None, key_document: Tensor | None) -> Tensor:
    """The rule written out: (B, T, S) bool."""
    seen = appears[:, None, :] <= looks[:, :, None]
    if document is not None and key_document is not None:
        seen &= document[:, :, None] == key_document[:, None, :]
    return seen


def attend(
    q: Tensor, k: Tensor, v: Tensor, sees: Visibility, scale: float, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """softmax(scale q k' + bias) v where it is seen: q (B, H, T, D), k and v (B, KV, S, D) -> (B, H, T, D)."""
    if sees.causal and bias is None and not dropout and blocked.serves(q, k):
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        return blocked.causal(q, k, v, scale)
    mask = sees.mask
    if bias is not None:
        if sees.causal:
            mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
        mask = bias.to(q.dtype) if mask is None else bias.to(q.dtype).masked_fill(~mask, float("-inf"))
    causal = sees.causal and bias is None
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )


class Cache:
    """Keys and values of the tokens read so far, in preallocated slots, and what is needed to see them.

    rows: batch size. capacity: most slots a row may fill. Slots of padding keep their place and are seen by nobody.
    """

    def __init__(self, rows: int, capacity: int):
        self.rows, self.capacity, self.length = rows, capacity, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.cross: list[tuple[Tensor, Tensor]] = []
        self.memory: Tensor | None = None
        self.fields: dict[str, Tensor] = {}
        self.source: dict[str, Tensor] = {}

    def note(self, name: str, value: Tensor) -> Tensor:
        """Store a field (B, T) of the new tokens; return that field of all tokens: (B, length + T)."""
        end = self.length + value.shape[-1]
        if name not in self.fields:
            self.fields[name] = value.new_full((self.rows, self.capacity), NEVER if name == "appears" else 0)
        self.fields[name][:, self.length : end] = value
        return self.fields[name][:, :end]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new keys and values (B, KV, T, D) of a layer; return those of all tokens."""
        if layer == len(self.keys):
            size = (self.rows, k.shape[1], self.capacity, k.shape[3])
            self.keys.append(k.new_empty(size))
            self.values.append(v.new_empty(size))
        end = self.length + k.shape[2]
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep these rows (indices, repeats allowed), in this order."""
        self.rows = len(rows)
        self.keys = [x.index_select(0, rows) for x in self.keys]
        self.values = [x.index_select(0, rows) for x in self.values]
        self.cross = [(k.index_select(0, rows), v.index_select(0, rows)) for k, v in self.cross]
        self.fields = {n: x.index_select(0, rows) for n, x in self.fields.items()}
        self.source = {n: x.index_select(0, rows) for n, x in self.source.items()}
        self.memory = None if self.memory is None else self.memory.index_select(0, rows)
