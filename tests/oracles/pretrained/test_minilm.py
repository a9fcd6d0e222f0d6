"""Released weights: MiniLM's sentence embeddings match transformers, with its tokenizer, after loading and after saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from firth.model.model import LM
from firth.pretrained.load_save import left_out, load_model, save_model
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import NEVER

SENTENCES = [
    "A man is eating food.",
    "Someone has a meal.",
    "The girl is carrying a baby.",
    "Quantum chromodynamics describes how quarks and gluons interact, at distances far below the size of an atom.",
    "Führer, naïve café: 🦙 ½ 日本語",
]


def means(states: Tensor, real: Tensor) -> Tensor:
    """Mean pooling, as sentence-transformers does it."""
    kept = real[..., None].float()
    return F.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)


@torch.no_grad()
def vectors(model: LM, tokenizer: Tokenizer) -> Tensor:
    cls, sep, pad = (tokenizer.vocab.roles[role] for role in ("cls", "sep", "pad"))
    rows = [torch.tensor([cls, *tokenizer.encode(text).tolist(), sep]) for text in SENTENCES]
    tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    real = tokens != pad
    return means(model({"tokens": tokens, "key_time": torch.where(real, 0, NEVER)}), real)


@pytest.mark.slow
@torch.no_grad()
def test_sentence_embeddings_match_transformers(minilm: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="the oracle; installed with the test extra")
    model, tokenizer = load_model(minilm), Tokenizer.load(minilm)
    assert left_out(minilm) == ["pooler.dense.bias", "pooler.dense.weight"]
    body, hf_tokenizer = (
        transformers.BertModel.from_pretrained(minilm),
        transformers.AutoTokenizer.from_pretrained(minilm),
    )
    fields = hf_tokenizer(SENTENCES, padding=True, return_tensors="pt")
    want = means(body(**fields).last_hidden_state, fields["attention_mask"] == 1)
    mine = vectors(model, tokenizer)
    assert (mine - want).abs().max() < 1e-5
    near = mine @ mine.T
    assert near[0, 1] > 0.5 > 0.2 > near[0, 3]
    save_model(model, tokenizer, tmp_path)
    again = transformers.BertModel.from_pretrained(tmp_path)
    assert (means(again(**fields).last_hidden_state, fields["attention_mask"] == 1) - want).abs().max() < 1e-5
