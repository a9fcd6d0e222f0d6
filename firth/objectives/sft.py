"""Supervised finetuning: predict the answer, not the prompt.

A dialogue is one row of tokens and a mask that is True on the assistant's tokens *and on the token that ends its turn*
(`firth.tokenizer.chat`): a model that is not trained on the stop token never learns to stop. InstructGPT (Ouyang 2022) and
FLAN (Wei 2022) train so; T5 (Raffel 2020, section 2.4) does the same with an encoder for the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from firth.data import attention_fields
from firth.fields import NonNegativeFloat
from firth.model.model import LM
from firth.objectives.objective import TokenObjective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Batch, Example, Outputs


def causal_example(tokens: np.ndarray, mask: np.ndarray) -> Example:
    """Return a causal LM example whose labels are the masked tokens: tokens, mask (n,) -> fields (n - 1,).

    >>> seen = causal_example(np.array([5, 6, 7, 8]), np.array([False, False, True, True]))
    >>> seen["tokens"].tolist(), seen["labels"].tolist()
    ([5, 6, 7], [-100, 7, 8])
    """
    labels = np.where(mask[1:], tokens[1:], IGNORE)
    return {"tokens": tokens[:-1], "labels": labels} | attention_fields.causal(len(tokens) - 1)


def document_lengths(batch: Batch) -> Tensor:
    """Return the number of tokens in the document of each token, without padding: (..., T) fields -> (..., T), at least 1."""
    tokens = batch["tokens"]
    real = batch["key_time"] != NEVER if "key_time" in batch else torch.ones_like(tokens, dtype=torch.bool)
    document = batch["document_ids"].long() if "document_ids" in batch else torch.zeros_like(tokens)
    counts = document.new_zeros(*tokens.shape[:-1], tokens.shape[-1] + 1)  # ids are at most the number of tokens
    return counts.scatter_add(-1, document, real.long()).gather(-1, document).clamp(min=1)


@contextmanager
def noisy_embeddings(model: LM, batch: Batch, alpha: float) -> Iterator[None]:
    """Add noise to the token embeddings of passes in this context: uniform in +-alpha / sqrt(L d) (NEFTune, Jain 2023).

    L is the length of the token's document, without padding, and d the width of the embedding.
    """
    lengths = document_lengths(batch).flatten(0, -2)[..., None]  # (B, T, 1)

    def add(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        own = output[:, output.shape[1] - lengths.shape[1] :]  # without a trained prompt
        noise = torch.empty_like(own).uniform_(-1, 1) * (alpha / (lengths * own.shape[-1]).to(own.dtype).sqrt())
        return torch.cat((output[:, : output.shape[1] - lengths.shape[1]], own + noise), 1)

    hook = model.tokens.register_forward_hook(add)
    try:
        yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class SFT(TokenObjective):
    """Predict the assistant's tokens of a dialogue: {"tokens", "mask"}.

    Shown: the whole dialogue, left to right. Predicted: the tokens that the mask covers. Loss: -sum over them of
    log p(w_t | w_<t).

    Args:
        neftune_noise_alpha: Strength of the noise on the token embeddings in training (NEFTune, Jain 2023); 5 is usual, 0 for
            none.

    >>> vocab = Vocab(size=10, roles={"pad": 0}, special=np.arange(10) < 1)
    >>> dialogue = {"tokens": np.array([5, 6, 7, 2]), "mask": np.array([False, False, True, True])}
    >>> SFT().build_example(dialogue, vocab, np.random.default_rng(0))["labels"].tolist()
    [-100, 7, 2]
    """

    neftune_noise_alpha: NonNegativeFloat = 0.0

    inputs = frozenset({"tokens", "mask"})
    attention = "causal"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return causal_example(example["tokens"], example["mask"])

    def forward(self, model: LM, batch: Batch) -> Outputs:
        if not (self.neftune_noise_alpha and model.training):
            return super().forward(model, batch)
        with noisy_embeddings(model, batch, self.neftune_noise_alpha):
            return super().forward(model, batch)


@dataclass(frozen=True)
class Seq2SeqSFT(TokenObjective):
    """Predict a target from a source: {"source", "target"}, the target with its stop token.

    Shown: the source, to the encoder. Predicted: the target, by the decoder. Loss: -sum over t of log p(y_t | y_<t, source).

    >>> vocab = Vocab(size=10, roles={"pad": 0}, special=np.arange(10) < 1)
    >>> pair = {"source": np.array([7, 8]), "target": np.array([5, 2])}
    >>> seen = Seq2SeqSFT().build_example(pair, vocab, np.random.default_rng(0))
    >>> seen["source_tokens"].tolist(), seen["tokens"].tolist(), seen["labels"].tolist()
    ([7, 8], [0, 5], [5, 2])
    """

    inputs = frozenset({"source", "target"})
    attention = "seq2seq"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return attention_fields.seq2seq(example["source"], example["target"], vocab.start)
