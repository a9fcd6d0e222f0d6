"""Sentence embeddings by mean pooling, as in sentence-transformers (Reimers & Gurevych 2019, section 3).

    embed(model, tokenizer, ["A man sings.", "Somebody is singing."])      (2, hidden_size) float32

The text is encoded as in training ([CLS] text [SEP]), and the mean is over all tokens, special ones included. It is over the
encoder's states for an encoder-decoder, and over causal states for a decoder. The dot product of vectors of unit length
(`unit`) is their cosine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from firth.generate.decoding_batch import inference_mode, rectangle
from firth.model.latent import average
from firth.model.model import LM
from firth.tokenizer.tokenizer import Tokenizer

MAX_BATCH_TOKENS = 8192
"""Most tokens of a batch, padding included."""


def embed(
    model: LM, tokenizer: Tokenizer, texts: Sequence[str], *, length: int = 0, unit: bool = True
) -> tuple[np.ndarray, list[int]]:
    """Embed texts.

    Args:
        model: An encoder, a decoder or an encoder-decoder.
        tokenizer: Its tokenizer.
        texts: The texts.
        length: Longer texts are truncated to this many tokens; 0 takes the model's context.
        unit: Whether vectors are normalized to unit length.

    Returns:
        The vectors (n, hidden_size) float32, and the indices of the texts that were truncated.
    """
    length = min(length or model.context, model.context)
    vocab = tokenizer.vocab
    has_cls_sep = "cls" in vocab.roles and "sep" in vocab.roles
    encoded = tokenizer.encode_batch(texts)
    kept = [tokens[: length - 1 - has_cls_sep] for tokens in encoded]
    rows = [vocab.add_special_tokens(tokens) if has_cls_sep else np.append(tokens, vocab.eos) for tokens in kept]
    truncated = [i for i, (a, b) in enumerate(zip(kept, encoded, strict=True)) if len(a) < len(b)]
    out = np.zeros((len(rows), model.config.hidden_size), np.float32)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    with inference_mode(model):
        while order:
            batch = order[: max(1, MAX_BATCH_TOKENS // len(rows[order[0]]))]
            out[batch] = _mean_states(model, [rows[i] for i in batch], unit)
            order = order[len(batch) :]
    return out, truncated


def _mean_states(model: LM, rows: Sequence[np.ndarray], unit: bool) -> np.ndarray:
    device = model.tokens.weight.device
    batch = rectangle(rows, device, causal=model.config.causal and not model.config.encoder.num_layers)
    if model.config.encoder.num_layers:
        hidden = model.encode({f"source_{name}": field for name, field in batch.items()})
    else:
        hidden = model(batch)
    means = average(hidden.float(), batch["key_time"])
    vectors: torch.Tensor = F.normalize(means, dim=-1) if unit else means
    return np.asarray(vectors.cpu().numpy())
