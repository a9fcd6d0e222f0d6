"""Gaussian latent between encoder and decoder of a text VAE (Bowman 2016; Kingma 2014).

    source --encoder--> mean of its states --> mean, log variance of z (latent_size,) ; z --> LATENT_VECTORS memory vectors --> decoder

The decoder gets nothing else of the source. Bowman's z is the initial state of the decoder; a transformer has none, and
cross-attends to the vectors of the latent instead (the "memory" of OPTIMUS, Li 2020).

>>> import torch
>>> from firth.model.config import EncoderConfig
>>> encoder = EncoderConfig(num_layers=1, latent_size=3)
>>> latent = Latent(ModelConfig(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, encoder=encoder))
>>> mean, log_variance = latent.read(torch.ones(2, 5, 8), torch.zeros(2, 5))
>>> mean.shape, latent.write(mean).shape
(torch.Size([2, 3]), torch.Size([2, 4, 8]))
"""

from __future__ import annotations

from torch import Tensor, nn

from firth.model.config import ModelConfig
from firth.model.parameter_count import LATENT_VECTORS
from firth.types import NEVER


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
