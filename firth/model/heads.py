"""The LM head (logits, and a cross-entropy that never holds all logits) and small classification heads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from firth.model.block import ACTIVATIONS
from firth.model.config import ModelConfig
from firth.model.cross_entropy import ABSENT, LogProbs, SumNLL
from firth.model.fused import project
from firth.model.norm import make_norm
from firth.model.parameter_count import GATED
from firth.types import UserError


class LMHead(nn.Module):
    """LM head: hidden states (..., hidden_size) -> logits (..., vocab_size).

    `LM` replaces `weight` by the token embedding if the config ties them.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.tie_embeddings and config.rnn.separate_directions:
            raise UserError(
                f"an LM head of width {config.hidden_size} cannot be tied to embeddings of width {config.embedding_dim} "
                "(model.rnn.separate_directions): set model.tie_embeddings=false, or use objective=bilm, "
                "which has a head for each direction"
            )
        self.config = config
        self.softcap, self.scale = config.lm_head.softcap, config.lm_head.scale
        self.act = ACTIVATIONS[GATED.get(config.activation, config.activation)]
        transform = config.lm_head.type == "transform"
        width = self.input_size(config)
        self.dense = nn.Linear(config.hidden_size, width, bias=config.bias) if transform else None
        self.norm = make_norm(config, width) if transform else None
        self.weight = nn.Parameter(torch.empty(config.vocab_size, width))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.lm_head.bias else None
        self.register_buffer("absent", None, persistent=False)
        self.absent: Tensor | None
        nn.init.normal_(self.weight, std=config.init.std or 0.001)
        if self.dense is not None:
            nn.init.normal_(self.dense.weight, std=config.init.std or config.hidden_size**-0.5)
            if self.dense.bias is not None:
                nn.init.zeros_(self.dense.bias)

    def restrict_vocab(self, absent: Tensor | None) -> None:
        """Give the token ids `absent` (n,) probability 0; None: no ids."""
        self.absent = absent

    @staticmethod
    def input_size(config: ModelConfig) -> int:
        """Return the width of the vectors that the matrix is multiplied with."""
        return config.embedding_dim if config.lm_head.type == "transform" else config.hidden_size

    @property
    def matrix(self) -> Tensor:
        """The output matrix (vocab_size, width): the weight, with LoRA adapters if there are any (`firth.peft.lora`)."""
        return self.weight

    def transform(self, hidden: Tensor) -> Tensor:
        """Return hidden states as the matrix reads them: (..., hidden_size) -> (..., width)."""
        if self.dense is not None and self.norm is not None:
            hidden = self.norm(self.act(self.dense(hidden)))
        return hidden if self.scale == 1 else hidden * self.scale

    def forward(self, hidden: Tensor) -> Tensor:
        # Contiguous: reading a row of logits then takes a tenth of the time.
        return self.to_logits(project(self.transform(hidden), self.matrix, self.bias).contiguous())

    def to_logits(self, logits: Tensor) -> Tensor:
        """Return matrix products (..., vocab_size) as logits: soft-capped, absent ids masked; in place without gradients."""
        if self.softcap and torch.is_grad_enabled():
            logits = self.softcap * torch.tanh(logits / self.softcap)
        elif self.softcap:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.absent is None else logits.index_fill(-1, self.absent, ABSENT)

    def nll(self, states: Tensor, labels: Tensor) -> Tensor:
        """Return the sum of -log p(label), a float32 scalar, without ever holding all logits.

        Args:
            states: (N, hidden_size).
            labels: (N,) token ids.
        """
        return self.nll_of_transformed(self.transform(states), labels)

    def nll_of_transformed(self, states: Tensor, labels: Tensor) -> Tensor:
        """Return `nll` of transformed states (N, width), for another head that has its own transform."""
        needs_grad = torch.is_grad_enabled()
        loss: Tensor = SumNLL.apply(states, self.matrix, self.bias, labels, self.softcap, needs_grad, self.absent)
        return loss

    def log_probs(self, states: Tensor, labels: Tensor) -> Tensor:
        """Return log p(label) of each row, differentiable: states (N, hidden_size), labels (N,) -> (N,) float32."""
        out: Tensor = LogProbs.apply(self.transform(states), self.matrix, self.bias, labels, self.softcap, self.absent)
        return out


class StandardizedHead(nn.Linear):
    """Linear head that is trained on standardized labels, (..., width) -> (..., 1).

    Args:
        width: Size of the hidden states.
        mean: Mean of the labels.
        std: Standard deviation of the labels.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, mean: float, std: float):
        super().__init__(width, 1)
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    @torch.no_grad()
    def in_units(self) -> nn.Linear:
        """Return the linear head whose output is in the units of the labels, which is what a model exports."""
        head = nn.utils.skip_init(nn.Linear, self.in_features, 1, device=self.weight.device, dtype=self.weight.dtype)
        head.weight.copy_(self.weight * self.std)
        head.bias.copy_(self.bias * self.std + self.mean)
        return head


def standardized_head(width: int, mean: float, std: float) -> StandardizedHead:
    """Return a `StandardizedHead` with small initial weights."""
    head = StandardizedHead(width, mean, std)
    nn.init.normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    return head


def linear(width: int, outputs: int, bias: bool = True) -> nn.Linear:
    """Return a linear head (..., width) -> (..., outputs) with small initial weights."""
    head = nn.Linear(width, outputs, bias)
    nn.init.normal_(head.weight, std=0.02)
    if bias:
        nn.init.zeros_(head.bias)
    return head


def pooled(width: int, outputs: int, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Return BERT's pooler and classifier: (..., width) -> width -> tanh -> (..., outputs), initialized as in BERT."""
    return nn.Sequential(linear(width, width), act(), linear(width, outputs))


def replaced_token_head(width: int) -> nn.Sequential:
    """Return ELECTRA's discriminator head: (..., width) -> width -> GELU -> (..., 1), initialized as in ELECTRA."""
    return pooled(width, 1, nn.GELU)
