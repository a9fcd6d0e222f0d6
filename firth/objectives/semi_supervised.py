"""Few and noisy labels: pseudo-labels, consistency, several annotators, weight penalties.

Semi-supervised classification: a few labeled texts, many unlabeled ones, one loss.

    (1/n) sum over labeled of loss(f(x), y)  +  w (1/m) sum over unlabeled of loss(f(x), r(x))  +  lambda Omega(theta)

r gives an unlabeled text its target. `PseudoLabels` uses a teacher's prediction where it is confident (Lee 2013); the teacher
is frozen, so its predictions are a field of the example. `Consistency` uses the model's own prediction for the clean text,
without gradient, as target for the masked text (UDA, Xie 2019; the Pi-model, Laine 2017). The third term is a component,
`Consistency() + WeightPenalty()`. An unlabeled text is one whose label is IGNORE.

w grows from zero as exp(-5 (1 - t)^2), t the completed share of `ramp_steps` (Laine 2017, section 2): an untrained model
should not be consistent with itself. Held-out text is scored with the full w.

Classification from several noisy annotators: each example has K labels, some of them wrong.

    (1 / nK) sum over i <= n, k <= K of  l(f_y(x_i)) + sum over c != y of l(-f_c(x_i)),      y the k-th label of x_i

with l(z) = log(1 + exp(-z)): the one-versus-all binary losses of every class against every label (Zhang 2004; for
learning from several annotators, Robinson, Jegelka & Sra 2020). The labels are not aggregated first: ten annotators of
whom seven choose "a" bring f_a closer to certainty than six do. The baseline is a softmax on the majority label
(`Classification` on the same examples).

L2 weight penalty, lambda * (sum of squared weights), to be added to any objective.

    MLM() + WeightPenalty(weight=1e-4)            mean loss + 1e-4 * sum of theta^2

Every loss term is a sum over labels divided by their number. A penalty has no labels, so it is added once per token and
counted by tokens: for any batch and any micro-batches it equals lambda * sum of theta^2. AdamW's decoupled decay
(`optimizer.weight_decay`) is usually the better choice; this is the term of the formulas of semi-supervised losses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from firth.data.noise import NOISES, Kind, text_units
from firth.fields import NonNegativeFloat, NonNegativeInt, OpenShare, PositiveFloat, Share, ShareBelowOne
from firth.model.config import ModelConfig
from firth.model.forward_context import ForwardContext
from firth.model.model import LM
from firth.model.shard_tensors import squares
from firth.objectives.classification import Classification, readout_of
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
from firth.types import IGNORE, Batch, Constraints, DataStats, Example, Outputs, UserError


@dataclass(frozen=True)
class SemiSupervised(Classification):
    """Base of the semi-supervised objectives.

    Args:
        position: See `Classification`, as `class_names`, `label_smoothing`, `class_weights` and `head`.
        unlabeled_weight: w after the ramp.
        ramp_steps: Steps until w has its full size (0: from the start).
    """

    labels = {"class": "class", "relation": "relation"}

    unlabeled_weight: NonNegativeFloat = 1.0
    ramp_steps: NonNegativeInt = 0

    def weight_of(self, batch: Batch) -> float:
        """Return w at the step of a batch."""
        step = int(batch["step"]) if "step" in batch else self.ramp_steps
        if step >= self.ramp_steps:
            return self.unlabeled_weight
        return self.unlabeled_weight * math.exp(-5 * (1 - step / self.ramp_steps) ** 2)

    def relation_labels(self, example: Example, seen: Example, target: int) -> np.ndarray:
        """Return the field "relation": the target of an unlabeled text at the readout position, IGNORE elsewhere."""
        labels = np.full(len(seen["tokens"]), IGNORE)
        if example["label"] == IGNORE:
            labels[0 if self.readout == "first" else -1] = target
        return labels


@dataclass(frozen=True)
class PseudoLabels(SemiSupervised):
    """Classification with a teacher's predictions as labels of the unlabeled texts, {"taught": its probabilities}.

    Shown: the whole text. Predicted: its class, or the teacher's most likely class r(x). Loss: cross-entropy, for an unlabeled
    text times w where the teacher's probability is at least `confidence`; less confident ones cost nothing and count among
    the m (FixMatch, Sohn 2020, equation 4).

    Args:
        position: See `SemiSupervised`, as the other fields.
        confidence: Smallest probability of a pseudo-label that is trained on.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"tokens": np.array([1, 5, 2]), "label": IGNORE, "taught": np.array([0.02, 0.98])}
    >>> seen = PseudoLabels(class_names=("bad", "good")).build_example(example, vocab, np.random.default_rng(0))
    >>> seen["class"].tolist(), seen["relation"].tolist(), seen["sure"].tolist()
    ([-100, -100, -100], [1, -100, -100], [True, True, True])
    """

    confidence: Share = 0.9

    inputs = frozenset({"tokens", "label", "taught"})

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        seen = super().build_example(example, vocab, rng)
        probabilities = example.get("taught", np.zeros(1))  # held-out records have a label and no teacher
        sure = np.full(len(seen["tokens"]), probabilities.max() >= self.confidence)
        return seen | {"relation": self.relation_labels(example, seen, int(probabilities.argmax())), "sure": sure}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, targets = supervised(outputs["hidden"], batch["relation"].masked_fill(~batch["sure"], IGNORE))
        relation = choice_loss(model.heads["classes"](states), targets)
        return super().loss(model, outputs, batch) | {"relation": self.weight_of(batch) * relation}


def unlabeled_example(objective: Objective, example: Example, vocab: Vocab) -> Example:
    """Return a text as an input of the teacher, labeled or not: `labels` is 0 at the readout position.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"tokens": np.array([1, 5, 2]), "label": IGNORE}
    >>> unlabeled_example(PseudoLabels(class_names=("bad", "good")), example, vocab)["labels"].tolist()
    [0, -100, -100]
    """
    seen = objective.build_example(example | {"label": 0}, vocab, np.random.default_rng(0))
    kept = {
        name: seen[name]
        for name in ("tokens", "token_type_ids", "query_time", "key_time", "source_tokens")
        if name in seen
    }
    return kept | {"labels": seen["class"]}


@torch.no_grad()
def teacher_probabilities(model: LM, batch: Batch) -> dict[str, Tensor]:
    """Return the class probabilities of a teacher, a classifier, for `PseudoLabels`: {"taught": (B, classes)}."""
    states, _ = supervised(model(batch, ForwardContext(needed_positions=batch["labels"] != IGNORE)), batch["labels"])
    return {"taught": model.heads["classes"](states).float().softmax(-1)}


@dataclass(frozen=True)
class Consistency(SemiSupervised):
    """Classification with the model's own prediction for the clean text as target for the masked text.

    Shown: a labeled text as it is; an unlabeled text twice: clean, without gradient and without dropout, and masked (with the
    model's dropout). Predicted: the class, and for an unlabeled text q, the softmax of the clean logits / temperature.
    Loss: cross-entropy with the label; for an unlabeled text w * -sum over c of q_c log p_c(masked text), where
    max q >= confidence.

    Args:
        position: See `SemiSupervised`, as the other fields.
        mlm_probability: Share of the tokens of an unlabeled text that is masked.
        noise: How they are selected (`firth.data.noise`).
        temperature: Sharpens the target; 1 leaves it as it is.
        confidence: Smallest probability of a target that is trained on; 0: all.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2, "mask": 3}, special=np.arange(9) < 4)
    >>> example = {"tokens": np.array([1, 5, 6, 7, 2]), "label": IGNORE}
    >>> seen = Consistency(class_names=("bad", "good"), mlm_probability=0.5).build_example(example, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["clean"].tolist(), seen["relation"].tolist()
    ([1, 3, 3, 3, 2], [1, 5, 6, 7, 2], [0, -100, -100, -100, -100])
    """

    mlm_probability: OpenShare = 0.15
    noise: Kind = "iid"
    temperature: PositiveFloat = 0.5
    confidence: ShareBelowOne = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.position == "answer":
            raise UserError(
                "consistency runs the model on a clean and a masked text: use an encoder or a decoder, not an encoder-decoder"
            )

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Self:
        if self.position == "auto" and readout_of(config) == "answer":
            why = "it runs the model on a clean and a masked text, which takes an encoder or a decoder"
            raise cannot_train(self, f"{why}: set model.encoder.num_layers=0")
        return super().configure(stats, config)

    @property
    def constraints(self) -> Constraints:
        return dataclasses.replace(super().constraints, text_units=text_units(self.noise))

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        seen = super().build_example(example, vocab, rng)
        clean = seen["tokens"]
        relation = self.relation_labels(example, seen, 0)
        if (relation != IGNORE).any():
            seen |= {"tokens": np.where(NOISES[self.noise](clean, vocab, self.mlm_probability, rng), vocab.mask, clean)}
        return seen | {"clean": clean, "relation": relation}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        training = model.training
        model.eval()
        with torch.no_grad():
            clean = hidden_states(model, batch | {"tokens": batch["clean"]}, batch["relation"] != IGNORE)
            states, _ = supervised(clean, batch["relation"])
            target = (model.heads["classes"](states).float() / self.temperature).softmax(-1)
        model.train(training)
        return super().forward(model, batch) | {"target": target}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, _ = supervised(outputs["hidden"], batch["relation"])
        losses = F.cross_entropy(model.heads["classes"](states).float(), outputs["target"], reduction="none")
        sure = outputs["target"].amax(-1) >= self.confidence
        return super().loss(model, outputs, batch) | {"relation": self.weight_of(batch) * (losses * sure).sum()}

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        if forward is not None:
            return forward
        # A pass without gradient costs a third of one with.
        return super().flops(model, batch) + forward_flops(model, batch, batch["relation"] != IGNORE) / 3


@dataclass(frozen=True)
class MultiAnnotator(Classification):
    """Predict the class of a text from several labels: {"tokens", "votes" (K,), "label"}; a missing vote is IGNORE.

    Shown: the whole text. Predicted: every vote y, at the readout position. Loss: the sum over votes of
    l(f_y) + sum over c != y of l(-f_c), l(z) = log(1 + exp(-z)). Accuracy is measured against `label`: the majority in
    training, the true label on held-out text, where it is also the only vote.

    Args:
        position: See `ReadoutObjective`.
        class_names: Names of the classes; a vote is an index into them.

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"tokens": np.array([1, 5, 2]), "votes": np.array([1, 0, 1]), "label": 1}
    >>> MultiAnnotator(class_names=("bad", "good")).build_example(example, vocab, np.random.default_rng(0))["votes"].tolist()
    [1, 0, 1]
    """

    labels = {"votes": "votes"}

    @property
    def constraints(self) -> Constraints:
        return dataclasses.replace(super().constraints, packable=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing or self.class_weights:
            raise UserError(
                "multi_annotator: its loss has no softmax to smooth or weight: remove label_smoothing and class_weights"
            )

    inputs = frozenset({"tokens", "label", "votes"})

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        seen = super().build_example(example, vocab, rng)
        return seen | {"votes": np.asarray(example.get("votes", [example["label"]]), np.int64)}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        return {"hidden": hidden_states(model, batch, batch["class"] != IGNORE)}

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        return forward_flops(model, batch, batch["class"] != IGNORE) if forward is None else forward

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, targets = supervised(outputs["hidden"], batch["class"])
        scores = model.heads["classes"](states).float()  # (B, C)
        votes = batch["votes"]  # (B, K)
        # The loss is linear in the labels, so the counts of votes for and against each class are enough.
        num_votes = (votes != IGNORE).sum(-1, keepdim=True)
        votes_for = F.one_hot(votes.clamp(min=0), scores.shape[-1]).mul((votes != IGNORE)[..., None]).sum(-2)  # (B, C)
        loss = -(votes_for * F.logsigmoid(scores) + (num_votes - votes_for) * F.logsigmoid(-scores)).sum()
        return {"votes": loss, "accuracy": num_correct(scores, targets)}


@dataclass(frozen=True)
class WeightPenalty(Objective):
    """Penalize the sum of the squared weights, without biases and norm gains.

    It shows and predicts nothing itself. Loss: weight * sum of theta^2.

    Args:
        weight: lambda.

    >>> vocab = Vocab(size=9, roles={}, special=np.arange(9) < 3)
    >>> WeightPenalty().build_example({"tokens": np.array([5, 6])}, vocab, np.random.default_rng(0))["penalty"].tolist()
    [0, 0]
    """

    labels = {"penalty": "penalty"}
    weight: PositiveFloat = 1e-4

    inputs = frozenset()

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return example | {"penalty": np.zeros_like(example["tokens"])}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        weights = (p for p in model.parameters() if p.ndim > 1)
        return {"penalty": self.weight * squares(weights, (batch["penalty"] != IGNORE).sum())}
