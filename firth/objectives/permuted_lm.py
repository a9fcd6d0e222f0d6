"""Permuted language modeling of XLNet and MPNet.

Permuted language modeling: predict a text's tokens in a random order (XLNet, Yang 2019, section 2).

Over all orders z of a text, maximize E[sum over t of log p(x[z_t] | x[z_<t])]: every token learns from both sides, and each is
still predicted from those before it in the order, as in a causal LM. Only the last 1 / K of an order is predicted
(section 2.3); the rest is context, which sees all of itself, as in XLNet's code.

    the quick brown fox jumps    order: quick, jumps last
    predicted   quick | the _ brown fox _        jumps | the quick brown fox _

Two streams: a token's own state may know the token, the state that predicts it must not. Both are in one row here: the text,
and after it one query for each predicted token, at that token's position, which no other token sees
(`firth.data.attention_fields.permuted`). A query is shown as [MASK], or as a learned vector with
`model.embedding.mask` (the paper's w).

With the order of the text and K = 1 this is causal language modeling: the same factors, and the text's own states are those
of `CausalLM` to the bit. The query remains: CausalLM predicts from the previous token's state, which in this objective would
not know the position of the target.

Masked and permuted language modeling: predict in a random order, with the position of every token known (MPNet, Song 2020).

A masked LM predicts each masked token as if it did not know the others; a permuted LM does not know how long the text is,
nor where its gaps are. MPNet predicts one token after the other and shows a [MASK] at each position not yet predicted:

    the quick brown fox jumps    order: quick, jumps
    MLM     quick | the [M] brown fox [M]     jumps | the [M]   brown fox [M]
    PLM     quick | the  _  brown fox  _      jumps | the quick brown fox  _
    MPNet   quick | the [M] brown fox [M]     jumps | the quick brown fox [M]

So every query sees each position once ("position compensation", section 2.2). In one row: the text, a placeholder for each
masked token that disappears when the token appears, and the queries (`firth.data.attention_fields.permuted`). The first token of every
order is predicted exactly as by MLM; without the placeholders the objective is PLM. As in MPNet's code, a placeholder and
its query are shown alike, in BERT's three shares: 80% [MASK], 10% a random token, 10% the token itself. Of the paper's
choices, whole words are `noise="words"`; its code draws an exact number of words, which "words" does on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from firth.data import attention_fields
from firth.data.noise import NOISES, Kind, apply_mask_tokens, text_units
from firth.fields import OpenShare, PositiveInt, Share
from firth.objectives.objective import TokenObjective
from firth.tokenizer.vocab import Vocab
from firth.types import Constraints, Example, UserError


@dataclass(frozen=True)
class PLM(TokenObjective):
    """Predict one token in `k`, in a random order, each from the context and those predicted before it.

    Shown: the context, and one query per predicted token at its position. Predicted: the last 1 / k tokens of the order z.
    Loss: -sum over those t of log p(x[z_t] | x[z_<t]). Special tokens are context.

    Args:
        k: The paper's K.
        noise: Which tokens are predicted (`firth.data.noise`): "count" is the last 1 / K of a random order, "contexts"
            XLNet's span-based choice.
        order: "random", or "identity" for the order of the text.

    >>> vocab = Vocab(size=10, roles={"mask": 1}, special=np.arange(10) < 2)
    >>> seen = PLM(k=3).build_example({"tokens": np.array([4, 5, 6, 7, 8, 9])}, vocab, np.random.default_rng(0))
    >>> for name in ("tokens", "positions", "labels"): print(name, seen[name].tolist())
    tokens [4, 5, 6, 7, 8, 9, 1, 1]
    positions [0, 1, 2, 3, 4, 5, 3, 2]
    labels [-100, -100, -100, -100, -100, -100, 7, 6]
    """

    k: PositiveInt = 6
    noise: Kind = "count"
    order: Literal["random", "identity"] = "random"

    @property
    def constraints(self) -> Constraints:
        return Constraints(text_units=text_units(self.noise))

    attention = "permuted"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        predicted = np.flatnonzero(NOISES[self.noise](tokens, vocab, 1 / self.k, rng))
        order = rng.permutation(predicted) if self.order == "random" else predicted
        return attention_fields.permuted(example, order, np.full(len(order), vocab.mask, tokens.dtype))

    def hide(self, pieces: Sequence[np.ndarray], vocab: Vocab, answer: int | None = None) -> Example | None:
        if answer is None:
            return None
        text = {"tokens": np.concatenate((pieces[0], [answer], pieces[1]))}
        return attention_fields.permuted(text, np.array([len(pieces[0])]), np.array([vocab.mask], pieces[0].dtype))


@dataclass(frozen=True)
class MPNet(TokenObjective):
    """Predict masked tokens in a random order, each with all positions of the text known.

    Shown: the unmasked tokens, the masked ones already predicted, and a placeholder at each position not yet predicted.
    Predicted: the masked tokens z_1 .. z_m. Loss: -sum over t of log p(x[z_t] | x[z_<t], placeholders at z_>=t).
    Special tokens are context.

    Args:
        mlm_probability: Share of the tokens that is predicted.
        noise: How they are selected (`firth.data.noise`).
        mask_fraction: Share of the placeholders that is [MASK].
        random_fraction: Share of the placeholders that is a random token; the rest is the token itself.

    >>> vocab = Vocab(size=10, roles={"mask": 1}, special=np.arange(10) < 2)
    >>> objective = MPNet(mlm_probability=0.5, mask_fraction=1.0, random_fraction=0.0)
    >>> seen = objective.build_example({"tokens": np.array([5, 6, 7, 8])}, vocab, np.random.default_rng(0))
    >>> for name in ("tokens", "positions", "labels"): print(name, seen[name].tolist())
    tokens [5, 6, 7, 8, 1, 1, 1, 1]
    positions [0, 1, 2, 3, 0, 2, 0, 2]
    labels [-100, -100, -100, -100, -100, -100, 5, 7]
    """

    mlm_probability: OpenShare = 0.15
    noise: Kind = "count"
    mask_fraction: Share = 0.8
    random_fraction: Share = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_fraction + self.random_fraction > 1:
            raise UserError(
                f"mpnet: mask_fraction={self.mask_fraction} and random_fraction={self.random_fraction} add up to more than 1: "
                "they are shares of the same tokens"
            )

    @property
    def constraints(self) -> Constraints:
        return Constraints(text_units=text_units(self.noise))

    attention = "permuted"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        order = rng.permutation(np.flatnonzero(NOISES[self.noise](tokens, vocab, self.mlm_probability, rng)))
        placeholders = apply_mask_tokens(
            tokens[order], vocab, self.mask_fraction, self.random_fraction, rng.random(len(order)), rng
        )
        return attention_fields.permuted(example, order, placeholders, compensated=True)

    def hide(self, pieces: Sequence[np.ndarray], vocab: Vocab, answer: int | None = None) -> Example | None:
        if answer is None:
            return None
        text = {"tokens": vocab.add_special_tokens(np.concatenate((pieces[0], [answer], pieces[1])))}
        at, mask = np.array([len(pieces[0]) + 1]), np.array([vocab.mask], text["tokens"].dtype)
        return attention_fields.permuted(text, at, mask, compensated=True)
