"""Reward model: one score for an answer, learned from which of several answers people preferred.

The score is a linear map of the hidden state at the answer's last token. A comparison is a group of rows `(2, T)` and its loss
-log sigma(r_chosen - r_rejected) is a two-way softmax (Bradley & Terry 1952; Christiano 2017). A ranking of K answers is a
group `(K, T)`: the mean over all its pairs, one group counting as one example, so that K answers to one prompt do not weigh
as K(K-1)/2 independent ones (Ouyang 2022, section 3.5); or Plackett-Luce, the likelihood of the whole order.

    chosen   <s> how are you <e> well , thanks <e>      r = +1.2
    rejected <s> how are you <e> no <e>                 r = -0.3      loss = log(1 + exp(-1.5)) = 0.20
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.data import attention_fields
from firth.fields import NonNegativeFloat, NonNegativeInt
from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.objectives.objective import Objective, choice_loss, forward_flops, hidden_states, num_correct
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, NEVER, Batch, DataStats, Example, Metric, Outputs, UserError


def reward_head(width: int) -> nn.Linear:
    """Return a scalar head initialized at about unit scale (Stiennon 2020), without bias: only differences are learned."""
    head = nn.Linear(width, 1, bias=False)
    nn.init.normal_(head.weight, std=(width + 1) ** -0.5)
    return head


def answer_row(tokens: np.ndarray, mask: np.ndarray) -> Example:
    """Return the row up to the last token of the answer, where the reward is read.

    What follows it (a line break of the chat template) is missing when a sampled answer is scored.
    """
    end = int(np.flatnonzero(mask)[-1]) + 1
    return {"tokens": tokens[:end]} | attention_fields.causal(end)


def last_token_mask(batch: Batch) -> Tensor:
    """Return a mask of the last token of each row that is not padding, (..., T) bool."""
    real = batch["key_time"] != NEVER
    at = real.shape[-1] - 1 - real.flip(-1).int().argmax(-1, keepdim=True)
    return torch.zeros_like(real).scatter(-1, at, True)


def last_state(hidden: Tensor, batch: Batch) -> Tensor:
    """Return the hidden state at the last token that is not padding: (..., T, hidden_size) -> (..., hidden_size)."""
    at = last_token_mask(batch).byte().argmax(-1)[..., None, None]
    return hidden.gather(-2, at.expand(*at.shape[:-1], hidden.shape[-1])).squeeze(-2)


def rewards(model: LM, hidden: Tensor, batch: Batch) -> Tensor:
    """Return one reward per row: (..., T, hidden_size) -> (...) float32."""
    scores: Tensor = model.heads["reward"](last_state(hidden, batch))
    return scores[..., 0].float()


def pair_margins(model: LM, outputs: Outputs, batch: Batch) -> Tensor:
    """Return the reward of the preferred answer minus that of the other, for groups of two that have a preferred one: (N,)."""
    known = batch["preferred"] != IGNORE
    scores, preferred = rewards(model, outputs["hidden"], batch)[known], batch["preferred"][known, None]
    return (scores.gather(1, preferred) - scores.gather(1, 1 - preferred))[:, 0]


@dataclass(frozen=True)
class RewardObjective(Objective):
    """Base class of the objectives of a reward model: a group of answers to one prompt is scored.

    Args:
        center_rewards_coefficient: Weight of the mean squared sum of the two rewards of a pair, which keeps rewards near 0: a
            comparison leaves their sum free (Eisenstein 2023). 0.01 is usual; 0 for none.
    """

    center_rewards_coefficient: NonNegativeFloat = 0.0

    metrics = {"accuracy": Metric("preferred"), "margin": Metric("preferred")}
    attention = "causal"

    @property
    def labels(self) -> Mapping[str, str]:
        return {"reward": "preferred"} | ({"center": "preferred"} if self.center_rewards_coefficient else {})

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"reward": reward_head(config.hidden_size)}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        return {"hidden": hidden_states(model, batch, last_token_mask(batch))}

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        return forward_flops(model, batch, last_token_mask(batch)) if forward is None else forward

    def centering(self, squared_sums: Tensor) -> dict[str, Tensor]:
        """Return the term that keeps rewards near 0, from (r_chosen + r_rejected)^2 of each example, (B,)."""
        coefficient = self.center_rewards_coefficient
        return {"center": coefficient * squared_sums.sum()} if coefficient else {}


@dataclass(frozen=True)
class RewardModeling(RewardObjective):
    """Learn a reward from comparisons.

    Shown: both answers after their prompt, a group of two rows. Predicted: which one is preferred. Loss:
    -log sigma(r_chosen - r_rejected - margin). Metric: "margin", r_chosen - r_rejected.

    Args:
        margin_weight: Factor of the `margin` of a record, by which the chosen answer should be better (Touvron 2023, section
            3.2.2). 1 takes it as it is (TRL); 0 ignores it.

    >>> vocab = Vocab(size=10, roles={"pad": 0}, special=np.arange(10) < 1)
    >>> on = np.ones(3, bool)
    >>> pair = {"chosen_tokens": np.array([5, 6, 7]), "chosen_mask": on,
    ...         "rejected_tokens": np.array([5, 8]), "rejected_mask": on[:2]}
    >>> seen = RewardModeling().build_example(pair, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["key_time"].tolist(), int(seen["preferred"])
    ([[5, 6, 7], [5, 8, 0]], [[0, 1, 2], [0, 1, 1073741824]], 0)
    """

    margin_weight: NonNegativeFloat = 0.0

    @property
    def inputs(self) -> frozenset[str]:
        pair = frozenset({"chosen_tokens", "chosen_mask", "rejected_tokens", "rejected_mask"})
        return pair | {"margin"} if self.margin_weight else pair

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        rows = [answer_row(example[f"{k}_tokens"], example[f"{k}_mask"]) for k in ("chosen", "rejected")]
        built = attention_fields.group(rows) | {"preferred": np.int64(0)}
        if not self.margin_weight:
            return built
        margin = np.float32(example["margin"][0])
        if np.isnan(margin):
            raise UserError(
                f"a preference has no `margin`, and objective.margin_weight={self.margin_weight:g} needs one in every "
                "record: add it, or set objective.margin_weight=0"
            )
        return built | {"expected_margin": self.margin_weight * margin}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        scores = rewards(model, outputs["hidden"], batch)  # (B, 2)
        compared = scores
        if "expected_margin" in batch:
            compared = torch.stack((scores[:, 0] - batch["expected_margin"], scores[:, 1]), -1)
        return {
            "reward": choice_loss(compared, batch["preferred"]),
            "accuracy": num_correct(scores, batch["preferred"]),
            "margin": (scores[:, 0] - scores[:, 1]).detach().sum(),
        } | self.centering(scores.sum(-1).square())


@dataclass(frozen=True)
class Ranking(RewardObjective):
    """Learn a reward from rankings of K answers to one prompt: {"answers": K rows of tokens, "masks", "rank" (K,)}, rank 0 the best.

    Shown: all answers after their prompt, a group of K rows. Predicted: their order; equal ranks are ties and are not compared.
    Loss for "pairs": the mean of -log sigma(r_i - r_j) over the pairs with rank_i < rank_j, so that K = 2 is
    `RewardModeling`; for "order": the negative log-likelihood of Plackett-Luce, which chooses the best among all, the next
    among the rest (answers of equal rank are not compared).

    Args:
        num_answers: Rows of a group, at least the longest ranking of the data (0: as many). A shorter ranking repeats its
            first row, which is then compared with nothing.
        likelihood: "pairs" or "order".
    """

    num_answers: NonNegativeInt = 0
    likelihood: Literal["pairs", "order"] = "pairs"

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Self:
        return self if self.num_answers else replace(self, num_answers=stats().max_options)

    inputs = frozenset({"answers", "masks", "rank"})

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        rank = np.asarray(example["rank"], np.int64)
        size = self.num_answers or len(rank)
        if not 2 <= len(rank) <= size:
            raise UserError(
                f"a ranking of {len(rank)} answers does not fit into a group of 2 to {size}: set `num_answers`"
            )
        absent = size - len(rank)
        rows = [answer_row(t, m) for t, m in zip(example["answers"], example["masks"], strict=True)]
        # All answers tied: nothing to learn, and the group is not counted.
        preferred = int(rank.argmin()) if len(set(rank.tolist())) > 1 else IGNORE
        ranked = np.concatenate((rank, np.full(absent, IGNORE)))
        return attention_fields.group(rows + rows[:1] * absent) | {"rank": ranked, "preferred": np.int64(preferred)}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        scores, rank = rewards(model, outputs["hidden"], batch), batch["rank"]  # (B, K)
        real = rank != IGNORE
        better = (rank[:, :, None] < rank[:, None, :]) & real[:, :, None] & real[:, None, :]  # (B, K, K)
        difference = scores[:, :, None] - scores[:, None, :]
        pairs = better.sum((1, 2)).clamp(min=1)
        if self.likelihood == "pairs":
            loss = -(F.logsigmoid(difference) * better).sum((1, 2)) / pairs
        else:
            # -log p(order) = sum over answers i of logsumexp(r_i and every worse r_j) - r_i; the worst adds nothing.
            rest = better | torch.eye(scores.shape[1], dtype=torch.bool, device=scores.device)
            loss = ((-difference).masked_fill(~rest, float("-inf")).logsumexp(-1) * real).sum(-1)
        squared = (scores[:, :, None] + scores[:, None, :]).square()
        return {
            "reward": loss.sum(),
            "accuracy": (((difference > 0) & better).sum((1, 2)) / pairs).sum(),
            "margin": ((difference.detach() * better).sum((1, 2)) / pairs).sum(),
        } | self.centering((squared * better).sum((1, 2)) / pairs)
