"""A vector for a text: the mean of its states, as sentence-transformers has it (Reimers & Gurevych 2019, section 3).

    embed(model, tokenizer, ["A man sings.", "Somebody is singing."])      (2, width) float32

The text is read as it was in training ([CLS] text [SEP]), and the mean is over all of its tokens, these two among them; an
encoder-decoder's is over its encoder's states, a decoder's over states that have each seen what stands before them. Vectors
of unit length (`unit`) have their cosine as their product.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from firth.generate.decoding import attention_pattern_of, rectangle
from firth.model.latent import average
from firth.model.model import LM
from firth.tokenizer.tokenizer import Tokenizer

AT_ONCE = 8192
"""Tokens of a batch, padded."""


def embed(
    model: LM, tokenizer: Tokenizer, texts: Sequence[str], *, length: int = 0, unit: bool = True
) -> tuple[np.ndarray, list[int]]:
    """The vectors (n, width) float32, and which texts were cut to `length` tokens (0: the model's context)."""
    length = min(length or model.context, model.context)
    vocab = tokenizer.vocab
    framed = "cls" in vocab.roles and "sep" in vocab.roles
    found = tokenizer.encode_batch(texts)
    kept = [tokens[: length - 1 - framed] for tokens in found]
    rows = [vocab.add_special_tokens(tokens) if framed else np.append(tokens, vocab.eos) for tokens in kept]
    cut = [i for i, (a, b) in enumerate(zip(kept, found, strict=True)) if len(a) < len(b)]
    out = np.zeros((len(rows), model.config.hidden_size), np.float32)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    with attention_pattern_of(model):
        while order:
            some = order[: max(1, AT_ONCE // len(rows[order[0]]))]
            out[some] = _means(model, [rows[i] for i in some], unit)
            order = order[len(some) :]
    return out, cut


def _means(model: LM, rows: Sequence[np.ndarray], unit: bool) -> np.ndarray:
    device = model.tokens.weight.device
    batch = rectangle(rows, device, causal=model.config.causal and not model.config.num_encoder_layers)
    if model.config.num_encoder_layers:
        hidden = model.encode({f"source_{name}": field for name, field in batch.items()})
    else:
        hidden = model(batch)
    means = average(hidden.float(), batch["key_time"])
    found: torch.Tensor = F.normalize(means, dim=-1) if unit else means
    return np.asarray(found.cpu().numpy())
