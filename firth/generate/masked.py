"""What a masked model answers: candidates for the masks of a text, and a score for a whole one.

`fill` reads "The <mask> sat on the mat." and returns, for each mask, the likeliest tokens. `pseudo` hides every asked
token in turn and adds up what the others say of it (pseudo-log-likelihood; Salazar 2020): the nearest a masked model
has to the probability of a text, and comparable between texts of one model only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from firth.generate.answer import Coder
from firth.generate.rows import reading, rectangle
from firth.model.heads import Vocabulary
from firth.model.lm import LM
from firth.types import UserError


@dataclass(frozen=True)
class Candidate:
    """One way to fill a mask: the token, its piece as the tokenizer spells it, and its probability."""

    token: int
    piece: str
    probability: float


def masked(coder: Coder, text: str) -> np.ndarray:
    """Token ids of a text in which the mask token is written out: (n,), framed as an encoder reads them.

    The space before a mask belongs to the word that the mask hides, for a tokenizer whose pieces begin with it.
    Raises UserError where there is no mask in the text.
    """
    vocab = coder.vocab
    mark = coder.token(vocab.mask)
    parts = text.split(mark)
    if len(parts) == 1:
        raise UserError(f"there is nothing to fill: write {mark} where a token is missing")
    ids = [np.asarray(coder.encode(part.removesuffix(" ")), np.int64) for part in parts[:-1]]
    row: list[np.ndarray] = []
    for part in [*ids, np.asarray(coder.encode(parts[-1]), np.int64)]:
        row += [np.array([vocab.mask]), part] if row else [part]
    return vocab.frame(np.concatenate(row))


def fill(model: LM, coder: Coder, text: str, k: int = 5) -> list[list[Candidate]]:
    """The k likeliest tokens for each mask of a text, likeliest first; no special token is offered.

    Raises UserError for a text without a mask, or longer than the model's context.
    """
    tokens = masked(coder, text)
    if len(tokens) > model.shape.context:
        raise UserError(
            f"the text has {len(tokens)} tokens and this model reads at most {model.shape.context}: shorten it"
        )
    head: Vocabulary = model.parts["lm"]  # type: ignore[assignment]
    device = model.tokens.weight.device
    with reading(model):
        hidden = model(rectangle([tokens], device, causal=False))[0]
        at = torch.from_numpy(np.flatnonzero(tokens == coder.vocab.mask)).to(device)
        share = head(hidden[at]).float().softmax(-1)  # (masks, V)
        best = share.masked_fill(torch.from_numpy(coder.vocab.special).to(device), 0.0).topk(min(k, coder.vocab.size), -1)
    return [
        [Candidate(i, coder.token(i), p) for i, p in zip(index, probability, strict=True)]
        for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def pseudo(
    model: LM, coder: Coder, texts: Sequence[np.ndarray], asked: Sequence[np.ndarray], rows: int = 64
) -> list[float]:
    """The sum over asked tokens of log p(token | all others), in nats, for each text.

    texts: token ids (n,), unframed. asked: (n,) bool each. rows: how many masked copies are read together.
    """
    vocab, device = coder.vocab, model.tokens.weight.device
    copies: list[tuple[int, int, np.ndarray]] = []
    for i, (text, ask) in enumerate(zip(texts, asked, strict=True)):
        for at in np.flatnonzero(ask):
            hidden = np.array(text, np.int64)
            hidden[at] = vocab.mask
            copies.append((i, int(at), vocab.frame(hidden)))
    copies.sort(key=lambda copy: -len(copy[2]))
    scores = np.zeros(len(texts))
    head: Vocabulary = model.parts["lm"]  # type: ignore[assignment]
    with reading(model):
        for first in range(0, len(copies), rows):
            batch = copies[first : first + rows]
            states = model(rectangle([row for _, _, row in batch], device, causal=False))
            # The frame puts one token before the text, so that token `at` stands at at + 1.
            places = torch.tensor([at + 1 for _, at, _ in batch], device=device)
            labels = torch.tensor([int(texts[i][at]) for i, at, _ in batch], device=device)
            log_p = head.log_probs(states[torch.arange(len(batch), device=device), places], labels)
            np.add.at(scores, [i for i, _, _ in batch], log_p.cpu().numpy())
    return [float(x) for x in scores]
