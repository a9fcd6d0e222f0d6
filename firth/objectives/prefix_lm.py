"""Prefix language modelling: read the first part both ways, write the rest (Liu 2018; Raffel 2020, section 3.2.1).

    Thank you for inviting me to your party last week .
    shown    Thank you for inviting                           every token of it sees every other
    asked    me to your party last week .                     each word from all that stands before it

With a prefix of one token this is causal language modelling. A decoder of which all may be read (`causal` off) does it
in one row; an encoder-decoder gets the first part for its encoder, ended by the stop token, as T5's sources are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from firth.data import layout
from firth.data.layout import Seq2SeqLayout
from firth.model.config import AttentionPattern
from firth.objectives.objective import TokenObjective
from firth.tokenizer.vocab import Vocab
from firth.types import Example, UserError
from firth.validated import Share


@dataclass(frozen=True)
class PrefixLM(TokenObjective):
    """Write the rest of {"tokens"}, a bare text of two tokens or more.

    least, most: the prefix is a share of the text drawn uniformly between these, one token at least and all but one at
    most. 0 and 1: any cut is as likely as any other; 0 and 0: one token; 0.5 and 0.5: the first half. layout: "prefix" is
    one row; "seq2seq" gives the prefix to an encoder.

    >>> vocab = Vocab(size=10, roles={"pad": 0, "eos": 1}, special=np.arange(10) < 2)
    >>> text, rng = {"tokens": np.array([5, 6, 7, 8, 9])}, np.random.default_rng(1)
    >>> seen = PrefixLM().build_example(text, vocab, rng)
    >>> for name in ("tokens", "labels", "query_time"): print(name, seen[name].tolist())
    tokens [5, 6, 7, 8]
    labels [-100, -100, 8, 9]
    looks [0, 0, 0, 1]
    >>> seen = PrefixLM(min_prefix=0.5, max_prefix=0.5, layout="seq2seq").build_example(text, vocab, rng)
    >>> for name in ("source_tokens", "tokens", "labels"): print(name, seen[name].tolist())
    source_tokens [5, 6, 7, 1]
    tokens [0, 8]
    labels [8, 9]
    """

    min_prefix: Share = 0.0
    max_prefix: Share = 1.0
    layout: Seq2SeqLayout = "prefix"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.min_prefix > self.max_prefix:
            raise UserError(
                f"prefix_lm: least={self.min_prefix} is more than most={self.max_prefix}: make it at most that"
            )

    def attention_pattern(self) -> AttentionPattern:
        return "seq2seq" if self.layout == "seq2seq" else "prefix"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        if len(tokens) < 2:
            raise UserError("prefix_lm needs texts of two tokens or more: set examples.min_length=2")
        share = self.min_prefix + (self.max_prefix - self.min_prefix) * rng.random()
        return self._show(tokens, min(1 + int(share * (len(tokens) - 1)), len(tokens) - 1), vocab)

    def hide(self, tokens: np.ndarray, at: int, vocab: Vocab) -> Example:
        """The prefix ends where the token begins: what stands behind it cannot be shown."""
        return self._show(tokens[: at + 1], at, vocab)

    def _show(self, tokens: np.ndarray, cut: int, vocab: Vocab) -> Example:
        source = tokens[:cut] if self.layout == "prefix" else np.append(tokens[:cut], vocab.eos)
        return layout.layout_of(self.layout, source, tokens[cut:], vocab)
