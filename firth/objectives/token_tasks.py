"""Labels of tokens: tags of words and answer spans.

Token classification: predict a class for each word at its first token (BERT, Devlin 2019, section 5.3; Collobert 2011).

tokens   [CLS]  the  fir  ##th  of  [SEP]
tags       -    DT   NN     -   IN    -

Extractive question answering: predict the first and last token of the answer in a passage (BERT, Devlin 2019, 4.2, 4.3).

    [CLS] who wrote it ? [SEP] the play was written by Anne Lee in 1901 . [SEP]
                                                      start end

Start and end are each a softmax over the tokens of the row; the loss is the mean of the two. A passage without the answer
(SQuAD 2.0, or a window of a long one) has both at [CLS], or at the last token for a decoder. The softmax is over the tokens
of one document, so rows may be packed.

A layer mixture gives a task head a weighted sum of all layers, frozen or not, as ELMo is used (Peters 2018, section 3.2).

`LayerMixture() + TokenClassification()` tags from the frozen states of a pretrained model: the task learns its head, one
weight for each layer and a scale, and the model stays unchanged. Lower layers represent more syntax, upper ones more meaning.

>>> (LayerMixture() + TokenClassification()).labels
{'tags': 'tags'}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from firth.data import attention_fields
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.model import LM
from firth.model.variants import ScalarMix
from firth.objectives.classification import READOUTS, classification_head, readout_of
from firth.objectives.objective import (
    Objective,
    cannot_train,
    choice_loss,
    forward_flops,
    hidden_states,
    num_correct,
    supervised,
)
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Batch, Constraints, DataStats, Example, Metric, Outputs


@dataclass(frozen=True)
class TokenClassification(Objective):
    """Predict the tag of each word: {"tokens", "tags"}, a tag at the first token of a word and IGNORE elsewhere.

    Shown: the whole text. Predicted: the tag of each word, at its first token. Loss: -sum over words of
    log softmax(A h + b)[tag].

    Args:
        class_names: Names of the tags.
        causal: Whether the text is read from left to right, as by a decoder (None: as the model does). A tag is then
            predicted from the words before it and its own first token.

    >>> vocab = Vocab(size=9, roles={}, special=np.zeros(9, bool))
    >>> example = {"tokens": np.array([5, 6, 7]), "tags": np.array([1, -100, 0]), "record": 4}
    >>> sorted(TokenClassification(class_names=("NN", "VB")).build_example(example, vocab, np.random.default_rng(0)))
    ['tags', 'tokens']
    """

    labels = {"tags": "tags"}
    metrics = {"accuracy": Metric("tags")}

    class_names: tuple[str, ...] = ()
    causal: bool | None = None

    inputs = frozenset({"tokens", "tags"})

    @property
    def attention(self) -> AttentionPattern:
        return "causal" if self.causal else "any"

    @property
    def constraints(self) -> Constraints:
        return Constraints(class_names=self.class_names)

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Objective:
        return dataclasses.replace(
            self,
            class_names=self.class_names or stats().class_names,
            # A table of word vectors reads each token by itself.
            causal=self.causal
            if self.causal is not None
            else not config.supported_patterns & {"bidirectional", "none"},
        )

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"tags": classification_head(config.hidden_size, len(self.class_names))}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        order = attention_fields.causal(len(example["tokens"])) if self.causal else {}
        return {"tokens": example["tokens"], "tags": example["tags"]} | order

    def forward(self, model: LM, batch: Batch) -> Outputs:
        return {"hidden": hidden_states(model, batch)}  # most tokens have a tag

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        return forward_flops(model, batch) if forward is None else forward

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, targets = supervised(outputs["hidden"], batch["tags"])
        scores = model.heads["tags"](states)  # (N, classes)
        return {"tags": choice_loss(scores, targets), "accuracy": num_correct(scores, targets)}


PADDING_SCORE = -1e30
"""The score of padding: finite, so that rows of padding alone give no NaN."""


@dataclass(frozen=True)
class QuestionAnswering(Objective):
    """Predict where the answer starts and ends: {"tokens", "token_type_ids", "start", "end"}, token indices, -1 without answer.

    Shown: question and passage. Predicted: the first token s and the last token e of the answer. Loss:
    -(log softmax(start scores)[s] + log softmax(end scores)[e]) / 2.

    Args:
        position: The token that means "no answer": "first" for an encoder, "last" for a decoder; "auto" fits the model.
        has_unanswerable: Whether questions may have no answer, so that predictions may be empty (None: as in the data).

    >>> vocab = Vocab(size=9, roles={"pad": 0}, special=np.arange(9) < 1)
    >>> example = {"tokens": np.array([1, 5, 2, 6, 7, 2]), "start": 3, "end": 4}
    >>> seen = QuestionAnswering().build_example(example, vocab, np.random.default_rng(0))
    >>> seen["starts"].tolist(), seen["ends"].tolist()
    ([-100, -100, -100, 1, -100, -100], [-100, -100, -100, -100, 1, -100])
    """

    labels = {"span": "starts"}
    metrics = {"accuracy": Metric("ends")}

    position: Literal["auto", "first", "last"] = "auto"
    has_unanswerable: bool | None = None

    inputs = frozenset({"tokens", "start", "end"})

    @property
    def attention(self) -> AttentionPattern:
        return READOUTS[self.position]

    @property
    def readout(self) -> Literal["first", "last"]:
        """The token that means "no answer"; the first while no model config is known."""
        return "last" if self.position == "last" else "first"

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Objective:
        position: Literal["first", "last"] = "last" if readout_of(config) == "last" else "first"
        return dataclasses.replace(
            self,
            position=position if self.position == "auto" else self.position,
            has_unanswerable=stats().has_unanswerable if self.has_unanswerable is None else self.has_unanswerable,
        )

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"span": classification_head(config.hidden_size, 2)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        shown = {name: example[name] for name in ("tokens", "token_type_ids") if name in example}
        n = len(shown["tokens"])
        no_answer = n - 1 if self.position == "last" else 0
        order = attention_fields.causal(n) if self.position == "last" else {}
        return shown | {f"{end}s": _one_hot_label(n, example[end], no_answer) for end in ("start", "end")} | order

    def forward(self, model: LM, batch: Batch) -> Outputs:
        return {"hidden": hidden_states(model, batch)}  # the softmax is over all tokens

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        return forward_flops(model, batch) if forward is None else forward

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        scores = model.heads["span"](outputs["hidden"]).float()  # (B, T, 2)
        text = text_ids(batch)
        loss, correct = torch.zeros((), device=scores.device), torch.ones((), dtype=torch.bool, device=scores.device)
        for side, field in enumerate(("starts", "ends")):
            token_scores = scores[..., side].flatten().masked_fill(text < 0, PADDING_SCORE)
            row_of = torch.where(text < 0, 0, text)
            highest = (
                token_scores.detach()
                .new_full((int(row_of.max()) + 1,), PADDING_SCORE)
                .scatter_reduce(0, row_of, token_scores.detach(), "amax")
            )
            total = torch.zeros_like(highest).index_add(0, row_of, (token_scores - highest[row_of]).exp() * (text >= 0))
            at = (batch[field].flatten() != IGNORE).nonzero()[:, 0]
            loss = loss + (highest[row_of[at]] + total[row_of[at]].log() - token_scores[at]).sum()
            correct = correct & (token_scores[at] >= highest[row_of[at]])
        return {"span": loss / 2, "accuracy": correct.sum().float()}


def _one_hot_label(n: int, index: int, no_answer: int) -> np.ndarray:
    """Return (n,) labels: 1 at an index, or at `no_answer` for a negative one; IGNORE elsewhere."""
    out = np.full(n, IGNORE)
    out[no_answer if index < 0 else index] = 1
    return out


def text_ids(batch: Batch) -> Tensor:
    """Return the text of each token, numbered over all rows: (B * T,) int64; -1 for padding."""
    tokens = batch["tokens"]
    row = torch.arange(tokens.shape[0], device=tokens.device)[:, None].expand_as(tokens)
    document = batch.get("document_ids")
    number = row if document is None else row * (int(document.max()) + 1) + document
    key_time = batch.get("key_time")
    return (number if key_time is None else number.masked_fill(key_time == NEVER, -1)).flatten()


@dataclass(frozen=True)
class LayerMixture(Objective):
    """Give the objective that it is added to a mixture of all layers as hidden state: h = gamma * sum of s_l h_l, s a softmax.

    It predicts nothing itself and has no loss: `firth.objectives.objective.hidden_states` uses its head.

    Args:
        frozen: Run the model without gradient and without dropout, so that it stays unchanged.
    """

    frozen: bool = True

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Objective:
        if config.encoder.latent_size:
            raise cannot_train(
                self, "the decoder of a latent has no mixture of layers: set model.encoder.latent_size=0"
            )
        return self

    inputs = frozenset()

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"mixture": ScalarMix(config.num_layers + 1, self.frozen)}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {}
