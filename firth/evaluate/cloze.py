"""One token of a text is hidden, and a model says which it was (the cloze test, Taylor 1953).

Each objective has it asked in its own way (`Objective.cloze`), of the same tokens in the same texts: a masked model reads
on both sides of the gap, a causal one only what stands before it, an encoder-decoder writes behind a sentinel. So the
score says what a model can do with what its objective lets it see; an objective that asks for no token has none.

    asked = items(store, count=512)
    score(model, MLM(), asked, vocab)          {"accuracy": 0.31, "bits": 5.2}
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F

from firth.data.collate import collate
from firth.data.token_store import TokenStore
from firth.data.windows import DocumentChunks
from firth.evaluate.perplexity import groups
from firth.generate.decoding import attention_pattern_of
from firth.model.model import LM
from firth.objectives.objective import Objective, num_correct, supervised
from firth.tokenizer.vocab import Vocab


@dataclass(frozen=True, eq=False)
class ClozeItem:
    """A bare text (n,), and the place of the token that is hidden."""

    tokens: np.ndarray
    at: int


def items(store: TokenStore, vocab: Vocab, count: int, length: int = 64, seed: int = 0) -> list[ClozeItem]:
    """At most `count` texts of at most `length` tokens, spread over the store, a token of their middle half hidden.

    Texts of fewer than eight tokens, and places where a special token stands, are left out.
    """
    pieces = DocumentChunks(store, length)
    rng = np.random.default_rng(seed)
    found = []
    for i in np.unique(np.linspace(0, len(pieces) - 1, count).round().astype(int)) if len(pieces) else ():
        tokens = np.array(pieces[int(i)]["tokens"])
        at = int(rng.integers(len(tokens) // 4, max(1, 3 * len(tokens) // 4)))
        if len(tokens) >= 8 and not vocab.special[tokens[at]]:
            found.append(ClozeItem(tokens, at))
    return found


def most_frequent_baseline(store: TokenStore, asked_of: Sequence[ClozeItem]) -> float:
    """What the token that is commonest in a store would get, said every time."""
    always = int(np.bincount(store.tokens).argmax())
    return float(np.mean([item.tokens[item.at] == always for item in asked_of])) if asked_of else 0.0


def score(model: LM, objective: Objective, asked_of: Sequence[ClozeItem], vocab: Vocab) -> dict[str, float]:
    """accuracy: share of items whose token is the likeliest. bits: mean -log2 of its probability.

    Empty where the objective asks for no token, or there is no item.
    """
    vocab = vocab.with_decoder_start(model.config.decoder_start_token)
    shown = [objective.hide(item.tokens, item.at, vocab) for item in asked_of]
    examples = [example for example in shown if example is not None]
    if not examples:
        return {}
    device = model.tokens.weight.device
    right = nats = 0.0
    with attention_pattern_of(model):
        for group in groups(examples, room=8192):
            batch = {name: field.to(device) for name, field in collate(group).items()}
            states, labels = supervised(objective.forward(model, batch)["hidden"], batch["labels"])
            logits = model.heads["lm"](states).float()  # (N, V)
            right += float(num_correct(logits, labels))
            nats += float(F.cross_entropy(logits, labels, reduction="sum"))
    return {"accuracy": right / len(examples), "bits": nats / len(examples) / math.log(2)}
