"""Preference optimization: train a language model on which answers people preferred, without sampling and without a reward model.

The best policy under a KL penalty beta satisfies r(x, y) = beta log p(y|x) / p_ref(y|x) + beta log Z(x), and Z cancels in a
comparison (Rafailov 2023, equations 5 to 7). So a language model is a reward model, and the losses of reward models train it.

With s = log p(y|x) / p_ref(y|x), n the number of tokens of an answer, w the chosen (desirable) and l the rejected
(undesirable) answer:

    objective               loss of a record                                                          data       reference
    dpo, loss_type=sigmoid  -log sigma(beta (s_w - s_l))                        (Rafailov 2023)       pairs      yes
    dpo, loss_type=ipo      (s_w / n_w - s_l / n_l - 1 / (2 beta))^2            (Azar 2024)           pairs      yes
    simpo                   -log sigma(beta (log p_w / n_w - log p_l / n_l) - gamma)  (Meng 2024)     pairs      no
    orpo                    -log p_w, per token, and -beta log sigma(log odds_w - log odds_l),
                            odds = p^(1/n) / (1 - p^(1/n))                      (Hong 2024)           pairs      no
    kto                     w: 1 - sigma(beta (s - z)); l: 1 - sigma(beta (z - s)); z: an estimate of
                            KL(p, p_ref) from answers to other prompts          (Ethayarajh 2024)     labels     yes

-log sigma(difference) is a two-way softmax, `choice_loss`. The reference's log-probabilities are precomputed
(`firth.align.precompute`), in the precision of the run, so the first DPO loss is ln 2.

The losses depend on the difference and may lower the probability of both answers, so chosen and rejected are logged separately.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from annotated_types import Interval
from torch import Tensor, nn

from firth.data import attention_fields
from firth.fields import NonNegativeFloat, PositiveFloat
from firth.model import flops
from firth.model.config import ModelConfig
from firth.model.forward_context import ForwardContext
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import (
    Objective,
    choice_loss,
    forward_flops,
    forward_work,
    hidden_states,
    labeled,
    log_probs,
    num_correct,
    vocabulary_flops,
)
from firth.objectives.sft import causal_example
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Constraints, Example, Metric, Outputs, UserError, on_both

PAIR_INPUTS = frozenset({"chosen_tokens", "chosen_mask", "rejected_tokens", "rejected_mask"})
"""The fields of a chosen and a rejected answer to one prompt."""


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


def build_mismatched(example: Example) -> Example:
    """Return an answer and one to another prompt after the same prompt, as two causal rows. Fields (2, T)."""
    return attention_fields.group(
        [causal_example(example[f"{k}tokens"], example[f"{k}mask"]) for k in ("", "mismatched_")]
    )


@torch.no_grad()
def ref_logprobs(model: LM, batch: Batch) -> dict[str, Tensor]:
    """Return the summed log-probability of both answers under the reference model: {"reference": (B, 2)}."""
    return {"reference": answer_logprobs(model, batch)}


def answer_logprobs(model: LM, batch: Batch) -> Tensor:
    """Return the summed log-probability of the answer in each row: (..., T) fields -> (...)."""
    hidden = model(batch, ForwardContext(needed_positions=labeled(batch["labels"])))
    return log_probs(model, hidden, batch["labels"]).sum(-1)


def answer_lengths(batch: Batch) -> Tensor:
    """Return the number of labels in each row, at least 1: (...)."""
    return (batch["labels"] != IGNORE).sum(-1).clamp(min=1)


def pairwise_loss(scores: Tensor, preferred: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the sum of -log sigma(score_w - score_l), (B, 2) -> (), with a share of the labels flipped."""
    flipped = label_smoothing * choice_loss(-scores, preferred) if label_smoothing else 0.0
    return (1 - label_smoothing) * choice_loss(scores, preferred) + flipped


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


class PairObjective(Objective):
    """Base class of the objectives on pairs: both answers after their prompt, two rows (2, T)."""

    attention = "causal"
    inputs = PAIR_INPUTS

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"lm": LMHead(config)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return build_comparison(example) | {"preferred": np.int64(0)}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        return {"hidden": hidden_states(model, batch, labeled(batch["labels"]))}

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        total = forward_flops(model, batch, batch["labels"] != IGNORE) if forward is None else forward
        return total + vocabulary_flops(model, batch["labels"])


@dataclass(frozen=True)
class DPO(PairObjective):
    """Prefer the chosen answer over the rejected one, relative to a reference model.

    Shown: both answers after their prompt, two rows (2, T), and "reference", their log-probabilities under the reference (2,).
    Predicted: the tokens of both answers. Loss: see `loss_type`. Metrics: "accuracy", "margin" (beta times the difference of
    the log-ratios), "chosen" and "rejected" (the log-ratios, in nats).

    Args:
        beta: Strength of the penalty for leaving the reference.
        loss_type: "sigmoid", -log sigma(beta (log p/p_ref (chosen) - log p/p_ref (rejected))); or "ipo", the squared
            distance of the difference, each log-ratio divided by the answer's tokens, from 1 / (2 beta) (Azar 2024; TRL).
        label_smoothing: Share of the comparisons assumed to be labeled the wrong way round (conservative DPO, Mitchell 2023).
    """

    beta: PositiveFloat = 0.1
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0

    labels = {"dpo": "preferred"}
    metrics = {
        "accuracy": Metric("preferred"),
        "margin": Metric("preferred"),
        "chosen": Metric("preferred", remark=_remark_on_log_ratios),
        "rejected": Metric("preferred"),
    }
    inputs = PAIR_INPUTS | {"reference"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss_type == "ipo" and self.label_smoothing:
            raise UserError(
                f"objective.label_smoothing={self.label_smoothing:g} needs objective.loss_type=sigmoid: set "
                "objective.label_smoothing=0"
            )

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return super().build_example(example, vocab, rng) | {"reference": np.asarray(example["reference"], np.float32)}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        logprobs = log_probs(model, outputs["hidden"], batch["labels"]).sum(-1)  # (B, 2)
        log_ratio = logprobs - batch["reference"]
        if self.loss_type == "ipo":
            per_token = log_ratio / answer_lengths(batch)
            loss = (per_token[:, 0] - per_token[:, 1] - 1 / (2 * self.beta)).square().sum()
        else:
            loss = pairwise_loss(self.beta * log_ratio, batch["preferred"], self.label_smoothing)
        chosen, rejected = log_ratio.detach().sum(0)
        return {
            "dpo": loss,
            "accuracy": num_correct(log_ratio.detach(), batch["preferred"]),
            "margin": self.beta * (chosen - rejected),
            "chosen": chosen,
            "rejected": rejected,
        }


@dataclass(frozen=True)
class SimPO(PairObjective):
    """Prefer the chosen answer over the rejected one by its log-probability per token, without a reference model.

    Shown: both answers after their prompt, two rows (2, T). Predicted: the tokens of both answers. Loss:
    -log sigma(beta (log p(chosen) / n_chosen - log p(rejected) / n_rejected) - gamma). Metrics: "accuracy", "margin" (beta
    times the difference), "chosen_logprob" and "rejected_logprob" (nats per token).

    Args:
        beta: Scale of the log-probabilities per token.
        gamma: Margin by which the chosen answer should be better.
        label_smoothing: Share of the comparisons assumed to be labeled the wrong way round.
    """

    beta: PositiveFloat = 2.0
    gamma: NonNegativeFloat = 1.0
    label_smoothing: Annotated[float, Interval(ge=0, lt=0.5)] = 0.0

    labels = {"simpo": "preferred"}
    metrics = {name: Metric("preferred") for name in ("accuracy", "margin", "chosen_logprob", "rejected_logprob")}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        per_token = log_probs(model, outputs["hidden"], batch["labels"]).sum(-1) / answer_lengths(batch)  # (B, 2)
        scores = self.beta * per_token - per_token.new_tensor([self.gamma, 0.0])
        return {"simpo": pairwise_loss(scores, batch["preferred"], self.label_smoothing)} | _per_token_metrics(
            per_token, batch["preferred"], self.beta
        )


@dataclass(frozen=True)
class ORPO(PairObjective):
    """Finetune on the chosen answer and make its odds larger than those of the rejected one, without a reference model.

    Shown: both answers after their prompt, two rows (2, T). Predicted: the tokens of both answers. Loss: "tokens", the mean of
    -log p over the tokens of the chosen answers; and "odds", -beta log sigma(log odds(chosen) - log odds(rejected)), where
    odds(y) = q / (1 - q) and log q is the log-probability of y per token. Metrics: "accuracy", "margin" (beta times the
    difference of the log-probabilities per token), "chosen_logprob" and "rejected_logprob" (nats per token).

    Args:
        beta: Weight of the odds ratio (lambda in the paper).
    """

    beta: PositiveFloat = 0.1

    labels = {"tokens": "chosen_labels", "odds": "preferred"}
    metrics = {name: Metric("preferred") for name in ("accuracy", "margin", "chosen_logprob", "rejected_logprob")}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        built = super().build_example(example, vocab, rng)
        chosen = np.where(np.array([[True], [False]]), built["labels"], IGNORE)
        return built | {"chosen_labels": chosen}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        logprobs = log_probs(model, outputs["hidden"], batch["labels"]).sum(-1)  # (B, 2)
        per_token = logprobs / answer_lengths(batch)
        # A memorized answer has a probability of 1, up to rounding, and infinite odds.
        below = per_token.clamp(max=-torch.finfo(per_token.dtype).eps)
        log_odds = below - torch.log(-torch.expm1(below))
        return {
            "tokens": -logprobs[:, 0].sum(),
            "odds": self.beta * choice_loss(log_odds, batch["preferred"]),
        } | _per_token_metrics(per_token, batch["preferred"], self.beta)


def _per_token_metrics(per_token: Tensor, preferred: Tensor, beta: float) -> dict[str, Tensor]:
    """Return the metrics of an objective without reference: (B, 2) log-probabilities per token -> sums."""
    chosen, rejected = per_token.detach().sum(0)
    return {
        "accuracy": num_correct(per_token.detach(), preferred),
        "margin": beta * (chosen - rejected),
        "chosen_logprob": chosen,
        "rejected_logprob": rejected,
    }


@dataclass(frozen=True)
class KTO(Objective):
    """Make desirable answers more likely and undesirable ones less likely, relative to a reference model.

    Shown: an answer and, after the same prompt, the answer to another prompt, two rows (2, T); "reference", their
    log-probabilities under the reference (2,). Predicted: the tokens of the answer. Loss: 1 - sigma(beta (s - z)) for a
    desirable and 1 - sigma(beta (z - s)) for an undesirable answer, each times its weight; s is the log-ratio, and z the mean
    log-ratio of the step's mismatched answers, at least 0, without gradient: an estimate of KL(p, p_ref). Metrics:
    "accuracy" (the share of answers on the right side of z), "kl_per_answer" (z), "chosen" and "rejected" (the log-ratios of
    desirable and undesirable answers, in nats).

    A step is one batch, since all its answers share z: micro-batches and ranks are rejected.

    Args:
        beta: Strength of the penalty for leaving the reference.
        desirable_weight: Weight of desirable answers.
        undesirable_weight: Weight of undesirable answers. Where one kind has more records, choose the weights so that
            (desirable_weight * desirable records) / (undesirable_weight * undesirable records) is 1 to 4/3.
    """

    beta: PositiveFloat = 0.1
    desirable_weight: PositiveFloat = 1.0
    undesirable_weight: PositiveFloat = 1.0

    labels = {"kto": "desirable"}
    metrics = {
        "accuracy": Metric("desirable"),
        "kl_per_answer": Metric("desirable"),
        "chosen": Metric("is_desirable"),
        "rejected": Metric("is_undesirable"),
    }
    attention = "causal"
    inputs = frozenset({"tokens", "mask", "mismatched_tokens", "mismatched_mask", "desirable", "reference"})
    constraints = Constraints(needs_full_batch=True)

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"lm": LMHead(config)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        desirable = bool(example["desirable"][0])
        return build_mismatched(example) | {
            "reference": np.asarray(example["reference"], np.float32),
            "desirable": np.int64(desirable),  # 0 or 1
            "is_desirable": np.int64(1 if desirable else IGNORE),
            "is_undesirable": np.int64(IGNORE if desirable else 1),
        }

    def forward(self, model: LM, batch: Batch) -> Outputs:
        own, other = _rows(batch, 0), _rows(batch, 1)
        with torch.no_grad():
            mismatched = answer_logprobs(model, other)
        return {"hidden": hidden_states(model, own, labeled(own["labels"])), "mismatched": mismatched}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        logprobs = log_probs(model, outputs["hidden"], batch["labels"][:, 0]).sum(-1)  # (B,)
        log_ratio = logprobs - batch["reference"][:, 0]
        kl = (outputs["mismatched"] - batch["reference"][:, 1]).mean().clamp(min=0)
        desirable = batch["desirable"] == 1
        sign = torch.where(desirable, 1.0, -1.0)
        weight = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        values = F.sigmoid(self.beta * sign * (log_ratio - kl))
        known = log_ratio.detach()
        return {
            "kto": (weight * (1 - values)).sum(),
            "accuracy": (sign * (known - kl) > 0).sum().float(),
            "kl_per_answer": kl * len(known),
            "chosen": known.where(desirable, 0).sum(),
            "rejected": known.where(~desirable, 0).sum(),
        }

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        own, other = _rows(batch, 0), _rows(batch, 1)
        total = forward_flops(model, own, own["labels"] != IGNORE) if forward is None else forward
        work = forward_work(model, other, other["labels"] != IGNORE)
        head = flops.head_flops(model.config, flops.supervised_positions(other["labels"]))
        # The pass over mismatched answers is forward only, a third of a step.
        return total + vocabulary_flops(model, own["labels"]) + (flops.stack_flops(model.config, work) + head) / 3


def _rows(batch: Batch, index: int) -> Batch:
    """Return one row of each group as a batch: (B, 2, T) -> (B, T)."""
    return {name: on_both(lambda x: x[:, index], field) for name, field in batch.items() if field.ndim == 3}
