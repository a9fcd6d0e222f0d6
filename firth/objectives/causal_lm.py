"""Left-to-right language modeling: causal, prefix and bidirectional (ELMo).

Causal language modeling: p(w_t | w_<t), the objective of GPT (Radford 2018, section 3.1).

Prefix language modeling: bidirectional attention in a prefix, predict the rest (Liu 2018; Raffel 2020, section 3.2.1).

    Thank you for inviting me to your party last week .
    shown       Thank you for inviting                        every token of it sees every other
    predicted   me to your party last week .                  each word from all before it

With a prefix of one token this is causal language modeling. A decoder with `causal` off does it in one row; an
encoder-decoder gets the prefix as the encoder's input, ended by the stop token, as T5's inputs are.

Bidirectional language model of ELMo: one left to right, one right to left (Peters 2018, section 3.1).

The two share the embedding and the softmax and nothing else: the state of one has seen only the tokens before a token, that
of the other only those after it. (One bidirectional network could not be trained so: its second layer would see the token
to predict through the other direction.)

    the  cat  sat        forward labels   cat  sat   -         backward labels   -  the  cat

Difference from the original: a full softmax instead of a sampled one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from firth.data import attention_fields
from firth.data.attention_fields import Seq2SeqLayout
from firth.fields import Share
from firth.model import flops
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import Objective, TokenObjective, token_loss
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs, UserError


@dataclass(frozen=True)
class CausalLM(TokenObjective):
    """Predict every next token from those before it.

    Shown: all tokens but the last. Predicted: the next token, at every position; not across documents of a row.
    Loss: -sum over t of log p(w_t | w_<t).

    >>> from firth.tokenizer.vocab import Vocab
    >>> vocab = Vocab(size=10, roles={"pad": 0}, special=np.arange(10) < 1)
    >>> seen = CausalLM().build_example({"tokens": np.array([5, 6, 7, 8])}, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["labels"].tolist(), seen["query_time"].tolist()
    ([5, 6, 7], [6, 7, 8], [0, 1, 2])
    """

    attention = "causal"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        shown = (
            {"tokens": tokens[:-1], "labels": tokens[1:]}
            | attention_fields.causal(len(tokens) - 1)
            | attention_fields.memory_fields(example)
        )
        if "document_ids" in example:
            document = example["document_ids"]
            # The last token of a document does not predict the first of the next one.
            labels = np.where(document[1:] == document[:-1], shown["labels"], IGNORE)
            shown |= {"document_ids": document[:-1], "labels": labels}
        return shown

    def hide(self, pieces: Sequence[np.ndarray], vocab: Vocab, answer: int | None = None) -> Example | None:
        """The tokens after the gap cannot be shown."""
        if answer is None:
            return None
        bos = [vocab.roles["bos"]] if "bos" in vocab.roles else []
        shown = np.concatenate((bos, pieces[0])).astype(pieces[0].dtype)
        labels = np.full(len(shown), IGNORE)
        labels[-1] = answer
        return {"tokens": shown, "labels": labels} | attention_fields.causal(len(shown))


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


@dataclass(frozen=True)
class BiLM(Objective):
    """Predict the next token from those before it and the previous token from those after it.

    Shown: the whole text. Predicted: the next token ("next") by one half of the state, the previous one ("previous") by the
    other. Loss: sum of -log p(w_t | w_<t) and -log p(w_t | w_>t). Example: {"tokens"}, and "document_ids" for several texts.

    >>> vocab = Vocab(size=10, roles={}, special=np.zeros(10, bool))
    >>> seen = BiLM().build_example({"tokens": np.array([5, 6, 7])}, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["next"].tolist(), seen["previous"].tolist()
    ([5, 6, 7], [6, 7, -100], [-100, 5, 6])
    """

    labels = {"forward": "next", "backward": "previous"}

    attention = "bidirectional_separate"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"lm": LMHead(direction_config(config))}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        after, before = np.full(len(tokens), IGNORE), np.full(len(tokens), IGNORE)
        after[:-1], before[1:] = tokens[1:], tokens[:-1]
        if "document_ids" in example:
            border = np.diff(example["document_ids"]) != 0
            after[:-1][border] = before[1:][border] = IGNORE
        return example | {"next": after, "previous": before}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        ahead, back = outputs["hidden"].chunk(2, -1)  # (..., T, hidden_size / 2) each
        return {
            "forward": token_loss(model, ahead, batch["next"]),
            "backward": token_loss(model, back, batch["previous"]),
        }

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        count = flops.supervised_positions(batch["next"]) + flops.supervised_positions(batch["previous"])
        return super().flops(model, batch, forward) + flops.head_flops(direction_config(model.config), count)


def direction_config(config: ModelConfig) -> ModelConfig:
    """Return the config of one of the two directions, for the shared LM head."""
    return config.with_fields(
        {"hidden_size": config.embedding_dim, "head_dim": 0, "rnn.separate_directions": False, "causal": True}
    )
