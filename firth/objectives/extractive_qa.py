"""Extractive question answering: the first and the last token of the answer, in a passage (BERT, Devlin 2019, 4.2, 4.3).

    [CLS] who wrote it ? [SEP] the play was written by Anne Lee in 1901 . [SEP]
                                                      start end

Each token has a chance of being the first and one of being the last, a softmax over the row each; the loss is the mean of
the two. A passage without the answer (SQuAD 2.0, or a window of a long one) has both at [CLS], at a decoder's last token.
The softmax is over the tokens of one document, so rows may be packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from firth.data import layout
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.model import LM
from firth.objectives.classification import READOUTS, classification_head, readout_of
from firth.objectives.objective import DataStats, Objective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Batch, Example, Outputs

UNSEEN = -1e30
"""The score of padding: finite, so that rows of nothing else give no NaN."""


@dataclass(frozen=True)
class QuestionAnswering(Objective):
    """Where the answer begins and ends: {"tokens", "token_type_ids", "start", "end"}, places of tokens; -1 where it is not.

    at: which token says that the answer is not there: the "first" of an encoder, the "last" of a decoder. unanswerable:
    whether a question may have no answer at all, so that a reader of the scores may say so (None: as in the data).

    >>> vocab = Vocab(size=9, roles={"pad": 0}, special=np.arange(9) < 1)
    >>> example = {"tokens": np.array([1, 5, 2, 6, 7, 2]), "start": 3, "end": 4}
    >>> seen = QuestionAnswering().build_example(example, vocab, np.random.default_rng(0))
    >>> seen["starts"].tolist(), seen["ends"].tolist()
    ([-100, -100, -100, 1, -100, -100], [-100, -100, -100, -100, 1, -100])
    """

    labels: ClassVar[dict[str, str]] = {"span": "starts"}
    metrics: ClassVar[dict[str, str]] = {"accuracy": "ends"}

    position: Literal["auto", "first", "last"] = "auto"
    has_unanswerable: bool | None = None

    def with_stats(self, stats: Callable[[], DataStats]) -> Objective:
        if self.has_unanswerable is not None:
            return self
        return dataclasses.replace(self, has_unanswerable=stats().has_unanswerable)

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset({"tokens", "start", "end"})

    def attention_pattern(self) -> AttentionPattern:
        return READOUTS[self.position]

    @property
    def place(self) -> Literal["first", "last"]:
        """Which token says so; the first while no shape is known."""
        return "last" if self.position == "last" else "first"

    def for_model(self, config: ModelConfig) -> Objective:
        if self.position != "auto":
            return self
        return dataclasses.replace(self, position="last" if readout_of(config) == "last" else "first")

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"span": classification_head(config.hidden_size, 2)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        shown = {name: example[name] for name in ("tokens", "token_type_ids") if name in example}
        n = len(shown["tokens"])
        nowhere = n - 1 if self.position == "last" else 0
        order = layout.causal(n) if self.position == "last" else {}
        return shown | {f"{end}s": _told(n, example[end], nowhere) for end in ("start", "end")} | order

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        scores = model.heads["span"](outputs["hidden"]).float()  # (B, T, 2)
        text = texts(batch)
        loss, right = torch.zeros((), device=scores.device), torch.ones((), dtype=torch.bool, device=scores.device)
        for side, field in enumerate(("starts", "ends")):
            each = scores[..., side].flatten().masked_fill(text < 0, UNSEEN)
            whole = torch.where(text < 0, 0, text)
            most = (
                each.detach().new_full((int(whole.max()) + 1,), UNSEEN).scatter_reduce(0, whole, each.detach(), "amax")
            )
            total = torch.zeros_like(most).index_add(0, whole, (each - most[whole]).exp() * (text >= 0))
            at = (batch[field].flatten() != IGNORE).nonzero()[:, 0]
            loss = loss + (most[whole[at]] + total[whole[at]].log() - each[at]).sum()
            right = right & (each[at] >= most[whole[at]])
        return {"span": loss / 2, "accuracy": right.sum().float()}


def _told(n: int, place: int, nowhere: int) -> np.ndarray:
    """1 at a place, or nowhere: (n,), IGNORE elsewhere."""
    out = np.full(n, IGNORE)
    out[nowhere if place < 0 else place] = 1
    return out


def texts(batch: Batch) -> Tensor:
    """Which text each token is of, as one number over all rows: (B * T,) int64; -1 for padding."""
    tokens = batch["tokens"]
    row = torch.arange(tokens.shape[0], device=tokens.device)[:, None].expand_as(tokens)
    document = batch.get("document_ids")
    number = row if document is None else row * (int(document.max()) + 1) + document
    appears = batch.get("key_time")
    return (number if appears is None else number.masked_fill(appears == NEVER, -1)).flatten()
