"""Supervised finetuning: learn to write the answer, not the question.

A dialogue is one row of tokens and a mask that is True on what the assistant says *and on the token that ends its
turn* (`firth.tokenizer.chat`): a model that is never asked for the stop token never learns to stop. InstructGPT (Ouyang
2022) and FLAN (Wei 2022) train so; T5 (Raffel 2020, section 2.4) does the same with an encoder for the question.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from firth.data import layout
from firth.model.config import AttentionPattern
from firth.objectives.objective import TokenObjective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Example


def answer(tokens: np.ndarray, mask: np.ndarray) -> Example:
    """Read a row left to right; asked is every next token that the mask covers. tokens, mask: (n,) -> fields (n - 1,).

    >>> seen = answer(np.array([5, 6, 7, 8]), np.array([False, False, True, True]))
    >>> seen["tokens"].tolist(), seen["labels"].tolist()
    ([5, 6, 7], [-100, 7, 8])
    """
    labels = np.where(mask[1:], tokens[1:], IGNORE)
    return {"tokens": tokens[:-1], "labels": labels} | layout.causal(len(tokens) - 1)


@dataclass(frozen=True)
class SFT(TokenObjective):
    """Read the whole dialogue left to right, predict the assistant's tokens: {"tokens", "mask"} of a dialogue.

    >>> vocab = Vocab(size=10, roles={"pad": 0}, special=np.arange(10) < 1)
    >>> dialogue = {"tokens": np.array([5, 6, 7, 2]), "mask": np.array([False, False, True, True])}
    >>> SFT().build_example(dialogue, vocab, np.random.default_rng(0))["labels"].tolist()
    [-100, 7, 2]
    """

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset({"tokens", "mask"})

    def attention_pattern(self) -> AttentionPattern:
        return "causal"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return answer(example["tokens"], example["mask"])


@dataclass(frozen=True)
class Seq2SeqSFT(TokenObjective):
    """The source to the encoder, the target from the decoder: {"source", "target"}, the target with its stop token.

    >>> vocab = Vocab(size=10, roles={"pad": 0}, special=np.arange(10) < 1)
    >>> pair = {"source": np.array([7, 8]), "target": np.array([5, 2])}
    >>> seen = Seq2SeqSFT().build_example(pair, vocab, np.random.default_rng(0))
    >>> seen["source_tokens"].tolist(), seen["tokens"].tolist(), seen["labels"].tolist()
    ([7, 8], [0, 5], [5, 2])
    """

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset({"source", "target"})

    def attention_pattern(self) -> AttentionPattern:
        return "seq2seq"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return layout.seq2seq(example["source"], example["target"], vocab.start)
