"""Character CNN: token embeddings from a convolution over the bytes of each token, in place of a table.

Kim 2016 (arXiv:1508.06615) as in ELMo (Peters 2018, section 3.4): each byte of a token is a vector of 16 numbers, filters
of 1 to 7 bytes are applied and max-pooled; two highway layers (Srivastava 2015) and a linear map follow. Words with a
common ending have similar embeddings even before training.

>>> from firth.model.config import CharacterConfig, EmbeddingConfig, ModelConfig
>>> sizes = dict(vocab_size=2, hidden_size=8, num_layers=1, num_heads=1)
>>> tables = EmbeddingConfig(characters=CharacterConfig(max_length=7, num_filters=64))
>>> embedding = CharacterCNN(ModelConfig(**sizes, embedding=tables, tie_embeddings=False))
>>> embedding.set_token_characters(["un", "fair"])
>>> embedding.spelling[0].tolist()
[257, 118, 111, 258, 0, 0, 0]
>>> embedding(torch.tensor([[0, 1, 0]])).shape
torch.Size([1, 3, 8])

Differences from ELMo: bytes, and subwords where the tokenizer has them (with their space, if any); each distinct token of a
batch is computed once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.model.config import ModelConfig
from firth.model.parameter_count import CHARACTER_DIM, FILTER_SHARES, NUM_CHARACTERS

TOKEN_START, TOKEN_END = 257, 258
"""Symbols before and after a token; 0 is padding, a byte b is b + 1."""


class CharacterCNN(nn.Module):
    """Token ids (..., T) -> embeddings (..., T, embedding_dim).

    Attributes:
        spelling: (vocab_size, max_length), the symbols of each token id; saved with the weights.
        weight: The embeddings of the symbols.
    """

    spelling: Tensor

    def __init__(self, config: ModelConfig):
        super().__init__()
        characters = config.embedding.characters
        self.max_length, num_filters = characters.max_length, characters.num_filters
        self.register_buffer("spelling", torch.zeros(config.vocab_size, self.max_length, dtype=torch.int16))
        self.weight = nn.Parameter(torch.empty(NUM_CHARACTERS, CHARACTER_DIM))
        nn.init.uniform_(self.weight, -1, 1)
        self.filters = nn.ModuleList(nn.Conv1d(CHARACTER_DIM, num_filters * n // 64, size) for size, n in FILTER_SHARES)
        self.highways = nn.ModuleList(nn.Linear(num_filters, 2 * num_filters) for _ in range(2))
        self.down = nn.Linear(num_filters, config.embedding_dim)
        for layer in (*self.highways, self.down):
            nn.init.normal_(layer.weight, std=num_filters**-0.5)
            nn.init.zeros_(layer.bias)
        for highway in self.highways:  # start by carrying the input (ELMo)
            nn.init.constant_(highway.bias.data[num_filters:], -2.0)  # type: ignore[index]

    def set_token_characters(self, pieces: Sequence[str]) -> None:
        """Set the text of each token id; of a long one the first bytes are used."""
        rows = []
        for piece in pieces:
            symbols = [TOKEN_START, *(b + 1 for b in piece.encode()[: self.max_length - 2]), TOKEN_END]
            rows.append(symbols + [0] * (self.max_length - len(symbols)))
        self.spelling.copy_(torch.tensor(rows, dtype=torch.int16))

    def forward(self, tokens: Tensor) -> Tensor:
        distinct, inverse = tokens.unique(return_inverse=True)
        symbols = F.embedding(self.spelling[distinct].int(), self.weight, padding_idx=None).transpose(
            1, 2
        )  # (U, 16, L)
        x = torch.cat([F.relu(convolve(symbols).amax(-1)) for convolve in self.filters], -1)  # (U, filters)
        for highway in self.highways:
            new, gate = highway(x).chunk(2, -1)
            gate = gate.sigmoid()
            x = gate * F.relu(new) + (1 - gate) * x
        return F.embedding(inverse, self.down(x))
