"""Causal language modeling: p(w_t | w_<t), the objective of GPT (Radford 2018, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from firth.data import attention_fields
from firth.objectives.objective import TokenObjective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Example


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
