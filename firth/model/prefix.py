"""Trained positions before every text, with a frozen model: prefix tuning (Li & Liang 2021), prompt tuning (Lester 2021).

    prefix    keys and values for every layer, (V, layers * 2 * kv_heads * head_width), trained directly
    prompt    vectors in place of token embeddings, (V, embedding_dim), which the model reads like any text

Both are at positions 0 to V - 1, and shift the text after them. A prefix has key_time ALWAYS and belongs to
ALL_DOCUMENTS, so a packed row has one; its keys are used as they are, without rotation or norm, like those in a cache.
Prompts are tokens: each document of a row has its own copies, which are causal in a decoder and bidirectional with their
text in an encoder.

Tensors and files are those of peft: in an encoder-decoder the prefix is the decoder's and the prompt the encoder's. Li and
Liang train a prefix through an MLP (section 4.3), which `PrefixEncoder.without_mlp` merges; with `hidden` 0 there is none.
Initial values are in `firth.runs.peft_options`.

>>> prefix = PrefixEncoder(tokens=3, layers=2, kv_heads=2, head_width=4)
>>> [tuple(x.shape) for x in prefix.row_memory().pairs[0]]
[(2, 3, 4), (2, 3, 4)]
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from firth.model.config import ModelConfig
from firth.model.forward_context import RowMemory
from firth.types import ALL_DOCUMENTS, ALWAYS, NEVER, Batch, UserError

PREFIX_HEADS = frozenset({"prefix", "prompt"})
"""Names of the heads that are trained positions before every text."""


class PrefixEncoder(nn.Module):
    """Trained keys and values before every text: the head `prefix` of a model.

    Args:
        tokens: Number of positions V.
        layers: Number of layers.
        kv_heads: Key/value heads of a layer.
        head_width: Width of a head.
        hidden: Inner width of the MLP that they are trained through; 0: no MLP.
    """

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
        """Return the keys and values as in peft's files: (V, layers * 2 * kv_heads * head_width)."""
        return self.table.weight if self.through is None else self.through(self.table.weight)

    def row_memory(self) -> RowMemory:
        """Return the keys and values as positions before every row."""
        x = self.weights().view(self.tokens, self.layers, 2, self.kv_heads, self.head_width).permute(1, 2, 3, 0, 4)
        positions = torch.arange(self.tokens, device=x.device)[None]
        fields = {
            "key_time": torch.full_like(positions, ALWAYS),
            "document_ids": torch.full_like(positions, ALL_DOCUMENTS),
            "positions": positions,
        }
        return RowMemory(fields, pairs=[(pair[0], pair[1]) for pair in x])

    @torch.no_grad()
    def without_mlp(self) -> PrefixEncoder:
        """Return the same prefix without the MLP."""
        plain = PrefixEncoder(self.tokens, self.layers, self.kv_heads, self.head_width)
        plain.table.weight.copy_(self.weights())
        return plain


class PromptEmbedding(nn.Module):
    """Trained vectors before every text (of an encoder-decoder: before the source): the head `prompt` of a model.

    Args:
        tokens: Number of positions V.
        width: Width of the token embedding.
    """

    def __init__(self, tokens: int, width: int):
        super().__init__()
        self.tokens, self.width = tokens, width
        self.table = nn.Embedding(tokens, width)

    def prepend(self, fields: Batch, causal: bool) -> tuple[Tensor, Batch]:
        """Return the vectors (N, width) before each row, N = tokens * documents, and the fields (B, N + T) of the whole row."""
        like = fields["tokens"]
        real = fields["key_time"] < NEVER if "key_time" in fields else torch.ones_like(like, dtype=torch.bool)
        documents = torch.zeros(1, dtype=torch.long, device=like.device)
        if "document_ids" in fields:
            ids = fields["document_ids"][real]
            documents = torch.arange(int(ids.amin()), int(ids.amax()) + 1, device=like.device)
        positions = torch.arange(self.tokens, device=like.device).repeat(len(documents))
        zeros = torch.zeros_like(positions)
        times = ALWAYS + (positions if causal else zeros)
        new = {
            "positions": positions, "document_ids": documents.repeat_interleave(self.tokens), "key_expiry": zeros + NEVER,
            "key_time": times, "query_time": times,
        }  # fmt: skip
        front = {name: new.get(name, zeros).to(x.dtype).expand(len(x), -1) for name, x in fields.items()}
        if "query_time" in fields and not causal:
            # The earliest query time of the row: later, and the prompt would leak tokens that a query may not attend to.
            front["query_time"] = (
                torch.where(real, fields["query_time"], NEVER).amin(-1, keepdim=True).expand(-1, len(positions))
            )
        vectors = self.table.weight.repeat(len(documents), 1)
        return vectors, {name: torch.cat((front[name].to(x.dtype), x), -1) for name, x in fields.items()}


def check_prefix_supported(config: ModelConfig, method: str) -> None:
    """Raise UserError if an architecture cannot have trained positions before its texts.

    Args:
        config: The architecture.
        method: "prefix" or "prompt".
    """
    reason = ""
    if config.rnn.type or not config.num_layers:
        reason = "has no attention"
    if config.attention.linformer.k:
        reason = "projects whole rows"
    if config.position.type == "xlnet":
        reason = "uses relative distances and has its own memory"
    if reason:
        raise UserError(
            f"peft={method} puts trained positions before a text, which {config.description} cannot read, since it {reason}: "
            "use peft=lora, or a model with learned, rotary, sinusoidal or T5's positions"
        )
