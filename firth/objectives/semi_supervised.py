"""Semi-supervised classification: a few labelled texts, many without a label, one loss.

    (1/n) sum over labelled of loss(f(x), y)  +  w (1/m) sum over unlabelled of loss(f(x), r(x))  +  lambda Omega(theta)

r is the relation that gives an unlabelled text its target. `PseudoLabels` takes what a teacher says where it is sure (Lee
2013): a frozen teacher is data, so its answers are a field of the example. `Consistency` takes what the model itself says
of the untouched text, without gradient, for a text with masks in it (UDA, Xie 2019; the Pi-model, Laine 2017). The third
term is an addend, `Consistency() + Penalty()`. An unlabelled text is one whose label is IGNORE.

w grows from nothing as exp(-5 (1 - t)^2), t the share of the `ramp` steps that are behind (Laine 2017, section 2): a
model that knows nothing should not be consistent with itself. Held-out text is scored with the whole w.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from firth.data.noise import NOISES, Kind, text_units
from firth.model import flops
from firth.model.model import LM
from firth.objectives.classification import Classification
from firth.objectives.objective import Objective, choice_loss, forward_work, supervised
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs, UserError
from firth.validated import NonNegativeFloat, NonNegativeInt, OpenShare, PositiveFloat, Share, ShareBelowOne


@dataclass(frozen=True)
class SemiSupervised(Classification):
    """What both relations share. weight: w at its full size. ramp: steps until it is (0: at once)."""

    labels: ClassVar[dict[str, str]] = {"class": "class", "relation": "relation"}
    asks: ClassVar[tuple[str, ...]] = ("class", "relation")

    unlabeled_weight: NonNegativeFloat = 1.0
    ramp_steps: NonNegativeInt = 0

    def at_step(self, step: int) -> Self:
        if step >= self.ramp_steps:
            return self
        return dataclasses.replace(
            self, unlabeled_weight=self.unlabeled_weight * math.exp(-5 * (1 - step / self.ramp_steps) ** 2)
        )

    def question(self, example: Example, seen: Example, target: int) -> np.ndarray:
        """The field "relation": the target at the place where a class is asked, of an unlabelled text alone."""
        asks = np.full(len(seen["tokens"]), IGNORE)
        if example["label"] == IGNORE:
            asks[0 if self.place == "first" else -1] = target
        return asks


@dataclass(frozen=True)
class PseudoLabels(SemiSupervised):
    """The targets are a teacher's classes, {"taught": its probabilities}; one of which it is less than `confidence` sure
    costs nothing, and counts among the m (FixMatch, Sohn 2020, equation 4).

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"tokens": np.array([1, 5, 2]), "label": IGNORE, "taught": np.array([0.02, 0.98])}
    >>> seen = PseudoLabels(class_names=("bad", "good")).build_example(example, vocab, np.random.default_rng(0))
    >>> seen["class"].tolist(), seen["relation"].tolist(), seen["sure"].tolist()
    ([-100, -100, -100], [1, -100, -100], [True, True, True])
    """

    confidence: Share = 0.9

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset({"tokens", "label", "taught"})

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        seen = super().build_example(example, vocab, rng)
        said = example.get("taught", np.zeros(1))  # held-out records have a label and no teacher
        sure = np.full(len(seen["tokens"]), said.max() >= self.confidence)
        return seen | {"relation": self.question(example, seen, int(said.argmax())), "sure": sure}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, targets = supervised(outputs["hidden"], batch["relation"].masked_fill(~batch["sure"], IGNORE))
        relation = choice_loss(model.heads["classes"](states), targets)
        return super().loss(model, outputs, batch) | {"relation": self.unlabeled_weight * relation}


def unlabeled_example(objective: Objective, example: Example, vocab: Vocab) -> Example:
    """A text as a teacher is asked about it, whether it has a label or not: `labels` is 0 where a class is asked.

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
    """What `PseudoLabels` needs of its teacher, a classifier: its probabilities, {"taught": (B, classes)}."""
    states, _ = supervised(model(batch, needed=batch["labels"] != IGNORE), batch["labels"])
    return {"taught": model.heads["classes"](states).float().softmax(-1)}


@dataclass(frozen=True)
class Consistency(SemiSupervised):
    """The target is the model's own answer to the untouched text, sharpened by `temperature` (1: as it is), where it is
    `confidence` sure or more (0: everywhere). An unlabelled text is read twice: untouched, without gradient and without
    dropout; and as it is learnt from, with `rate` of its tokens masked (and with dropout, where the shape has any).

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
                "consistency reads a text twice, once with masks in it: it needs an encoder or a decoder alone"
            )

    @property
    def text_units(self) -> frozenset[str]:
        return text_units(self.noise)

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        seen = super().build_example(example, vocab, rng)
        clean = seen["tokens"]
        relation = self.question(example, seen, 0)
        if (relation != IGNORE).any():
            seen |= {"tokens": np.where(NOISES[self.noise](clean, vocab, self.mlm_probability, rng), vocab.mask, clean)}
        return seen | {"clean": clean, "relation": relation}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        learning = model.training
        model.eval()
        with torch.no_grad():
            clean = model(batch | {"tokens": batch["clean"]}, needed=batch["relation"] != IGNORE)
            states, _ = supervised(clean, batch["relation"])
            own = (model.heads["classes"](states).float() / self.temperature).softmax(-1)
        model.train(learning)
        return {"hidden": model(batch, needed=self.needed_positions(batch)), "own": own}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, _ = supervised(outputs["hidden"], batch["relation"])
        each = F.cross_entropy(model.heads["classes"](states).float(), outputs["own"], reduction="none")
        sure = outputs["own"].amax(-1) >= self.confidence
        return super().loss(model, outputs, batch) | {"relation": self.unlabeled_weight * (each * sure).sum()}

    def forward_flops(self, model: LM, batch: Batch) -> float:
        # The pass without gradient is a third of one with.
        read = (self.needed_positions(batch), batch["relation"] != IGNORE)
        learning, looking = (flops.stack_flops(model.config, forward_work(model, batch, wanted)) for wanted in read)
        return learning + looking / 3
