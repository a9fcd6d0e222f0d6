"""Direct preference optimisation: the language model is the reward model (Rafailov 2023, equation 7).

The best policy under a KL penalty beta satisfies r(x, y) = beta log p(y|x) / p_ref(y|x) + beta log Z(x), and Z cancels in a
comparison. So the Bradley-Terry loss needs no reward model, no sampling and no value: a pair of rows and two numbers,
the reference's log-probabilities, which are data (`firth.align.precompute`).

    loss = -log sigma(beta (log p/p_ref (chosen) - log p/p_ref (rejected)))  =  a two-way softmax over the gains

The loss sees only the difference, and may lower the probability of both answers: the log-ratios of the chosen and of
the rejected are measured apart, so that the log shows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from firth.data import layout
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import Objective, choice_loss, log_probs, num_correct, vocabulary_flops
from firth.objectives.sft import answer
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs
from firth.validated import PositiveFloat, Range


def build_comparison(example: Example) -> Example:
    """Chosen and rejected as two causal rows, asked is every answered token. Fields (2, T).

    >>> on = np.array([False, True, True])
    >>> pair = {"chosen_tokens": np.array([5, 6, 7]), "chosen_mask": on,
    ...         "rejected_tokens": np.array([5, 8]), "rejected_mask": on[:2]}
    >>> build_comparison(pair)["labels"].tolist()
    [[6, 7], [8, -100]]
    """
    return layout.group([answer(example[f"{k}_tokens"], example[f"{k}_mask"]) for k in ("chosen", "rejected")])


@torch.no_grad()
def ref_logprobs(model: LM, batch: Batch) -> dict[str, Tensor]:
    """What DPO needs of its frozen reference: the summed log-probability of each answer, {"reference": (B, 2)}."""
    hidden = model(batch, needed=batch["labels"] != IGNORE)
    return {"reference": log_probs(model, hidden, batch["labels"]).sum(-1)}


@dataclass(frozen=True)
class DPO(Objective):
    """A comparison with its reference log-probabilities: `comparison` | {"reference": (2,)}.

    beta: how dear it is to leave the reference. smoothing: the share of comparisons believed to be the wrong way
    round (conservative DPO, Mitchell 2023). dropout: apply the model's dropout; the first loss is then not ln 2.
    """

    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Range(ge=0, lt=0.5)] = 0.0
    dropout: bool = False

    output_fields: ClassVar[frozenset[str]] = frozenset()
    precomputed_fields: ClassVar[frozenset[str]] = frozenset({"reference"})
    labels: ClassVar[dict[str, str]] = {"dpo": "preferred"}
    metrics: ClassVar[dict[str, str]] = {
        "accuracy": "preferred",
        "margin": "preferred",
        "chosen": "preferred",
        "rejected": "preferred",
    }

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset({"chosen_tokens", "chosen_mask", "rejected_tokens", "rejected_mask", "reference"})

    def attention_pattern(self) -> AttentionPattern:
        return "causal"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"lm": LMHead(config)}

    def notes(self, metrics: Mapping[str, float]) -> list[str]:
        """Say it where both answers became less likely than under the reference (Pal 2024; Rafailov 2024)."""
        split = "valid/" if "valid/chosen" in metrics else ""
        chosen, rejected = (metrics.get(f"{split}{name}", 0.0) for name in ("chosen", "rejected"))
        if chosen >= 0 or rejected >= 0:
            return []
        where = "held-out" if split else "training"
        return [
            f"Both answers became less likely than under the reference on {where} comparisons: the preferred by "
            f"{-chosen:.3g} nats, the rejected by {-rejected:.3g}. A larger objective.beta or a lower optimizer.lr keeps "
            "the model nearer to the reference."
        ]

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        frozen = {"reference": np.asarray(example["reference"], np.float32), "preferred": np.int64(0)}
        return build_comparison(example) | frozen

    def needed_positions(self, batch: Batch) -> Tensor | None:
        return batch["labels"] != IGNORE

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        now = log_probs(model, outputs["hidden"], batch["labels"]).sum(-1)  # (B, 2)
        gain = now - batch["reference"]
        preferred = batch["preferred"]
        right = choice_loss(self.beta * gain, preferred)
        wrong = choice_loss(-self.beta * gain, preferred)
        chosen, rejected = gain.detach().sum(0)
        return {
            "dpo": (1 - self.label_smoothing) * right + self.label_smoothing * wrong,
            "accuracy": num_correct(gain.detach(), preferred),
            "margin": self.beta * (chosen - rejected),
            "chosen": chosen,
            "rejected": rejected,
        }

    def loss_flops(self, model: LM, batch: Batch) -> float:
        return vocabulary_flops(model, batch["labels"])
