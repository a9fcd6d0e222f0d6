"""Weak supervision: each example has K labels, some of them wrong, and the loss is robust to that.

    (1 / nK) sum over i <= n, k <= K of  l(f_y(x_i)) + sum over c != y of l(-f_c(x_i)),      y the k-th label of x_i

with l(z) = log(1 + exp(-z)): the one-versus-all binary losses of every class against every label (Zhang 2004; for
learning from several annotators, Robinson, Jegelka & Sra 2020). No label is settled on beforehand: ten annotators of
whom seven say "a" leave f_a nearer to certainty than six do. The majority's label and a softmax is the baseline beside it
(`Classification` reads it from the same examples).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from firth.model.model import LM
from firth.objectives.classification import Classification
from firth.objectives.objective import num_correct, supervised
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs, UserError


@dataclass(frozen=True)
class MultiAnnotator(Classification):
    """Which class a text has, of {"tokens", "votes" (K,), "label"}; a vote that was not given is IGNORE.

    `label` is what accuracy is counted against (the majority, in training; the truth, on held-out text, where the one
    true label also stands for the votes that are not there).

    >>> vocab = Vocab(size=9, roles={"cls": 1, "sep": 2}, special=np.arange(9) < 3)
    >>> example = {"tokens": np.array([1, 5, 2]), "votes": np.array([1, 0, 1]), "label": 1}
    >>> MultiAnnotator(class_names=("bad", "good")).build_example(example, vocab, np.random.default_rng(0))["votes"].tolist()
    [1, 0, 1]
    """

    labels: ClassVar[dict[str, str]] = {"votes": "votes"}
    packable: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.label_smoothing or self.class_weights:
            raise UserError("weak: its loss has no softmax to smooth or to weigh: leave out smoothing and weights")

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset({"tokens", "label", "votes"})

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        seen = super().build_example(example, vocab, rng)
        return seen | {"votes": np.asarray(example.get("votes", [example["label"]]), np.int64)}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, answers = supervised(outputs["hidden"], batch["class"])
        scores = model.heads["classes"](states).float()  # (B, C)
        votes = batch["votes"]  # (B, K)
        # The loss is linear in the labels: what counts is how many say c, and how many say something else.
        given = (votes != IGNORE).sum(-1, keepdim=True)
        for_it = F.one_hot(votes.clamp(min=0), scores.shape[-1]).mul((votes != IGNORE)[..., None]).sum(-2)  # (B, C)
        loss = -(for_it * F.logsigmoid(scores) + (given - for_it) * F.logsigmoid(-scores)).sum()
        return {"votes": loss, "accuracy": num_correct(scores, answers)}
