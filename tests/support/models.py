"""Models with random weights everywhere, since many weights are initialized to zero or one."""

import numpy as np
import torch

from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from tests.support.byte_tokenizer import ByteTokenizer


def random_model(config: ModelConfig, seed: int = 0, std: float = 0.3, **heads: torch.nn.Module) -> LM:
    """Return a model in evaluation mode, by default with an LM head; all its weights are drawn from N(0, std)."""
    torch.manual_seed(seed)
    model = LM(config, heads or {"lm": LMHead(config)})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model.eval()


def perturbed_model(config: ModelConfig, seed: int = 0, std: float = 0.15) -> LM:
    """Return an initialized model whose weights, norms and biases too, are moved at random: swapped tensors show."""
    torch.manual_seed(seed)
    model = LM(config, {"lm": LMHead(config)})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
    return model.eval()


def random_prompts(count: int, seed: int = 0, shortest: int = 1) -> list[np.ndarray]:
    """Return prompts of bytes, each of fewer than 20 tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(7, ByteTokenizer.vocab.size, rng.integers(shortest, 20)) for _ in range(count)]
