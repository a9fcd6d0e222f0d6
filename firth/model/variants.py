"""Parts of single architectures: Linformer, the latent of a VAE, character CNN, mixture of layers.

Linformer: projection of keys and values along the sequence, from T tokens to k slots (Wang 2020, section 4).

    head = softmax(Q (E' K)' / sqrt(d)) (F' V)            E, F: (T, k), learned

Scores are T x k and not T x T, so time and memory grow linearly with T. A slot is a mixture of tokens, which no mask can
separate: a row must be one whole document with bidirectional attention. Padding is zeroed before the projection, so it
changes nothing (the paper's own code mixes it in).

The paper leaves two things open. Slots are initialized as windows of neighboring tokens: as many slots as tokens are full
attention, where random mixtures cancel each other. A row of n tokens uses the first n rows of E, and its slots are
multiplied by sqrt(max_positions / n), since the empty ones would dominate otherwise. Together: 61% -> 70% accuracy on
held-out questions, from 300 sentences.

>>> config = ModelConfig(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, causal=False, max_positions=16)
>>> config = config.with_fields({"attention.linformer.k": 4})
>>> slots = Linformer(config).at(6, AttentionMask())
>>> slots.of(layer=0).mix(torch.ones(3, 2, 6, 4), side=0).shape
torch.Size([3, 2, 4, 4])

Gaussian latent between encoder and decoder of a text VAE (Bowman 2016; Kingma 2014).

    source --encoder--> mean of its states --> mean, log variance of z (latent_size,) ; z --> LATENT_VECTORS memory vectors --> decoder

The decoder gets nothing else of the source. Bowman's z is the initial state of the decoder; a transformer has none, and
cross-attends to the vectors of the latent instead (the "memory" of OPTIMUS, Li 2020).

>>> import torch
>>> from firth.model.config_groups import EncoderConfig
>>> encoder = EncoderConfig(num_layers=1, latent_size=3)
>>> latent = Latent(ModelConfig(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, encoder=encoder))
>>> mean, log_variance = latent.read(torch.ones(2, 5, 8), torch.zeros(2, 5))
>>> mean.shape, latent.write(mean).shape
(torch.Size([2, 3]), torch.Size([2, 4, 8]))

Character CNN: token embeddings from a convolution over the bytes of each token, in place of a table.

Kim 2016 (arXiv:1508.06615) as in ELMo (Peters 2018, section 3.4): each byte of a token is a vector of 16 numbers, filters
of 1 to 7 bytes are applied and max-pooled; two highway layers (Srivastava 2015) and a linear map follow. Words with a
common ending have similar embeddings even before training.

>>> from firth.model.config import ModelConfig
>>> from firth.model.config_groups import CharacterConfig, EmbeddingConfig
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

Learned mixture of the layers of a model (ELMo: Peters 2018, equation 1).

    scale * sum over layers of softmax(weights)[layer] * states[layer]

>>> mixture = ScalarMix(layers=2)
>>> mixture(torch.tensor([[[1.0, 3.0]], [[3.0, 5.0]]])).tolist()
[[2.0, 4.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.model.attention import AttentionMask
from firth.model.config import ModelConfig
from firth.model.config_groups import CHARACTER_DIM, FILTER_SHARES, LATENT_VECTORS, NUM_CHARACTERS
from firth.types import NEVER, UserError


class Linformer(nn.Module):
    """The projections of a stack: weight (layers or 1, 2 or 1, max_positions, k). All heads share them (section 4)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(*config.linformer_projections, config.max_positions, config.attention.linformer.k)
        )
        tokens = torch.arange(config.max_positions)
        with torch.no_grad():  # the slots of a full row have the variance of its tokens
            self.weight.zero_()
            self.weight[..., tokens, tokens * config.attention.linformer.k // config.max_positions] = (
                config.attention.linformer.k / config.max_positions
            ) ** 0.5

    def at(self, length: int, mask: AttentionMask) -> LinformerSlots:
        """Return the projections of rows of `length` tokens.

        Raises:
            UserError: The mask is not bidirectional over whole rows, or a row is too long.
        """
        if mask.is_causal or mask.block_mask is not None or (mask.mask is not None and mask.mask.shape[2] > 1):
            raise UserError(
                "a Linformer mixes all tokens of a row, so every position must attend to the whole row: causal or permuted "
                "attention and several documents in a row are not possible (set batch.pack_to_length=0)"
            )
        context = self.weight.shape[2]
        if length > context:
            raise UserError(
                f"a row of {length} tokens is longer than model.max_positions={context}, the number of positions that this "
                "Linformer projects: shorten the rows or train with more positions"
            )
        real = None if mask.mask is None else mask.mask.mT
        count = self.weight.new_tensor(length) if real is None else real.sum(2, keepdim=True).clamp(min=1)
        return LinformerSlots(
            self.weight[:, :, :length], real, (context / count).sqrt(), AttentionMask(empty_rows=mask.empty_rows)
        )


@dataclass(frozen=True)
class LinformerSlots:
    """The projections that blocks share in one pass.

    Args:
        weight: (layers or 1, 2 or 1, T, k).
        real: (B, 1, T, 1) bool, False for padding; None: no padding.
        scale: Factor on the slots of each row, (B, 1, 1, 1) or ().
        mask: Attention mask over slots.
    """

    weight: Tensor
    real: Tensor | None
    scale: Tensor
    mask: AttentionMask

    def of(self, layer: int) -> LinformerSlots:
        """Return the projections of one layer."""
        return replace(self, weight=self.weight[layer % len(self.weight)][None])

    def mix(self, x: Tensor, side: int) -> Tensor:
        """Project keys (side 0) or values (1) to slots, with the first layer: (B, KV, T, D) -> (B, KV, k, D)."""
        tokens = x if self.real is None else x.masked_fill(~self.real, 0)
        return self.weight[0, side % self.weight.shape[1]].mT @ tokens * self.scale.to(x.dtype)


class Latent(nn.Module):
    """The two linear maps: encoder states -> posterior, z -> vectors for the decoder."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.posterior = nn.Linear(config.hidden_size, 2 * config.encoder.latent_size)
        self.memory = nn.Linear(config.encoder.latent_size, LATENT_VECTORS * config.hidden_size)
        nn.init.normal_(self.posterior.weight, std=0.02)  # q starts near the prior: no KL in the first steps
        nn.init.normal_(self.memory.weight, std=config.encoder.latent_size**-0.5)
        for linear in (self.posterior, self.memory):
            nn.init.zeros_(linear.bias)

    def read(self, states: Tensor, key_time: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return mean and log variance of q(z | source), two of (B, latent_size) float32.

        Args:
            states: (B, S, hidden_size).
            key_time: (B, S), NEVER for padding; None: no padding.
        """
        mean, log_variance = self.posterior(average(states, key_time)).float().chunk(2, -1)
        return mean, log_variance

    def write(self, z: Tensor) -> Tensor:
        """Return what the decoder attends to: z (B, latent_size) -> (B, LATENT_VECTORS, hidden_size)."""
        memory: Tensor = self.memory(z).unflatten(-1, (LATENT_VECTORS, -1))
        return memory


def average(states: Tensor, key_time: Tensor | None) -> Tensor:
    """Return the mean of states (..., T, width) without padding (key_time (..., T) NEVER): (..., width)."""
    if key_time is None:
        return states.mean(-2)
    real = (key_time != NEVER)[..., None]
    mean: Tensor = states.masked_fill(~real, 0).sum(-2) / real.sum(-2).clamp(min=1)
    return mean


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


class ScalarMix(nn.Module):
    """Weighted mean of the states of all layers: (layers, ..., width) -> (..., width); initially their plain mean.

    Args:
        layers: Number of layers.
        frozen: Whether the model below is run without gradient and without dropout.
    """

    def __init__(self, layers: int, frozen: bool = False):
        super().__init__()
        self.layers, self.frozen = layers, frozen
        self.weights = nn.Parameter(torch.zeros(layers))
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, states: Tensor) -> Tensor:
        weights = self.weights.softmax(0)
        # Under autocast the states are bf16 and the weights fp32; tensordot needs one dtype.
        return self.scale * torch.tensordot(weights, states.to(weights.dtype), 1)
