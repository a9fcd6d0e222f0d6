"""Small models of transformers, and their outputs in transformers and in firth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from firth.model.model import LM

transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
transformers.logging.set_verbosity_error()

IDS = torch.randint(3, 61, (2, 9), generator=torch.Generator().manual_seed(0))
SIZES = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TABLE = SIZES | {"max_position_embeddings": 40}
ROBERTA = SIZES | {"max_position_embeddings": 42, "type_vocab_size": 1, "pad_token_id": 1}
GROUPED = TABLE | {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FAMILIES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "bert": ("Bert", TABLE, ["query", "value"]),
    "roberta": ("Roberta", ROBERTA, ["query", "value", "word_embeddings"]),
    "distilbert": (
        "DistilBert",
        {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
        ["q_lin", "lin1"],
    ),
    "modernbert": (
        "ModernBert", TABLE | {"layer_types": ["full_attention"] * 2, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
        ["Wqkv", "Wi"],
    ),
    "llama": ("Llama", GROUPED, ["q_proj", "up_proj"]),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 10}, ["k_proj", "o_proj"]),
}  # fmt: skip


def hf_model(name: str, suffix: str, **more: Any) -> Any:
    prefix, fields, _ = FAMILIES[name]
    torch.manual_seed(3)
    model = getattr(transformers, prefix + suffix)(getattr(transformers, f"{prefix}Config")(**fields, **more))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.15)
    return model.eval()


@torch.no_grad()
def hidden(model: LM) -> Tensor:
    when = torch.arange(9)[None].expand(2, -1) * model.config.causal
    return model({"tokens": IDS, "query_time": when, "key_time": when})


@torch.no_grad()
def hf_outputs(model: Any) -> Tensor:
    out = model(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    found: Tensor = out["logits"] if "logits" in out else out["last_hidden_state"]
    return found


def class_logits(model: LM) -> Tensor:
    states = hidden(model)
    with torch.no_grad():
        out: Tensor = model.heads["classes"](states[:, -1 if model.config.causal else 0])
    return out
