"""Proximal policy optimisation: several careful steps on the same samples (Schulman 2017; Ziegler 2019; Ouyang 2022).

A row is one sampled answer, with per-token numbers written once by the source that drew it (`firth.align.rollouts`):
the log-probability under the policy that drew it (`old`) and under the frozen starting point (`reference`), the value
estimate (`values`), the advantage and the return. With ratio = p(token) / p_old(token):

    policy   -min(ratio * advantage, clip(ratio, 1 - c, 1 + c) * advantage)
    value     weight * 1/2 max((v - return)^2, (clip(v, values - c', values + c') - return)^2)

The penalty beta * KL(p || p_ref) is inside the reward, token by token (the source subtracts it), not in the loss.
The critic is a model of its own, as large as the policy (Ouyang 2022, appendix C.4): `start_critic` gives it the weights
of the reward model, and `optimizer.critic_lr` is its learning rate. critic="shared" is a linear head on the policy's
own trunk: half the memory, and measured to learn next to nothing (docs/results/index.md).

Differences from the original: no entropy bonus, as in InstructGPT; estimates of KL are of the non-negative kind (Schulman
2020, "Approximating KL divergence", k3).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn

from firth.model import flops
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import Objective, supervised, vocabulary_flops
from firth.objectives.sft import answer
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs
from firth.validated import NonNegativeFloat, PositiveFloat

PER_TOKEN = ("old", "reference", "values", "advantage", "returns")
"""The numbers a sampled token carries, aligned with `tokens`; a view shifts them as it shifts the labels."""


def value_head(width: int) -> nn.Linear:
    """A scalar reading that starts at zero: the first advantages are then the discounted rewards themselves."""
    head = nn.Linear(width, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def has_critic(model: LM) -> bool:
    """Whether the model estimates values, with a critic or with a head on its own trunk."""
    return "critic" in model.heads or "value" in model.heads


def critic_states(model: LM, hidden: Tensor, batch: Batch) -> Tensor:
    """The states that the value head reads: those of the critic, or `hidden` where the policy's trunk serves it."""
    states: Tensor = model.heads["critic"](batch) if "critic" in model.heads else hidden
    return states


def values(model: LM, states: Tensor) -> Tensor:
    """The value of each state: (..., width) -> (...) float32."""
    head: nn.Module = model.heads["critic"].heads["value"] if "critic" in model.heads else model.heads["value"]  # type: ignore[index, assignment]
    found: Tensor = head(states)[..., 0].float()
    return found


@torch.no_grad()
def start_critic(model: LM, weights: LM, mean: float = 0.0, scale: float = 1.0) -> bool:
    """Copy the trunk of `weights` into the model's critic, and its reward head, if it has one, as (reward - mean) / scale.

    Returns:
        False, with nothing changed, if the model has no critic or the shapes differ.
    """
    if "critic" not in model.heads:
        return False
    critic: LM = model.heads["critic"]  # type: ignore[assignment]
    mine, theirs = (
        {name: tensor for name, tensor in one.state_dict().items() if not name.startswith("heads.")}
        for one in (critic, weights)
    )
    if {n: t.shape for n, t in mine.items()} != {n: t.shape for n, t in theirs.items()}:
        return False
    for name, tensor in mine.items():
        tensor.copy_(theirs[name])
    if "reward" in weights.heads:
        head: nn.Linear = critic.heads["value"]  # type: ignore[assignment]
        head.weight.copy_(weights.heads["reward"].weight / scale)  # type: ignore[arg-type, operator]
        head.bias.fill_(-mean / scale)
    return True


def kl(towards: Tensor, away: Tensor) -> Tensor:
    """An unbiased, never negative estimate of KL(p || q) from a token that p drew: q/p - 1 - log q/p.

    towards = log p(token), away = log q(token); any shape.
    """
    apart = away - towards
    return torch.expm1(apart) - apart


@dataclass(frozen=True)
class PPO(Objective):
    """An answer, the mask of its sampled tokens and PER_TOKEN, each (n,).

    clip: how far a token's probability may move, as a ratio, before its gradient stops. clip_value: the same for the
    value, in units of reward; 0 for none. value: the weight of the value loss. critic: "own", a model of its own, or
    "shared", a head on the policy's trunk. dropout: apply the model's dropout; the first ratios are then not 1.

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
    dropout: bool = False

    precomputed_fields: ClassVar[frozenset[str]] = frozenset({"old", "reference", "values"})
    labels: ClassVar[dict[str, str]] = {"policy": "labels", "value": "labels"}
    metrics: ClassVar[dict[str, str]] = {
        "kl_per_token": "labels",
        "moved": "labels",
        "entropy": "labels",
        "clipped": "labels",
        "value_error": "labels",
    }

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset({"tokens", "mask", *PER_TOKEN})

    def attention_pattern(self) -> AttentionPattern:
        return "causal"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        value: dict[str, nn.Module] = {"value": value_head(config.hidden_size)}
        parts: dict[str, nn.Module] = {"lm": LMHead(config)}
        if self.critic == "shared":
            return parts | value
        with torch.random.fork_rng(devices=[]):  # its weights will be copied: the policy's draws do not depend on it
            return parts | {"critic": LM(config, value)}

    def finalize(self, model: LM) -> None:
        """The exported model is the policy alone: a critic is of use to its own run only, and as large."""
        if "critic" in model.heads:
            del model.heads["critic"]

    def forward(self, model: LM, batch: Batch) -> Outputs:
        outputs = super().forward(model, batch)
        return outputs | {"critic": critic_states(model, outputs["hidden"], batch)}

    def forward_flops(self, model: LM, batch: Batch) -> float:
        own = flops.stack_flops(model.config, flops.work(batch)) if "critic" in model.heads else 0.0
        return super().forward_flops(model, batch) + own

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        shifted = {name: example[name][1:] for name in PER_TOKEN}
        return answer(example["tokens"], example["mask"]) | shifted

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Sums over the sampled tokens. Measured: `kl_per_token` to the reference and `entropy`, both reweighted to the policy as it is
        now; `moved`, its KL from the policy that drew the samples (k3); `clipped`, the tokens whose gradient the clip has
        stopped; `value_error`, the squared distance to the return."""
        head: LMHead = model.heads["lm"]  # type: ignore[assignment]
        states, labels = supervised(outputs["hidden"], batch["labels"])  # (N, width), (N,)
        at = batch["labels"] != IGNORE
        old, reference, before, advantage, returns = (batch[name][at] for name in PER_TOKEN)
        now = head.log_probs(states, labels)
        ratio = (now - old).exp()
        free, held = ratio * advantage, ratio.clamp(1 - self.clip_range, 1 + self.clip_range) * advantage
        value = values(model, outputs["critic"][at])
        error = (value - returns) ** 2
        worst = error
        if self.value_clip_range:
            near = before + (value - before).clamp(-self.value_clip_range, self.value_clip_range)
            worst = torch.maximum(error, (near - returns) ** 2)
        with torch.no_grad():
            measures = {
                "kl_per_token": (ratio * kl(now, reference)).sum(),
                "moved": (ratio - 1 - (now - old)).sum(),
                "entropy": -(ratio * now).sum(),
                "clipped": (held < free).float().sum(),
                "value_error": error.sum(),
            }
        return {"policy": -torch.minimum(free, held).sum(), "value": self.value_coef * 0.5 * worst.sum()} | measures

    def loss_flops(self, model: LM, batch: Batch) -> float:
        return vocabulary_flops(model, batch["labels"])
