"""A Gaussian latent between encoder and decoder: what a text VAE squeezes a text through (Bowman 2016; Kingma 2014).

    source --encoder--> mean of its states --> mean, log variance of z (units,) ; z --> LATENT_VECTORS memory vectors --> decoder

The decoder sees nothing else of the source, so z is all it knows. Bowman's z is the decoder's first state; a
Transformer has none, and cross-attends to the latent's vectors instead (as OPTIMUS' "memory" does, Li 2020).

>>> import torch
>>> latent = Latent(ModelConfig(vocab_size=9, hidden_size=8, num_layers=1, num_heads=2, num_encoder_layers=1, latent_size=3))
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
    """The two maps: states -> posterior, z -> memory."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.posterior = nn.Linear(config.hidden_size, 2 * config.latent_size)
        self.memory = nn.Linear(config.latent_size, LATENT_VECTORS * config.hidden_size)
        nn.init.normal_(self.posterior.weight, std=0.02)  # q begins near the prior: the first steps owe no KL
        nn.init.normal_(self.memory.weight, std=config.latent_size**-0.5)
        for linear in (self.posterior, self.memory):
            nn.init.zeros_(linear.bias)

    def read(self, states: Tensor, appears: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean and log variance of q(z | source): states (B, S, width), appears (B, S) -> two of (B, units) float32."""
        mean, log_variance = self.posterior(average(states, appears)).float().chunk(2, -1)
        return mean, log_variance

    def write(self, z: Tensor) -> Tensor:
        """What the decoder attends to: z (B, units) -> (B, LATENT_VECTORS, width)."""
        memory: Tensor = self.memory(z).unflatten(-1, (LATENT_VECTORS, -1))
        return memory


def average(states: Tensor, appears: Tensor | None) -> Tensor:
    """The mean of the states that are not padding's: states (..., T, width), appears (..., T) -> (..., width)."""
    if appears is None:
        return states.mean(-2)
    real = (appears != NEVER)[..., None]
    mean: Tensor = states.masked_fill(~real, 0).sum(-2) / real.sum(-2).clamp(min=1)
    return mean
