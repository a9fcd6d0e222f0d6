"""REINFORCE, the policy gradient: make rewarded answers more likely (Williams 1992).

    grad E[R(s)] = E[(R(s) - b) grad log p(s)]          for s drawn from p itself, b any number that does not depend on s

A row is one sampled answer with its advantage R - b, which the rollout computes (`firth.align.rollouts`). The loss is
-advantage * log p(s), summed over the answer's tokens and averaged over *answers*, not tokens: dividing by tokens would
weight an answer by the others' lengths and would no longer be the gradient of the expected reward.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import Objective, forward_flops, hidden_states, log_probs, vocabulary_flops
from firth.objectives.sft import causal_example
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Metric, Outputs


@dataclass(frozen=True)
class Reinforce(Objective):
    """Make sampled answers more or less likely by their advantage: {"tokens", "mask", "advantage"}, each (n,).

    Shown: prompt and answer. Predicted: the sampled tokens, which the mask covers. Loss: -advantage * log p(answer).
    `answer_labels` holds a 0 at the last supervised position, so that it counts answers, in packed rows too. Metric:
    "surprise", -log p of the sampled tokens.

    >>> vocab = Vocab(size=10, roles={"pad": 0}, special=np.arange(10) < 1)
    >>> drawn = {"tokens": np.array([5, 6, 7]), "mask": np.array([False, True, True]),
    ...          "advantage": np.array([0.0, 1.5, 1.5], np.float32)}
    >>> seen = Reinforce().build_example(drawn, vocab, np.random.default_rng(0))
    >>> seen["labels"].tolist(), seen["advantage"].tolist(), seen["answer_labels"].tolist()
    ([6, 7], [1.5, 1.5], [-100, 0])
    """

    labels = {"policy": "answer_labels"}
    metrics = {"surprise": Metric("labels")}

    inputs = frozenset({"tokens", "mask", "advantage"})
    attention = "causal"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"lm": LMHead(config)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        seen = causal_example(example["tokens"], example["mask"])
        answer_labels = np.full(len(seen["labels"]), IGNORE)
        answer_labels[np.flatnonzero(example["mask"][1:])[-1]] = 0
        return seen | {"advantage": example["advantage"][1:], "answer_labels": answer_labels}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        return {"hidden": hidden_states(model, batch)}  # whole rows, as the rollout ran the model

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        logprobs = log_probs(model, outputs["hidden"], batch["labels"])  # (B, T), 0 where there is no label
        return {"policy": -(logprobs * batch["advantage"]).sum(), "surprise": -logprobs.detach().sum()}

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        total = forward_flops(model, batch) if forward is None else forward
        return total + vocabulary_flops(model, batch["labels"])
