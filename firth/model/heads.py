"""The vocabulary head: hidden states -> logits, and a cross-entropy that never holds all the logits; and small heads."""

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
    """Hidden states (..., width) -> logits (..., vocab). `LM` replaces `weight` by the token embedding if tied."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.tie_embeddings and config.separate_directions:
            raise UserError(
                f"a vocabulary head reads {config.hidden_size} numbers and the embeddings of model.separate_directions have {config.embedding_dim}: "
                "set model.tie_embeddings=false, or take objective bilm, whose two readers have a half each"
            )
        self.config = config
        self.softcap, self.scale = config.logit_softcap, config.lm_head_scale
        self.act = ACTIVATIONS[GATED.get(config.activation, config.activation)]
        transform = config.lm_head == "transform"
        read = self.reads(config)
        self.dense = nn.Linear(config.hidden_size, read, bias=config.bias) if transform else None
        self.norm = make_norm(config, read) if transform else None
        self.weight = nn.Parameter(torch.empty(config.vocab_size, read))
        self.bias = nn.Parameter(torch.zeros(config.vocab_size)) if config.lm_head_bias else None
        self.register_buffer("absent", None, persistent=False)
        self.absent: Tensor | None
        nn.init.normal_(self.weight, std=config.init_std or 0.001)
        if self.dense is not None:
            nn.init.normal_(self.dense.weight, std=config.init_std or config.hidden_size**-0.5)
            if self.dense.bias is not None:
                nn.init.zeros_(self.dense.bias)

    def restrict_vocab(self, absent: Tensor | None) -> None:
        """Give no probability to some ids (n,); the others share all of it. None: every id has some."""
        self.absent = absent

    @staticmethod
    def reads(config: ModelConfig) -> int:
        """Width of what the matrix is multiplied with."""
        return config.embedding_dim if config.lm_head == "transform" else config.hidden_size

    @property
    def matrix(self) -> Tensor:
        """What states are multiplied with: the weight, and whatever has been put on it (`firth.peft.lora`)."""
        return self.weight

    def transform(self, hidden: Tensor) -> Tensor:
        """Hidden states as the matrix reads them: (..., width) -> (..., reads)."""
        if self.dense is not None and self.norm is not None:
            hidden = self.norm(self.act(self.dense(hidden)))
        return hidden if self.scale == 1 else hidden * self.scale

    def forward(self, hidden: Tensor) -> Tensor:
        # In one piece: what reads a row of logits then takes a tenth of the time.
        return self.to_logits(project(self.transform(hidden), self.matrix, self.bias).contiguous())

    def to_logits(self, logits: Tensor) -> Tensor:
        """Return products (..., vocab) as logits, which may be changed in place without gradients: capped, absent ids left out."""
        if self.softcap and torch.is_grad_enabled():
            logits = self.softcap * torch.tanh(logits / self.softcap)
        elif self.softcap:
            logits = logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits if self.absent is None else logits.index_fill(-1, self.absent, ABSENT)

    def nll(self, states: Tensor, labels: Tensor) -> Tensor:
        """Sum of -log p(label): states (N, width), labels (N,) -> scalar float32. Never holds all the logits."""
        return self.matched(self.transform(states), labels)

    def matched(self, read: Tensor, labels: Tensor) -> Tensor:
        """`nll` of what another head has read: (N, `reads`), without the transform of this one."""
        learn = torch.is_grad_enabled()
        loss: Tensor = SumNLL.apply(read, self.matrix, self.bias, labels, self.softcap, learn, self.absent)
        return loss

    def log_probs(self, states: Tensor, labels: Tensor) -> Tensor:
        """log p(label) of each row, with its graph: states (N, width), labels (N,) -> (N,) float32."""
        read = self.transform(states)
        out: Tensor = LogProbs.apply(read, self.matrix, self.bias, labels, self.softcap, self.absent)
        return out


def linear(width: int, answers: int, bias: bool = True) -> nn.Linear:
    """A linear reading of a state: (..., width) -> (..., answers), which begins near zero."""
    head = nn.Linear(width, answers, bias)
    nn.init.normal_(head.weight, std=0.02)
    if bias:
        nn.init.zeros_(head.bias)
    return head


def pooled(width: int, answers: int, act: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """BERT's pooler and a classifier: (..., width) -> width -> tanh -> (..., answers), initialised as there."""
    return nn.Sequential(linear(width, width), act(), linear(width, answers))


def replaced_token_head(width: int) -> nn.Sequential:
    """ELECTRA's discriminator head: (..., width) -> width -> GELU -> (..., 1), initialised as there."""
    return pooled(width, 1, nn.GELU)
