"""Prefix language modeling: bidirectional attention in a prefix, predict the rest (Liu 2018; Raffel 2020, section 3.2.1).

    Thank you for inviting me to your party last week .
    shown       Thank you for inviting                        every token of it sees every other
    predicted   me to your party last week .                  each word from all before it

With a prefix of one token this is causal language modeling. A decoder with `causal` off does it in one row; an
encoder-decoder gets the prefix as the encoder's input, ended by the stop token, as T5's inputs are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from firth.data import attention_fields
from firth.data.attention_fields import Seq2SeqLayout
from firth.fields import Share
from firth.model.config import AttentionPattern
from firth.objectives.objective import TokenObjective
from firth.tokenizer.vocab import Vocab
from firth.types import Example, UserError


@dataclass(frozen=True)
class PrefixLM(TokenObjective):
    """Predict the rest of a text from its prefix: {"tokens"}, two or more, without special tokens.

    Shown: the prefix w_<=c, all of it visible to itself. Predicted: the tokens after it. Loss: -sum over t > c of
    log p(w_t | w_<t). The length of the prefix is a share of the text, drawn uniformly from [min_prefix, max_prefix], with at
    least one token on either side: 0 and 1 make every split equally likely, 0 and 0 a prefix of one token.

    Args:
        min_prefix: Smallest share of the text.
        max_prefix: Largest share of the text.
        layout: "prefix" is one row; "seq2seq" gives the prefix to an encoder.

    >>> vocab = Vocab(size=10, roles={"pad": 0, "eos": 1}, special=np.arange(10) < 2)
    >>> text, rng = {"tokens": np.array([5, 6, 7, 8, 9])}, np.random.default_rng(1)
    >>> seen = PrefixLM().build_example(text, vocab, rng)
    >>> for name in ("tokens", "labels", "query_time"): print(name, seen[name].tolist())
    tokens [5, 6, 7, 8]
    labels [-100, -100, 8, 9]
    query_time [0, 0, 0, 1]
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
                f"prefix_lm: min_prefix={self.min_prefix} is larger than max_prefix={self.max_prefix}: lower min_prefix"
            )

    @property
    def attention(self) -> AttentionPattern:
        return "seq2seq" if self.layout == "seq2seq" else "prefix"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        if len(tokens) < 2:
            raise UserError("prefix_lm needs texts of two tokens or more: set examples.min_length=2")
        share = self.min_prefix + (self.max_prefix - self.min_prefix) * rng.random()
        return self._split(tokens, min(1 + int(share * (len(tokens) - 1)), len(tokens) - 1), vocab)

    def hide(self, pieces: Sequence[np.ndarray], vocab: Vocab, answer: int | None = None) -> Example | None:
        """The prefix ends before the gap; the tokens after it cannot be shown."""
        if answer is None:
            return None
        return self._split(np.append(pieces[0], answer), len(pieces[0]), vocab)

    def _split(self, tokens: np.ndarray, at: int, vocab: Vocab) -> Example:
        source = tokens[:at] if self.layout == "prefix" else np.append(tokens[:at], vocab.eos)
        return attention_fields.layout_of(self.layout, source, tokens[at:], vocab)
