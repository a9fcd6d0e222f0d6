"""Policy gradients: PPO and REINFORCE.

Proximal policy optimization: several bounded steps on the same samples (Schulman 2017; Ziegler 2019; Ouyang 2022).

A row is one sampled answer with per-token numbers that the rollout computes once (`firth.align.rollouts`): the
log-probability under the policy that sampled it (`old`) and under the frozen initial policy (`reference`), the value
estimate (`values`), the advantage and the return. With ratio = p(token) / p_old(token):

    policy   -min(ratio * advantage, clip(ratio, 1 - c, 1 + c) * advantage)
    value     coef * 1/2 max((v - return)^2, (clip(v, values - c', values + c') - return)^2)

The penalty beta * KL(p || p_ref) is part of the reward, token by token (the rollout subtracts it), not of the loss.
The critic is a model of its own, as large as the policy (Ouyang 2022, appendix C.4): `init_critic` gives it the weights
of the reward model, and `optimizer.critic_lr` is its learning rate. critic="shared" is a linear head on the policy's
transformer stack: half the memory, and measured to learn next to nothing (docs/results/index.md).

Differences from the original: no entropy bonus, as in InstructGPT; KL estimates are of the non-negative kind (Schulman
2020, "Approximating KL divergence", k3).

REINFORCE, the policy gradient: make rewarded answers more likely (Williams 1992).

    grad E[R(s)] = E[(R(s) - b) grad log p(s)]          for s drawn from p itself, b any number that does not depend on s

A row is one sampled answer with its advantage R - b, which the rollout computes (`firth.align.rollouts`). The loss is
-advantage * log p(s), summed over the answer's tokens and averaged over *answers*, not tokens: dividing by tokens would
weight an answer by the others' lengths and would no longer be the gradient of the expected reward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from firth.fields import NonNegativeFloat, PositiveFloat
from firth.model import flops
from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM, Critic
from firth.objectives.objective import Objective, forward_flops, hidden_states, log_probs, supervised, vocabulary_flops
from firth.objectives.sft import causal_example
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Metric, Outputs

PER_TOKEN = ("old", "reference", "values", "advantage", "returns")
"""The numbers of each sampled token, aligned with `tokens`; `PPO.build_example` shifts them as it shifts the labels."""


def value_head(width: int) -> nn.Linear:
    """Return a scalar head initialized to zero: the first advantages are then the discounted rewards themselves."""
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def has_critic(model: LM) -> bool:
    """Return whether the model estimates values, with a critic or with a head on its own transformer stack."""
    return "critic" in model.heads or "value" in model.heads


def critic_states(model: LM, hidden: Tensor, batch: Batch) -> Tensor:
    """Return the inputs of the value head: the critic's states, or `hidden` for a head on the policy."""
    states: Tensor = model.heads["critic"](batch) if "critic" in model.heads else hidden
    return states


def values(model: LM, states: Tensor) -> Tensor:
    """Return the value of each state: (..., hidden_size) -> (...) float32."""
    head: nn.Module = model.heads["critic"].heads["value"] if "critic" in model.heads else model.heads["value"]  # type: ignore[index, assignment]
    out: Tensor = head(states)[..., 0].float()
    return out


@torch.no_grad()
def init_critic(model: LM, weights: LM, mean: float = 0.0, scale: float = 1.0) -> bool:
    """Initialize the model's critic from another model, and its value head from a reward head as (reward - mean) / scale.

    Args:
        model: The policy with its critic.
        weights: The model to copy: its transformer stack, and its reward head if it has one.
        mean: Subtracted from the reward.
        scale: The reward is divided by it.

    Returns:
        False, with nothing changed, if the model has no critic or the tensor shapes differ.
    """
    if "critic" not in model.heads:
        return False
    critic: LM = model.heads["critic"]  # type: ignore[assignment]
    target, source = (
        {name: tensor for name, tensor in one.state_dict().items() if not name.startswith("heads.")}
        for one in (critic, weights)
    )
    if {n: t.shape for n, t in target.items()} != {n: t.shape for n, t in source.items()}:
        return False
    for name, tensor in target.items():
        tensor.copy_(source[name])
    if "reward" in weights.heads:
        head: nn.Linear = critic.heads["value"]  # type: ignore[assignment]
        head.weight.copy_(weights.heads["reward"].weight / scale)  # type: ignore[arg-type, operator]
        head.bias.fill_(-mean / scale)
    return True


def kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the k3 estimate of KL(p || q) from tokens that p sampled, unbiased and never negative: q/p - 1 - log q/p.

    Args:
        logprobs: log p(token), any shape.
        ref_logprobs: log q(token), the same shape.
    """
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


@dataclass(frozen=True)
class PPO(Objective):
    """Improve the policy on sampled answers, with bounded steps, and fit the critic: "tokens", "mask" and PER_TOKEN, each (n,).

    Shown: prompt and answer. Predicted: the sampled tokens, which the mask covers, and the value at each. Loss:
    -min(ratio * advantage, clip(ratio, 1 - c, 1 + c) * advantage) plus the value loss, both per sampled token.

    Args:
        clip_range: c: how far a token's probability may move, as a ratio, before its gradient stops.
        value_clip_range: The same for the value, in units of reward; 0 for none.
        value_coef: Weight of the value loss.
        critic: "own", a separate model, or "shared", a head on the policy.

    >>> vocab = Vocab(size=10, roles={"pad": 0}, special=np.arange(10) < 1)
    >>> drawn = {"tokens": np.array([5, 6, 7]), "mask": np.array([False, True, True])}
    >>> drawn |= {name: np.array([0.0, 0.1, 0.2], np.float32) for name in PER_TOKEN}
    >>> seen = PPO().build_example(drawn, vocab, np.random.default_rng(0))
    >>> seen["labels"].tolist(), [round(float(x), 1) for x in seen["old"]]
    ([6, 7], [0.1, 0.2])
    """

    clip_range: PositiveFloat = 0.2
    value_clip_range: NonNegativeFloat = 0.2
    value_coef: NonNegativeFloat = 0.1
    critic: Literal["own", "shared"] = "own"

    labels = {"policy": "labels", "value": "labels"}
    metrics = {
        "kl_per_token": Metric("labels"),
        "approx_kl": Metric("labels"),
        "entropy": Metric("labels"),
        "clipped": Metric("labels"),
        "value_error": Metric("labels"),
    }

    inputs = frozenset({"tokens", "mask", *PER_TOKEN})
    attention = "causal"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        value: dict[str, nn.Module] = {"value": value_head(config.hidden_size)}
        heads: dict[str, nn.Module] = {"lm": LMHead(config)}
        if self.critic == "shared":
            return heads | value
        with torch.random.fork_rng(
            devices=[]
        ):  # its weights are replaced: the policy's do not depend on its random numbers
            return heads | {"critic": Critic(config, value)}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        hidden = hidden_states(model, batch)
        return {"hidden": hidden, "critic": critic_states(model, hidden, batch)}

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        critic = flops.stack_flops(model.config, flops.work(batch)) if "critic" in model.heads else 0.0
        total = forward_flops(model, batch) + flops.trained_share(model) * critic if forward is None else forward
        return total + vocabulary_flops(model, batch["labels"])

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        shifted = {name: example[name][1:] for name in PER_TOKEN}
        return causal_example(example["tokens"], example["mask"]) | shifted

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return sums over the sampled tokens.

        Metrics: `kl_per_token` to the reference and `entropy`, both reweighted to the current policy; `approx_kl`, its KL from
        the policy that sampled (k3); `clipped`, the tokens whose gradient the clip has stopped; `value_error`, the squared
        distance to the return.
        """
        head: LMHead = model.heads["lm"]  # type: ignore[assignment]
        states, labels = supervised(outputs["hidden"], batch["labels"])  # (N, width), (N,)
        at = batch["labels"] != IGNORE
        old_logprobs, ref_logprobs, old_values, advantage, returns = (batch[name][at] for name in PER_TOKEN)
        logprobs = head.log_probs(states, labels)
        ratio = (logprobs - old_logprobs).exp()
        surrogate = ratio * advantage
        clipped_surrogate = ratio.clamp(1 - self.clip_range, 1 + self.clip_range) * advantage
        value = values(model, outputs["critic"][at])
        error = (value - returns) ** 2
        value_loss = error
        if self.value_clip_range:
            clipped = old_values + (value - old_values).clamp(-self.value_clip_range, self.value_clip_range)
            value_loss = torch.maximum(error, (clipped - returns) ** 2)
        with torch.no_grad():
            metrics = {
                "kl_per_token": (ratio * kl(logprobs, ref_logprobs)).sum(),
                "approx_kl": (ratio - 1 - (logprobs - old_logprobs)).sum(),
                "entropy": -(ratio * logprobs).sum(),
                "clipped": (clipped_surrogate < surrogate).float().sum(),
                "value_error": error.sum(),
            }
        return {
            "policy": -torch.minimum(surrogate, clipped_surrogate).sum(),
            "value": self.value_coef * 0.5 * value_loss.sum(),
        } | metrics


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
