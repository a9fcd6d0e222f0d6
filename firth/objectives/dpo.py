"""Direct preference optimization: the language model is the reward model (Rafailov 2023, equation 7).

The best policy under a KL penalty beta satisfies r(x, y) = beta log p(y|x) / p_ref(y|x) + beta log Z(x), and Z cancels in a
comparison. So the Bradley-Terry loss needs no reward model, no sampling and no value: only a pair of rows and the
reference's two log-probabilities, which are precomputed (`firth.align.precompute`).

    loss = -log sigma(beta (log p/p_ref (chosen) - log p/p_ref (rejected)))  =  a two-way softmax over the log-ratios

The loss depends only on the difference and may lower the probability of both answers, so the log-ratios of chosen and
rejected are logged separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from annotated_types import Interval
from torch import Tensor, nn

from firth.data import attention_fields
from firth.fields import PositiveFloat
from firth.model.config import ModelConfig
from firth.model.forward_context import ForwardContext
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import (
    Objective,
    choice_loss,
    forward_flops,
    hidden_states,
    log_probs,
    num_correct,
    vocabulary_flops,
)
from firth.objectives.sft import causal_example
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Metric, Outputs


def build_comparison(example: Example) -> Example:
    """Return chosen and rejected as two causal rows, labels on the tokens of the answers. Fields (2, T).

    >>> on = np.array([False, True, True])
    >>> pair = {"chosen_tokens": np.array([5, 6, 7]), "chosen_mask": on,
    ...         "rejected_tokens": np.array([5, 8]), "rejected_mask": on[:2]}
    >>> build_comparison(pair)["labels"].tolist()
    [[6, 7], [8, -100]]
    """
    return attention_fields.group(
        [causal_example(example[f"{k}_tokens"], example[f"{k}_mask"]) for k in ("chosen", "rejected")]
    )


@torch.no_grad()
def ref_logprobs(model: LM, batch: Batch) -> dict[str, Tensor]:
    """Return the summed log-probability of each answer under the reference model: {"reference": (B, 2)}."""
    hidden = model(batch, ForwardContext(needed_positions=batch["labels"] != IGNORE))
    return {"reference": log_probs(model, hidden, batch["labels"]).sum(-1)}


def _remark_on_log_ratios(metrics: Mapping[str, float]) -> str:
    """Warn where both answers became less likely than under the reference (Pal 2024; Rafailov 2024)."""
    split = "valid/" if "valid/chosen" in metrics else ""
    chosen, rejected = (metrics.get(f"{split}{name}", 0.0) for name in ("chosen", "rejected"))
    if chosen >= 0 or rejected >= 0:
        return ""
    where = "held-out" if split else "training"
    return (
        f"Both answers became less likely than under the reference on {where} comparisons: the preferred by "
        f"{-chosen:.3g} nats, the rejected by {-rejected:.3g}. A larger objective.beta or a lower optimizer.lr keeps "
        "the model nearer to the reference."
    )


@dataclass(frozen=True)
class DPO(Objective):
    """Prefer the chosen answer over the rejected one, relative to a reference model.

    Shown: both answers after their prompt, two rows (2, T), and "reference", their log-probabilities under the reference (2,).
    Predicted: the tokens of both answers. Loss: -log sigma(beta (log p/p_ref (chosen) - log p/p_ref (rejected))). Metrics:
    "accuracy", "margin" (beta times the difference of the log-ratios), "chosen" and "rejected" (the log-ratios, in nats).

    Args:
        beta: Strength of the penalty for leaving the reference.
        label_smoothing: Share of the comparisons assumed to be labeled the wrong way round (conservative DPO, Mitchell 2023).
    """

    beta: PositiveFloat = 0.1
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0

    labels = {"dpo": "preferred"}
    metrics = {
        "accuracy": Metric("preferred"),
        "margin": Metric("preferred"),
        "chosen": Metric("preferred", remark=_remark_on_log_ratios),
        "rejected": Metric("preferred"),
    }

    inputs = frozenset({"chosen_tokens", "chosen_mask", "rejected_tokens", "rejected_mask", "reference"})
    attention = "causal"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"lm": LMHead(config)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        fields = {"reference": np.asarray(example["reference"], np.float32), "preferred": np.int64(0)}
        return build_comparison(example) | fields

    def forward(self, model: LM, batch: Batch) -> Outputs:
        return {"hidden": hidden_states(model, batch, batch["labels"] != IGNORE)}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        logprobs = log_probs(model, outputs["hidden"], batch["labels"]).sum(-1)  # (B, 2)
        log_ratio = logprobs - batch["reference"]
        preferred = batch["preferred"]
        loss = choice_loss(self.beta * log_ratio, preferred)
        flipped = choice_loss(-self.beta * log_ratio, preferred)
        chosen, rejected = log_ratio.detach().sum(0)
        return {
            "dpo": (1 - self.label_smoothing) * loss + self.label_smoothing * flipped,
            "accuracy": num_correct(log_ratio.detach(), preferred),
            "margin": self.beta * (chosen - rejected),
            "chosen": chosen,
            "rejected": rejected,
        }

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        total = forward_flops(model, batch, batch["labels"] != IGNORE) if forward is None else forward
        return total + vocabulary_flops(model, batch["labels"])
