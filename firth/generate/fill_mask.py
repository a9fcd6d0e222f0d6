"""What a masked model answers: candidates for the masks of a text.

`fill` reads "The <mask> sat on the mat." and returns the likeliest tokens for each mask, each mask given all that is
written and none of the other masks' answers. (What a masked model says of a whole text is `firth.evaluate.perplexity`.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from firth.generate.decoding import attention_pattern_of, rectangle
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import NEVER, UserError


@dataclass(frozen=True)
class Candidate:
    """One way to fill a mask: the token, its piece as the tokenizer spells it, and its probability."""

    token: int
    piece: str
    probability: float


def masked(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Token ids of a text in which the mask token is written out: (n,), framed as an encoder reads them.

    The space before a mask belongs to the word that the mask hides, for a tokenizer whose pieces begin with it.
    Raises UserError where there is no mask in the text.
    """
    vocab = tokenizer.vocab
    mark = tokenizer.token(vocab.mask)
    parts = text.split(mark)
    if len(parts) == 1:
        raise UserError(f"there is nothing to fill: write {mark} where a token is missing")
    row = [tokenizer.encode(parts[-1])]
    for part in reversed(parts[:-1]):
        row = [tokenizer.encode(part.removesuffix(" ")), np.array([vocab.mask]), *row]
    return vocab.add_special_tokens(np.concatenate(row).astype(np.int64))


def fill(model: LM, tokenizer: Tokenizer, text: str, k: int = 5) -> list[list[Candidate]]:
    """The k likeliest tokens for each mask of a text, likeliest first; no special token is offered.

    Raises UserError for a text without a mask, or longer than the model's context, and for a model without words.
    """
    if not model.has_lm_head:
        raise UserError(
            f"no vocabulary head reads this model's states, so it fills no gaps; it has {list(model.heads)}"
        )
    tokens = masked(tokenizer, text)
    if len(tokens) > model.context:
        raise UserError(f"the text has {len(tokens)} tokens and this model reads at most {model.context}: shorten it")
    if model.config.causal:
        raise UserError(
            "this model reads from left to right, so it fills no gaps: have it go on from a text (generate)"
        )
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    device = model.tokens.weight.device
    with attention_pattern_of(model):
        batch = rectangle([tokens], device, causal=False)
        if model.config.mask_embedding:  # what is asked is seen by nobody, as in training
            batch["key_time"] = batch["key_time"].masked_fill(batch["tokens"] == tokenizer.vocab.mask, NEVER)
        hidden = model(batch)[0]
        at = torch.from_numpy(np.flatnonzero(tokens == tokenizer.vocab.mask)).to(device)
        share = head(hidden[at]).float().softmax(-1)  # (masks, V)
        share[:, np.flatnonzero(tokenizer.vocab.special)] = 0.0
        best = share.topk(min(k, len(tokenizer.vocab.ordinary)), -1)
    return [
        [Candidate(i, tokenizer.token(i), p) for i, p in zip(index, probability, strict=True)]
        for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
