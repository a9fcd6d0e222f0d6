"""Contrastive learning: move representations of similar texts together and those of other texts away from each other.

`Contrastive` is the margin loss over pairs of representations (Hadsell, Chopra & LeCun 2006, equation 4):

    m d^2 + (1 - m) max(0, eps - d)^2          m = 1 for a similar pair, d the distance of its two representations

`InfoNCE` uses the rest of the batch as negatives (van den Oord 2018; SimCSE, Gao 2021, equation 1):

    -log exp(sim(h_i, h_i+) / t) / sum_j exp(sim(h_i, h_j+) / t)

where h_i+ is the same text with another dropout mask, or its neighbor. Representations are unit vectors, so that d lies in
[0, 2] and a margin means the same in every model; Hadsell's are not.

    first     [CLS] the man went to the store [SEP]
    second    [CLS] he bought milk [SEP]                similar: they are neighbors
    other     [CLS] penguins cannot fly [SEP]           dissimilar: from another document
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor

from firth.data import attention_fields
from firth.fields import PositiveFloat
from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.model.variants import average
from firth.objectives.objective import Objective, cannot_train, choice_loss, num_correct
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Constraints, DataStats, Example, Metric, Outputs

SQRT_EPSILON = 1e-12
"""Added before a square root: keeps the gradient of a distance finite where two representations coincide."""


def group_texts(rows: list[np.ndarray], vocab: Vocab) -> Example:
    """Return texts, each [CLS] text [SEP], as a group of rows (K, T)."""
    return attention_fields.group([{"tokens": vocab.add_special_tokens(row)} for row in rows])


@dataclass(frozen=True)
class PooledObjective(Objective):
    """Base of the contrastive objectives.

    Args:
        position: A text's representation is the "mean" of its states or the "first" of them, at [CLS].
    """

    position: Literal["mean", "first"] = "mean"

    attention = "bidirectional"

    def embed(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return unit vectors: hidden (..., T, hidden_size) -> (..., hidden_size) float32."""
        states = hidden[..., 0, :] if self.position == "first" else average(hidden, batch.get("key_time"))
        return F.normalize(states.float(), dim=-1)


@dataclass(frozen=True)
class Contrastive(PooledObjective):
    """Margin loss over pairs of texts (Hadsell 2006, equation 4).

    Shown: a group of texts. From "neighbors" {"first", "second", "other"}: first and second are similar, first and other are
    not, a group (3, T). From a "labeled" pair {"tokens", "token_type_ids", "label"} (class 1 of two: similar): a group (2, T).
    Loss: d^2 for a similar pair, max(0, margin - d)^2 for a dissimilar one. Metrics: "accuracy" of a threshold at half the
    margin; "nearer", how often the similar text is the nearer one (chance: a half); "alignment", the mean squared distance of
    similar pairs (Wang & Isola 2020).

    Args:
        position: See `PooledObjective`.
        margin: The paper's eps: the distance from which a dissimilar pair costs nothing.
        pairs: "neighbors" in a text, or "labeled" pairs.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"first": np.array([5]), "second": np.array([6, 7]), "other": np.array([8, 8])}
    >>> seen = Contrastive().build_example(example, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["similar"].tolist()
    ([[1, 5, 2, 0], [1, 6, 7, 2], [1, 8, 8, 2]], [1, 0])
    """

    labels = {"contrastive": "similar"}
    metrics = {"accuracy": Metric("similar"), "nearer": Metric("compared"), "alignment": Metric("alike")}

    margin: Annotated[float, Interval(gt=0, le=2)] = 1.0
    pairs: Literal["neighbors", "labeled"] = "neighbors"

    @property
    def inputs(self) -> frozenset[str]:
        neighbors = {"first", "second", "other"}
        return frozenset(neighbors if self.pairs == "neighbors" else {"tokens", "token_type_ids", "label"})

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        if self.pairs == "neighbors":
            seen = group_texts([example["first"], example["second"], example["other"]], vocab)
            similar = np.array([1, 0])
        else:
            second = example["token_type_ids"] == 1
            seen = group_texts([example["tokens"][~second][1:-1], example["tokens"][second][:-1]], vocab)
            similar = np.array([int(example["label"] == 1)])
        compared = np.int64(0 if len(similar) == 2 else IGNORE)
        return seen | {"similar": similar, "alike": np.where(similar == 1, 0, IGNORE), "compared": compared}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        h = self.embed(outputs["hidden"], batch)  # (B, 2 or 3, hidden_size)
        squared = (h[:, :1] - h[:, 1:]).square().sum(-1)  # (B, 1 or 2)
        d, similar = (squared + SQRT_EPSILON).sqrt(), batch["similar"] == 1
        hinge = (self.margin - d).clamp(min=0).square()
        return {
            "contrastive": torch.where(similar, squared, hinge).sum(),
            "accuracy": ((d < self.margin / 2) == similar).sum().float(),
            "nearer": ((d[:, 0] < d[:, -1]) & (batch["compared"] != IGNORE)).sum().float(),
            "alignment": (squared.detach() * similar).sum(),
        }


@dataclass(frozen=True)
class InfoNCE(PooledObjective):
    """Tell each text's positive from all other texts of the step.

    Shown: each text and its positive, a group (2, T). Predicted: which of the batch is the positive. Loss: a softmax over
    cosine similarities, -log exp(sim(h_i, h_i+) / t) / sum_j exp(sim(h_i, h_j+) / t).

    A step is one batch: its examples depend on each other, so micro-batches and ranks are rejected (gathering over them would
    hold every row's graph at once, which a micro-batch is there to avoid). The loss depends on the number of texts; its
    logarithm is chance. Held-out dropout positives coincide (there is no dropout in evaluation), so look at the loss of
    held-out pairs.

    Args:
        position: See `PooledObjective`.
        positives: "dropout" encodes {"tokens"} twice (unsupervised SimCSE), "neighbors" uses {"first", "second"}.
        temperature: t.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> InfoNCE().build_example({"tokens": np.array([1, 5, 6, 2])}, vocab, np.random.default_rng(0))["tokens"].tolist()
    [[1, 5, 6, 2], [1, 5, 6, 2]]
    """

    labels = {"infonce": "text"}
    metrics = {"accuracy": Metric("text"), "alignment": Metric("text")}
    constraints = Constraints(needs_full_batch=True)

    positives: Literal["dropout", "neighbors"] = "dropout"
    temperature: PositiveFloat = 0.05

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Self:
        if self.positives == "dropout" and not config.dropout:
            raise cannot_train(
                self, "the two copies of a text differ only by dropout, and model.dropout is 0: set model.dropout=0.1"
            )
        return self

    @property
    def inputs(self) -> frozenset[str]:
        return frozenset({"tokens"} if self.positives == "dropout" else {"first", "second"})

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        if self.positives == "dropout":
            seen = attention_fields.group([{"tokens": example["tokens"]}] * 2)
        else:
            seen = group_texts([example["first"], example["second"]], vocab)
        return seen | {"text": np.int64(0)}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        one, other = self.embed(outputs["hidden"], batch).unbind(1)  # (B, hidden_size) each
        scores, own = one @ other.mT / self.temperature, torch.arange(len(one), device=one.device)
        return {
            "infonce": choice_loss(scores, own),
            "accuracy": num_correct(scores, own),
            "alignment": (one - other).detach().square().sum(),
        }
