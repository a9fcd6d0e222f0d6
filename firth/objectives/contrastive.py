"""Contrastive learning: texts that belong together are brought near each other, others apart.

`Contrastive` is the margin loss over pairs of representations (Hadsell, Chopra & LeCun 2006, equation 4):

    m d^2 + (1 - m) max(0, eps - d)^2          m = 1 for a similar pair, d the distance of its two representations

`InfoNCE` takes the rest of the batch as what is dissimilar (van den Oord 2018; SimCSE, Gao 2021, equation 1):

    -log exp(sim(h_i, h_i+) / t) / sum_j exp(sim(h_i, h_j+) / t)

where h_i+ is the same text read again under other dropout, or its neighbour. Representations are unit vectors, so that
d lies in [0, 2] and a margin means the same in every model; Hadsell's are not.

    first     [CLS] the man went to the store [SEP]
    second    [CLS] he bought milk [SEP]                similar: they are neighbours
    other     [CLS] penguins cannot fly [SEP]           dissimilar: from another document
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from firth.data import layout
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.latent import average
from firth.model.model import LM
from firth.objectives.objective import Objective, choice_loss, num_correct
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs
from firth.validated import PositiveFloat, Range

TINY = 1e-12
"""Keeps the slope of a distance finite where two representations coincide."""


def texts(rows: list[np.ndarray], vocab: Vocab) -> Example:
    """Texts, each [CLS] text [SEP], as a group: (K, T)."""
    return layout.group([{"tokens": vocab.add_special_tokens(row)} for row in rows])


@dataclass(frozen=True)
class PooledObjective(Objective):
    """What both share. at: a text's representation is the "mean" of its states or the "first" of them, at [CLS]."""

    output_fields: ClassVar[frozenset[str]] = frozenset()

    position: Literal["mean", "first"] = "mean"

    def attention_pattern(self) -> AttentionPattern:
        return "bidirectional"

    def represent(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Unit vectors: hidden (..., T, width) -> (..., width) float32."""
        states = hidden[..., 0, :] if self.position == "first" else average(hidden, batch.get("key_time"))
        return F.normalize(states.float(), dim=-1)


@dataclass(frozen=True)
class Contrastive(PooledObjective):
    """Pairs. From {"first", "second", "other"}: first with second is similar, first with other is not, both in one group
    (3, T). From a labelled pair {"tokens", "token_type_ids", "label"} (class 1 of two: similar): a group (2, T).

    margin: eps, the distance from which a dissimilar pair costs nothing. Measures: how often a threshold of half the
    margin tells pairs apart; how often the similar text is the nearer one (chance: a half); the mean squared distance of
    similar pairs ("alignment", Wang & Isola 2020).

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"first": np.array([5]), "second": np.array([6, 7]), "other": np.array([8, 8])}
    >>> seen = Contrastive().build_example(example, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["similar"].tolist()
    ([[1, 5, 2, 0], [1, 6, 7, 2], [1, 8, 8, 2]], [1, 0])
    """

    labels: ClassVar[dict[str, str]] = {"contrastive": "similar"}
    metrics: ClassVar[dict[str, str]] = {"accuracy": "similar", "nearer": "compared", "alignment": "alike"}

    margin: Annotated[float, Range(gt=0, le=2)] = 1.0

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset({"tokens", "token_type_ids", "label"} if "label" in given else {"first", "second", "other"})

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        if "first" in example:
            seen = texts([example["first"], example["second"], example["other"]], vocab)
            similar = np.array([1, 0])
        else:
            second = example["token_type_ids"] == 1
            seen = texts([example["tokens"][~second][1:-1], example["tokens"][second][:-1]], vocab)
            similar = np.array([int(example["label"] == 1)])
        compared = np.int64(0 if len(similar) == 2 else IGNORE)
        return seen | {"similar": similar, "alike": np.where(similar == 1, 0, IGNORE), "compared": compared}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        h = self.represent(outputs["hidden"], batch)  # (B, 2 or 3, width)
        squared = (h[:, :1] - h[:, 1:]).square().sum(-1)  # (B, 1 or 2)
        d, similar = (squared + TINY).sqrt(), batch["similar"] == 1
        apart = (self.margin - d).clamp(min=0).square()
        return {
            "contrastive": torch.where(similar, squared, apart).sum(),
            "accuracy": ((d < self.margin / 2) == similar).sum().float(),
            "nearer": ((d[:, 0] < d[:, -1]) & (batch["compared"] != IGNORE)).sum().float(),
            "alignment": (squared.detach() * similar).sum(),
        }


@dataclass(frozen=True)
class InfoNCE(PooledObjective):
    """Each text against all others of the step.

    views: "dropout" reads {"tokens"} twice (unsupervised SimCSE), "neighbours" takes {"first", "second"}. temperature: t.
    A step is one batch: its examples answer each other, so micro-batches and ranks are refused (gathering over them
    would hold every row's graph at once, which is what a micro-batch is there to avoid). The loss depends on how many
    texts there are: ln of their number is chance. Held-out dropout views coincide (nothing is dropped there), so
    the measure to look at is that of held-out pairs.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> InfoNCE().build_example({"tokens": np.array([1, 5, 6, 2])}, vocab, np.random.default_rng(0))["tokens"].tolist()
    [[1, 5, 6, 2], [1, 5, 6, 2]]
    """

    labels: ClassVar[dict[str, str]] = {"infonce": "text"}
    metrics: ClassVar[dict[str, str]] = {"accuracy": "text", "alignment": "text"}
    needs_full_batch: ClassVar[bool] = True

    num_views: Literal["dropout", "neighbours"] = "dropout"
    temperature: PositiveFloat = 0.05

    def missing_from(self, config: ModelConfig) -> str:
        same = self.num_views == "dropout" and not config.dropout
        return (
            "two views of a text differ by dropout alone, and model.dropout is 0: set model.dropout=0.1" if same else ""
        )

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset({"tokens"} if self.num_views == "dropout" else {"first", "second"})

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        if self.num_views == "dropout":
            seen = layout.group([{"tokens": example["tokens"]}] * 2)
        else:
            seen = texts([example["first"], example["second"]], vocab)
        return seen | {"text": np.int64(0)}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        one, other = self.represent(outputs["hidden"], batch).unbind(1)  # (B, width) each
        scores, own = one @ other.mT / self.temperature, torch.arange(len(one), device=one.device)
        return {
            "infonce": choice_loss(scores, own),
            "accuracy": num_correct(scores, own),
            "alignment": (one - other).detach().square().sum(),
        }
