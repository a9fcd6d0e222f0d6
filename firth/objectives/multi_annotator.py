"""Classification from several noisy annotators: each example has K labels, some of them wrong.

    (1 / nK) sum over i <= n, k <= K of  l(f_y(x_i)) + sum over c != y of l(-f_c(x_i)),      y the k-th label of x_i

with l(z) = log(1 + exp(-z)): the one-versus-all binary losses of every class against every label (Zhang 2004; for
learning from several annotators, Robinson, Jegelka & Sra 2020). The labels are not aggregated first: ten annotators of
whom seven choose "a" bring f_a closer to certainty than six do. The baseline is a softmax on the majority label
(`Classification` on the same examples).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from firth.model.model import LM
from firth.objectives.classification import Classification
from firth.objectives.objective import forward_flops, hidden_states, num_correct, supervised
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Constraints, Example, Outputs, UserError


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
