"""Mask filling with a masked language model.

`fill` takes "The <mask> sat on the mat." and returns the most likely tokens for each mask. Each mask is predicted from the
text alone, independently of the other masks' answers. (`firth.evaluate.perplexity` scores whole texts.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from firth.generate.decoding_batch import inference_mode, rectangle
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import NEVER, UserError


@dataclass(frozen=True)
class Candidate:
    """One way to fill a mask.

    Args:
        token: The token id.
        piece: The token as the vocabulary spells it.
        probability: Its probability.
    """

    token: int
    piece: str
    probability: float


def masked(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """Return the token ids (n,) of a text that contains mask tokens, with special tokens added.

    A space before a mask is dropped: in many tokenizers it is part of the masked word.

    Raises:
        UserError: The text has no mask.
    """
    vocab = tokenizer.vocab
    mask = tokenizer.token(vocab.mask)
    pieces = text.split(mask)
    if len(pieces) == 1:
        raise UserError(f"there is nothing to fill: write {mask} where a token is missing")
    row = [tokenizer.encode(pieces[-1])]
    for piece in reversed(pieces[:-1]):
        row = [tokenizer.encode(piece.removesuffix(" ")), np.array([vocab.mask]), *row]
    return vocab.add_special_tokens(np.concatenate(row).astype(np.int64))


def fill(model: LM, tokenizer: Tokenizer, text: str, k: int = 5) -> list[list[Candidate]]:
    """Return the k most likely tokens for each mask of a text, most likely first, special tokens excluded.

    Raises:
        UserError: The text has no mask or is longer than the context, or the model is causal or has no LM head.
    """
    if not model.has_lm_head:
        raise UserError(f"this model has no LM head, so it cannot fill masks; its heads are {list(model.heads)}")
    tokens = masked(tokenizer, text)
    if len(tokens) > model.context:
        raise UserError(f"the text has {len(tokens)} tokens and this model reads at most {model.context}: shorten it")
    if model.config.causal:
        raise UserError("this model is causal, so it cannot fill masks: use `firth generate` to continue a text")
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    device = model.tokens.weight.device
    with inference_mode(model):
        batch = rectangle([tokens], device, causal=False)
        if model.config.embedding.mask:  # no position attends to a mask, as in training
            batch["key_time"] = batch["key_time"].masked_fill(batch["tokens"] == tokenizer.vocab.mask, NEVER)
        hidden = model(batch)[0]
        masks = torch.from_numpy(np.flatnonzero(tokens == tokenizer.vocab.mask)).to(device)
        probabilities = head(hidden[masks]).float().softmax(-1)  # (masks, vocab)
        probabilities[:, np.flatnonzero(tokenizer.vocab.special)] = 0.0
        best = probabilities.topk(min(k, len(tokenizer.vocab.ordinary)), -1)
    return [
        [Candidate(i, tokenizer.token(i), p) for i, p in zip(index, probability, strict=True)]
        for index, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
