"""JSON descriptions of model heads, from which a saved model is rebuilt.

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

from torch import nn

from firth.model.config import ModelConfig
from firth.model.heads import LMHead, StandardizedHead
from firth.model.layer_mixture import ScalarMix
from firth.model.model import LM, Critic, TiedSubmodel
from firth.model.norm import LayerNorm, RMSNorm
from firth.model.prefix import PrefixEncoder, PromptEmbedding
from firth.types import UserError

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
    TiedSubmodel: lambda m: {
        "kind": "guest", "config": asdict(m.config), "heads": {n: describe_head(p) for n, p in m.heads.items()}
    },
    Critic: lambda m: {"kind": "model", "config": asdict(m.config), "heads": {n: describe_head(p) for n, p in m.heads.items()}},
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
    "guest": lambda d: TiedSubmodel(
        ModelConfig.from_dict(d["config"]), {n: rebuild_head(p, n) for n, p in d["heads"].items()}
    ),
    "model": lambda d: Critic(
        ModelConfig.from_dict(d["config"]), {n: rebuild_head(p, n) for n, p in d["heads"].items()}
    ),
}
