"""Trained positions before every text, the model itself frozen: prefixes (Li & Liang 2021) and prompts (Lester 2021).

    prefix    keys and values for every layer, (V, layers * 2 * kv_heads * head_width): nothing computes them
    prompt    vectors in place of those of tokens, (V, table width): the model reads them like any text

Both stand at positions 0 to V - 1 and move the text behind them on. A prefix has been there ALWAYS and is of ALL_DOCUMENTS
document, so a packed row has one; its keys are taken as they are, neither turned nor normalised, as what a cache would
hold. Prompts are tokens: each document of a row has its own copies, which in a decoder see one another from left to
right and in an encoder see their text too.

Numbers and files are peft's: of an encoder-decoder, its decoder reads the prefix and its encoder the prompt. Li and Liang
train a prefix through an MLP (section 4.3), which `Prefix.without_mlp` works out and leaves off; with `hidden` 0 there is none.
What both begin as is in `firth.peft.init`.

>>> prefix = PrefixEncoder(tokens=3, layers=2, kv_heads=2, head_width=4)
>>> [tuple(x.shape) for x in prefix.row_memory().pairs[0]]
[(2, 3, 4), (2, 3, 4)]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from firth.model.attention import ALL_DOCUMENTS
from firth.model.config import ModelConfig
from firth.model.row_fields import RowMemory
from firth.types import ALWAYS, NEVER, Batch, UserError

PREFIX_HEADS = frozenset({"prefix", "prompt"})
"""Names of the parts that stand before every text."""


class PrefixEncoder(nn.Module):
    """Keys and values before every text. hidden: of the MLP that they are trained through; 0 where they are trained
    themselves. A part of a model by the name `prefix`."""

    def __init__(self, tokens: int, layers: int, kv_heads: int, head_width: int, hidden: int = 0):
        super().__init__()
        self.tokens, self.layers, self.kv_heads, self.head_width, self.hidden = (
            tokens,
            layers,
            kv_heads,
            head_width,
            hidden,
        )
        width, out = kv_heads * head_width, 2 * layers * kv_heads * head_width
        self.table = nn.Embedding(tokens, width if hidden else out)
        self.through = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, out)) if hidden else None

    def weights(self) -> Tensor:
        """(V, layers * 2 * kv_heads * head_width), as peft's files have it."""
        return self.table.weight if self.through is None else self.through(self.table.weight)

    def row_memory(self) -> RowMemory:
        """What stands before every row."""
        x = self.weights().view(self.tokens, self.layers, 2, self.kv_heads, self.head_width).permute(1, 2, 3, 0, 4)
        at = torch.arange(self.tokens, device=x.device)[None]
        fields = {
            "key_time": torch.full_like(at, ALWAYS),
            "document_ids": torch.full_like(at, ALL_DOCUMENTS),
            "positions": at,
        }
        return RowMemory(fields, pairs=[(pair[0], pair[1]) for pair in x])

    @torch.no_grad()
    def without_mlp(self) -> PrefixEncoder:
        """The same prefix without the MLP."""
        plain = PrefixEncoder(self.tokens, self.layers, self.kv_heads, self.head_width)
        plain.table.weight.copy_(self.weights())
        return plain


class PromptEmbedding(nn.Module):
    """Vectors before every text that the model reads: of an encoder-decoder, before the source. A part of a model by the
    name `prompt`."""

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.tokens, self.width = tokens, width
        self.table = nn.Embedding(tokens, width)

    def prepend(self, fields: Batch, causal: bool) -> tuple[Tensor, Batch]:
        """The vectors (N, width) that go before each row, N = tokens * documents, and the fields (B, N + T) of both."""
        like = fields["tokens"]
        real = fields["key_time"] < NEVER if "key_time" in fields else torch.ones_like(like, dtype=torch.bool)
        documents = torch.zeros(1, dtype=torch.long, device=like.device)
        if "document_ids" in fields:
            there = fields["document_ids"][real]
            documents = torch.arange(int(there.amin()), int(there.amax()) + 1, device=like.device)
        places = torch.arange(self.tokens, device=like.device).repeat(len(documents))
        zeros = torch.zeros_like(places)
        when = ALWAYS + (places if causal else zeros)
        new = {
            "positions": places, "document_ids": documents.repeat_interleave(self.tokens), "key_expiry": zeros + NEVER,
            "key_time": when, "query_time": when,
        }  # fmt: skip
        said = {name: new.get(name, zeros).to(x.dtype).expand(len(x), -1) for name, x in fields.items()}
        if "query_time" in fields and not causal:
            # As soon as anyone of the row and no sooner, or a prompt would tell what it must not.
            said["query_time"] = (
                torch.where(real, fields["query_time"], NEVER).amin(-1, keepdim=True).expand(-1, len(places))
            )
        vectors = self.table.weight.repeat(len(documents), 1)
        return vectors, {name: torch.cat((said[name].to(x.dtype), x), -1) for name, x in fields.items()}


def check_prefix_supported(config: ModelConfig, what: str) -> None:
    """Raise a UserError if nothing can stand before the texts of a shape."""
    lacking = ""
    if config.rnn_type or not config.num_layers:
        lacking = "has no attention"
    if config.linformer_k:
        lacking = "projects whole rows"
    if config.position == "xlnet":
        lacking = "reads distances to every token and has a memory of its own"
    if lacking:
        raise UserError(
            f"peft={what} puts trained positions before a text, which {config.description} cannot read, for it {lacking}: "
            "take peft=lora, or a model with learned, rotary, sinusoidal or T5's positions"
        )
