"""Cloze score: predict one hidden token of a text (the cloze test, Taylor 1953).

Each objective hides the token in its own way (`Objective.hide`), for the same tokens of the same texts: a masked model
reads both sides of the gap, a causal model only what precedes it, an encoder-decoder writes after a sentinel. The score
measures a model under the context that its objective provides; an objective without token prediction has no score.

    questions = items(store, vocab, count=512)
    score(model, MLM(), questions, vocab)          {"accuracy": 0.31, "bits": 5.2}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F

from firth.data.collate import collate
from firth.data.token_store import TokenStore
from firth.data.windows import ChunksConfig, Documents
from firth.evaluate.perplexity import groups
from firth.generate.decoding_batch import inference_mode
from firth.model.model import LM
from firth.objectives.objective import Objective, num_correct, supervised
from firth.tokenizer.vocab import Vocab


@dataclass(frozen=True, eq=False)
class ClozeItem:
    """One text with a token to hide.

    Args:
        tokens: Ids (n,) without special tokens.
        at: Index of the hidden token.
    """

    tokens: np.ndarray
    at: int

    @property
    def pieces(self) -> tuple[np.ndarray, np.ndarray]:
        """The text before and after the hidden token."""
        return self.tokens[: self.at], self.tokens[self.at + 1 :]

    @property
    def answer(self) -> int:
        """The hidden token."""
        return int(self.tokens[self.at])


def items(store: TokenStore, vocab: Vocab, count: int, length: int = 64, seed: int = 0) -> list[ClozeItem]:
    """Return texts spread evenly over a store, each with a hidden token from its middle half.

    Texts of fewer than eight tokens and positions of special tokens are left out.

    Args:
        store: The tokenized text.
        vocab: Its vocabulary.
        count: Most items.
        length: Most tokens of a text.
        seed: Seed of the hidden positions.
    """
    chunks = Documents(ChunksConfig(max_length=length, add_special_tokens=False), store, vocab)
    rng = np.random.default_rng(seed)
    found = []
    for i in np.unique(np.linspace(0, len(chunks) - 1, count).round().astype(int)) if len(chunks) else ():
        tokens = np.array(chunks[int(i)]["tokens"])
        at = int(rng.integers(len(tokens) // 4, max(1, 3 * len(tokens) // 4)))
        if len(tokens) >= 8 and not vocab.special[tokens[at]]:
            found.append(ClozeItem(tokens, at))
    return found


def most_frequent_baseline(store: TokenStore, questions: Sequence[ClozeItem]) -> float:
    """Return the accuracy of always predicting the most frequent token of a store."""
    most_frequent = int(np.bincount(store.tokens).argmax())
    return float(np.mean([item.tokens[item.at] == most_frequent for item in questions])) if questions else 0.0


def score(model: LM, objective: Objective, questions: Sequence[ClozeItem], vocab: Vocab) -> dict[str, float]:
    """Score the predictions of hidden tokens.

    Args:
        model: The model.
        objective: The objective that it was trained with.
        questions: The texts and their hidden tokens.
        vocab: The vocabulary of the model.

    Returns:
        accuracy: Share of items whose token has the highest probability. bits: Mean -log2 of its probability.
        Empty where the objective predicts no token, or there is no item.
    """
    vocab = vocab.with_decoder_start(model.config.encoder.decoder_start_token)
    hidden = [objective.hide(item.pieces, vocab, item.answer) for item in questions]
    examples = [example for example in hidden if example is not None]
    if not examples:
        return {}
    device = model.tokens.weight.device
    correct = nats = 0.0
    with inference_mode(model):
        for group in groups(examples, max_tokens=8192):
            batch = {name: field.to(device) for name, field in collate(group).items()}
            states, labels = supervised(objective.forward(model, batch)["hidden"], batch["labels"])
            logits = model.heads["lm"](states).float()  # (N, V)
            correct += float(num_correct(logits, labels))
            nats += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {"accuracy": correct / len(examples), "bits": nats / len(examples) / math.log(2)}
