"""Heads of a model, and the JSON descriptions from which saved heads are rebuilt.

The LM head (logits, and a cross-entropy that never holds all logits) and small classification heads.

JSON descriptions of model heads, from which a saved model is rebuilt.

A description names the kind of a module and its sizes; no code is ever read from a file.

>>> describe_head(nn.Linear(8, 2))
{'kind': 'linear', 'in': 8, 'out': 2, 'bias': True}
>>> rebuild_head({'kind': 'chain', 'of': [{'kind': 'linear', 'in': 8, 'out': 2, 'bias': True}, {'kind': 'tanh'}]}, "nsp")
Sequential(
  (0): Linear(in_features=8, out_features=2, bias=True)
  (1): Tanh()
)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from firth.model.block import ACTIVATIONS, LayerNorm, RMSNorm, make_norm
from firth.model.config import ModelConfig
from firth.model.config_groups import GATED
from firth.model.cross_entropy import ABSENT, LogProbs, SumNLL
from firth.model.fused import project
from firth.model.model import LM, Critic, TiedSubmodel
from firth.model.prefix import PrefixEncoder, PromptEmbedding
from firth.model.variants import ScalarMix
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
        self.register_buffer("mean", torch.full((), mean), persistent=False)
        self.register_buffer("std", torch.full((), std), persistent=False)

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


Description = dict[str, Any]


def describe_head(head: nn.Module) -> Description:
    """Return the JSON description of a head; kind "other" if firth cannot rebuild it."""
    describe = DESCRIBE.get(type(head))
    return {"kind": "other"} if describe is None else describe(head)


def rebuild_head(description: Description, name: str) -> nn.Module:
    """Return the module that a description names.

    Args:
        description: As from `describe_head`.
        name: Name of the head, for the error message.

    Raises:
        UserError: The kind is unknown.
    """
    kind = description.get("kind", "other")
    if kind not in REBUILD:
        raise UserError(
            f"firth.json describes head {name!r} as {kind!r}, which cannot be rebuilt: pass the module to load_model"
        )
    return REBUILD[kind](description)


def export_heads(model: LM) -> None:
    """Replace the heads of a trained model by those that are saved, in place: in the units of the data, without a critic."""
    for name, head in list(model.heads.items()):
        if type(head) is StandardizedHead:
            model.heads[name] = head.in_units()
        elif type(head) is Critic:
            del model.heads[name]


def num_outputs(description: Description) -> int:
    """Return the number of outputs of a described head, which is that of its last linear map; 0 if there is none.

    >>> num_outputs({'kind': 'chain', 'of': [{'kind': 'tanh'}, {'kind': 'linear', 'in': 8, 'out': 2, 'bias': True}]})
    2
    """
    if description.get("kind") == "chain" and description["of"]:
        return num_outputs(description["of"][-1])
    return int(description["out"]) if description.get("kind") == "linear" else 0


def _describe_model(model: LM, kind: str) -> Description:
    """Return the description of a head that is a model: its config and its heads."""
    return {
        "kind": kind,
        "config": asdict(model.config),
        "heads": {n: describe_head(p) for n, p in model.heads.items()},
    }


def _rebuild_model(description: Description, kind: type[LM]) -> LM:
    """Return the model of a class that a description has the config and the heads of."""
    heads = {name: rebuild_head(head, name) for name, head in description["heads"].items()}
    return kind(ModelConfig.from_dict(description["config"]), heads)


DESCRIBE: dict[type[nn.Module], Callable[[Any], Description]] = {
    nn.Linear: lambda m: {"kind": "linear", "in": m.in_features, "out": m.out_features, "bias": m.bias is not None},
    StandardizedHead: lambda m: {"kind": "linear", "in": m.in_features, "out": 1, "bias": True},
    nn.Embedding: lambda m: {"kind": "embedding", "in": m.num_embeddings, "out": m.embedding_dim},
    nn.Sequential: lambda m: {"kind": "chain", "of": [describe_head(child) for child in m]},
    nn.Tanh: lambda m: {"kind": "tanh"},
    nn.GELU: lambda m: {"kind": "gelu"} | ({} if m.approximate == "none" else {"approximate": m.approximate}),
    nn.SiLU: lambda m: {"kind": "silu"},
    nn.ReLU: lambda m: {"kind": "relu"},
    nn.Dropout: lambda m: {"kind": "dropout", "rate": m.p},
    nn.LayerNorm: lambda m: {"kind": "torch_layer_norm", "width": m.normalized_shape[0], "eps": m.eps},
    LayerNorm: lambda m: {
        "kind": "layer_norm", "width": m.width, "weight": m.weight is not None, "bias": m.bias is not None, "eps": m.eps
    },
    RMSNorm: lambda m: {"kind": "rms_norm", "width": m.width, "weight": m.weight is not None, "eps": m.eps},
    ScalarMix: lambda m: {"kind": "mixture", "layers": m.layers},
    PrefixEncoder: lambda m: {
        "kind": "prefix", "tokens": m.tokens, "layers": m.layers, "kv_heads": m.kv_heads, "head_width": m.head_width,
        "hidden": m.hidden,
    },
    PromptEmbedding: lambda m: {"kind": "prompt", "tokens": m.tokens, "width": m.width},
    LMHead: lambda m: {"kind": "vocabulary", "config": asdict(m.config)},
    TiedSubmodel: lambda m: _describe_model(m, "guest"),
    Critic: lambda m: _describe_model(m, "critic"),
    LM: lambda m: _describe_model(m, "model"),
}  # fmt: skip

REBUILD: dict[str, Callable[[Description], nn.Module]] = {
    "linear": lambda d: nn.Linear(d["in"], d["out"], bias=d["bias"]),
    "embedding": lambda d: nn.Embedding(d["in"], d["out"]),
    "chain": lambda d: nn.Sequential(*(rebuild_head(child, "chain") for child in d["of"])),
    "tanh": lambda d: nn.Tanh(),
    "gelu": lambda d: nn.GELU(d.get("approximate", "none")),
    "silu": lambda d: nn.SiLU(),
    "relu": lambda d: nn.ReLU(),
    "dropout": lambda d: nn.Dropout(d["rate"]),
    "torch_layer_norm": lambda d: nn.LayerNorm(d["width"], eps=d["eps"]),
    "layer_norm": lambda d: LayerNorm(d["width"], d["weight"], d["bias"], d["eps"]),
    "rms_norm": lambda d: RMSNorm(d["width"], d["weight"], False, d["eps"]),
    "mixture": lambda d: ScalarMix(d["layers"]),
    "prefix": lambda d: PrefixEncoder(d["tokens"], d["layers"], d["kv_heads"], d["head_width"], d["hidden"]),
    "prompt": lambda d: PromptEmbedding(d["tokens"], d["width"]),
    "vocabulary": lambda d: LMHead(ModelConfig.from_dict(d["config"])),
    "guest": lambda d: _rebuild_model(d, TiedSubmodel),
    "critic": lambda d: _rebuild_model(d, Critic),
    "model": lambda d: _rebuild_model(d, LM),
}
