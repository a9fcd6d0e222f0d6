"""Policy gradients: PPO, GRPO, RLOO and REINFORCE.

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

Differences from the original: no entropy bonus, as in InstructGPT; logged KL estimates are of the non-negative kind (k3,
`kl_estimate`).

PPO-ptx (Ouyang 2022, appendix C.4) adds the loss of pretraining on text: a row without a mask is text, and its next-token
loss, a mean over its tokens, is added with the weight `ptx_coef`. `examples.pretraining_path` names the text.

GRPO (Shao 2024) has no critic: the advantage of an answer is its reward in comparison with the other answers to the same
prompt (`firth.align.advantages.GroupNormalized`), the same for all of its tokens. RLOO (Ahmadian 2024) takes a whole answer
as one action: one ratio, that of the probabilities of the answers. Both equal TRL's losses of the same name (tests/oracles).

REINFORCE, the policy gradient: make rewarded answers more likely (Williams 1992).

    grad E[R(s)] = E[(R(s) - b) grad log p(s)]          for s drawn from p itself, b any number that does not depend on s

A row is one sampled answer with its advantage R - b, which the rollout computes (`firth.align.rollouts`). The loss is
-advantage * log p(s), summed over the answer's tokens and averaged over *answers*, not tokens: dividing by tokens would
weight an answer by the others' lengths and would no longer be the gradient of the expected reward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from firth.fields import NonNegativeFloat, NonNegativeInt, PositiveFloat
from firth.model import flops
from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.init import fork_rng
from firth.model.model import LM, Critic
from firth.model.shard_tensors import assign
from firth.objectives.causal_lm import CausalLM
from firth.objectives.objective import (
    Objective,
    forward_flops,
    hidden_states,
    label_indices,
    log_probs,
    token_loss,
    vocabulary_flops,
)
from firth.objectives.sft import causal_example
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, DataStats, Example, Metric, Outputs, host_copy

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
        assign(tensor, source[name])
    if "reward" in weights.heads:
        head: nn.Linear = critic.heads["value"]  # type: ignore[assignment]
        assign(head.weight, weights.heads["reward"].weight / scale)  # type: ignore[arg-type, operator]
        assign(head.bias, torch.full_like(head.bias, -mean / scale))
    return True


KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Estimate KL(p || q) from tokens that p sampled (Schulman 2020, "Approximating KL divergence").

    With d = log p - log q: k1 is d, unbiased, and negative for some tokens; k2 is d^2 / 2, biased, with the gradient of the
    divergence itself if p sampled the tokens; k3 is exp(-d) - 1 + d, unbiased and never negative.

    Args:
        logprobs: log p(token), any shape.
        ref_logprobs: log q(token), the same shape.
        estimator: The estimator.

    >>> p, q = torch.tensor(0.5).log(), torch.tensor(0.25).log()
    >>> [round(float(kl_estimate(p, q, name)), 4) for name in ("k1", "k2", "k3")]
    [0.6931, 0.2402, 0.1931]
    """
    log_ratio = ref_logprobs - logprobs
    if estimator == "k1":
        return -log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    return torch.expm1(log_ratio) - log_ratio


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Return min(r * advantage, clip(r, 1 - low, 1 + high) * advantage) with r = exp(log_ratio), and where the clip applies."""
    ratio = log_ratio.exp()
    free, clipped = ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage
    return torch.minimum(free, clipped), clipped < free


@dataclass(frozen=True, kw_only=True)
class PolicyObjective(Objective):
    """Base class of the objectives that improve a policy on sampled answers: "tokens", "mask" and numbers per token, each (n,).

    Args:
        ptx_coef: Weight of the next-token loss on rows of text, which have "tokens" alone (PPO-ptx); 0 for none.
    """

    ptx_coef: NonNegativeFloat = 0.0

    inputs = frozenset({"tokens", "mask", "old", "reference", "advantage"})
    attention = "causal"

    @property
    def numbers(self) -> tuple[str, ...]:
        """The fields of PER_TOKEN that it reads."""
        return tuple(name for name in PER_TOKEN if name in self.inputs)

    @property
    def answer_terms(self) -> Mapping[str, str]:
        """The loss terms on sampled answers: name -> the batch field that counts them."""
        return {"policy": "labels"}

    @property
    def labels(self) -> Mapping[str, str]:
        return {**self.answer_terms, **({"ptx": "ptx_labels"} if self.ptx_coef else {})}

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {name: Metric("labels") for name in ("kl_per_token", "approx_kl", "entropy", "clipped")}

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"lm": LMHead(config)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        if "mask" not in example:
            return self._text_row(example, vocab, rng)
        seen = causal_example(example["tokens"], example["mask"])
        nothing = np.full(len(seen["labels"]), IGNORE)
        answer_labels = nothing.copy()
        answer_labels[np.flatnonzero(example["mask"][1:])[-1]] = 0  # counts answers, in packed rows too
        extra = {"ptx_labels": nothing, "document_ids": np.zeros_like(nothing)} if self.ptx_coef else {}
        return seen | {name: example[name][1:] for name in self.numbers} | {"answer_labels": answer_labels} | extra

    def _text_row(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        """Return a row of text: next-token labels in `ptx_labels`, and no sampled token."""
        whole = {"document_ids": np.zeros(len(example["tokens"]), np.int64)} | example
        seen = CausalLM().build_example(whole, vocab, rng)
        nothing = np.full(len(seen["labels"]), IGNORE)
        zeros = {name: np.zeros(len(nothing), np.float32) for name in self.numbers}
        return seen | zeros | {"labels": nothing, "answer_labels": nothing, "ptx_labels": seen["labels"]}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        return {"hidden": hidden_states(model, batch)}  # whole rows, as the rollout ran the model

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        total = forward_flops(model, batch) if forward is None else forward
        total += vocabulary_flops(model, batch["ptx_labels"]) if self.ptx_coef else 0.0
        return total + vocabulary_flops(model, batch["labels"])

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return sums over the sampled tokens, or answers, and over the tokens of text.

        Metrics: `kl_per_token` to the reference and `entropy`, both reweighted to the current policy; `approx_kl`, its KL from
        the policy that sampled (k3); `clipped`, the tokens whose gradient the clip has stopped.
        """
        at = label_indices(batch["labels"])
        fields = {name: batch[name].flatten()[at] for name in self.numbers}
        logprobs = log_probs(model, outputs["hidden"], batch["labels"]).flatten()[at]  # (N,)
        terms, clipped = self._answer_loss(logprobs, fields, batch)
        if self.ptx_coef:
            terms["ptx"] = self.ptx_coef * token_loss(model, outputs["hidden"], batch["ptx_labels"])
        with torch.no_grad():
            log_ratio = logprobs - fields["old"]
            ratio = log_ratio.exp()
            return terms | {
                "kl_per_token": (ratio * kl_estimate(logprobs, fields["reference"])).sum(),
                "approx_kl": (ratio - 1 - log_ratio).sum(),
                "entropy": -(ratio * logprobs).sum(),
                "clipped": clipped.float().sum(),
            }

    def _answer_loss(self, logprobs: Tensor, fields: Batch, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Return the terms of the loss on sampled answers, and where the clip has stopped the gradient: (N,) bool.

        Args:
            logprobs: Log-probability of each sampled token, (N,).
            fields: The numbers of each sampled token, (N,) each.
            batch: The batch.
        """
        raise NotImplementedError(type(self).__name__)


@dataclass(frozen=True, kw_only=True)
class PPO(PolicyObjective):
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

    inputs = frozenset({"tokens", "mask", *PER_TOKEN})

    @property
    def answer_terms(self) -> Mapping[str, str]:
        return {"policy": "labels", "value": "labels"}

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {**super().metrics, "value_error": Metric("labels")}

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        value: dict[str, nn.Module] = {"value": value_head(config.hidden_size)}
        heads = super().heads(config)
        if self.critic == "shared":
            return heads | value
        with fork_rng():  # its weights are replaced: the policy's do not depend on its random numbers
            return heads | {"critic": Critic(config, value)}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        hidden = hidden_states(model, batch)
        return {"hidden": hidden, "critic": critic_states(model, hidden, batch)}

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        critic = flops.stack_flops(model.config, flops.work(batch)) if "critic" in model.heads else 0.0
        total = forward_flops(model, batch) + flops.trained_share(model) * critic if forward is None else forward
        return super().flops(model, batch, total)

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return sums over the sampled tokens; `value_error` is the squared distance to the return."""
        at = label_indices(batch["labels"])
        old_values, returns = batch["values"].flatten()[at], batch["returns"].flatten()[at]
        value = values(model, outputs["critic"].flatten(0, -2)[at])
        error = (value - returns) ** 2
        value_loss = error
        if self.value_clip_range:
            clipped = old_values + (value - old_values).clamp(-self.value_clip_range, self.value_clip_range)
            value_loss = torch.maximum(error, (clipped - returns) ** 2)
        terms = {"value": self.value_coef * 0.5 * value_loss.sum(), "value_error": error.detach().sum()}
        return super().loss(model, outputs, batch) | terms

    def _answer_loss(self, logprobs: Tensor, fields: Batch, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        log_ratio = logprobs - fields["old"]
        surrogate, clipped = clipped_surrogate(log_ratio, fields["advantage"], self.clip_range, self.clip_range)
        return {"policy": -surrogate.sum()}, clipped


def answer_index(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the index of the answer of each sampled token, (N,), and the number of tokens of each answer, (answers,)."""
    labels, ends = batch["labels"], batch["answer_labels"]
    last = (ends.flatten()[label_indices(labels)] != IGNORE).long()
    index = last.cumsum(0) - last
    answers = int(((host_copy(ends) != IGNORE) & (host_copy(labels) != IGNORE)).sum())
    return index, index.new_zeros(answers).index_add(0, index, torch.ones_like(index))


def answer_sums(x: Tensor, index: Tensor, answers: int) -> Tensor:
    """Return the sum of x (N,) over each answer: (answers,)."""
    return x.new_zeros(answers).index_add(0, index, x)


@dataclass(frozen=True, kw_only=True)
class GRPO(PolicyObjective):
    """Improve the policy on groups of sampled answers, with bounded steps and no critic (Shao 2024).

    Shown: prompt and answer. Predicted: the sampled tokens. Loss of a token:
    -min(ratio * advantage, clip(ratio, 1 - c, 1 + c') * advantage) + beta * KL to the reference.

    Args:
        clip_range: c, TRL's `epsilon`.
        clip_range_high: c', TRL's `epsilon_high` (DAPO's clip-higher); None: `clip_range`.
        beta: Weight of the KL to the reference in the loss. `examples.kl_coef` subtracts it from the reward instead.
        use_bias_correction_kl: Whether the KL estimate (k3) is multiplied by the ratio, so that its gradient is that of the
            divergence (DeepSeek-V3.2). False: the gradient of the estimate alone, as in the paper.
        loss_type: How tokens are averaged, by TRL's names. "grpo": over the tokens of each answer, then over the answers, so
            that tokens of short answers weigh more. "dapo": over all tokens of the step (Yu 2025). "dr_grpo": the sum over
            the answers divided by `normalizer` each (Liu 2025).
        importance_sampling_level: "token": a ratio per token. "sequence": the geometric mean over the answer (GSPO, Zheng 2025).
        normalizer: Tokens that an answer counts as with "dr_grpo"; 0: the maximum length of an answer.

    >>> vocab = Vocab(size=10, roles={"pad": 0}, special=np.arange(10) < 1)
    >>> drawn = {"tokens": np.array([5, 6, 7]), "mask": np.array([False, True, True])}
    >>> drawn |= {name: np.array([0.0, 0.1, 0.2], np.float32) for name in PER_TOKEN}
    >>> seen = GRPO().build_example(drawn, vocab, np.random.default_rng(0))
    >>> seen["labels"].tolist(), seen["answer_labels"].tolist()
    ([6, 7], [-100, 0])
    """

    clip_range: PositiveFloat = 0.2
    clip_range_high: PositiveFloat | None = None
    beta: NonNegativeFloat = 0.04
    use_bias_correction_kl: bool = True
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "dapo"
    importance_sampling_level: Literal["token", "sequence"] = "token"
    normalizer: NonNegativeInt = 0

    @property
    def answer_terms(self) -> Mapping[str, str]:
        return {"policy": "labels" if self.loss_type == "dapo" else "answer_labels"}

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Objective:
        if self.loss_type != "dr_grpo" or self.normalizer:
            return self
        return replace(self, normalizer=stats().max_answer_tokens)

    def _answer_loss(self, logprobs: Tensor, fields: Batch, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        index, lengths = answer_index(batch)
        log_ratio = logprobs - fields["old"]
        if self.importance_sampling_level == "sequence":
            log_ratio = (answer_sums(log_ratio, index, len(lengths)) / lengths)[index]
        high = self.clip_range if self.clip_range_high is None else self.clip_range_high
        surrogate, clipped = clipped_surrogate(log_ratio, fields["advantage"], self.clip_range, high)
        loss = -surrogate
        if self.beta:
            weight = self.beta * (log_ratio.exp() if self.use_bias_correction_kl else 1.0)
            loss = loss + weight * kl_estimate(logprobs, fields["reference"])
        if self.loss_type == "grpo":
            loss = loss / lengths[index]
        if self.loss_type == "dr_grpo":
            loss = loss / self.normalizer
        return {"policy": loss.sum()}, clipped


@dataclass(frozen=True, kw_only=True)
class RLOO(PolicyObjective):
    """Improve the policy on groups of sampled answers, each of which is one action (Ahmadian 2024).

    Shown: prompt and answer. Predicted: the sampled tokens. Loss of an answer:
    -min(ratio * advantage, clip(ratio, 1 - c, 1 + c) * advantage), where ratio = p(answer) / p_old(answer). The advantage is
    that of `firth.align.advantages.LeaveOneOut`. With one step per rollout its gradient is that of REINFORCE.

    Args:
        clip_range: c, TRL's `epsilon`.
    """

    clip_range: PositiveFloat = 0.2

    @property
    def answer_terms(self) -> Mapping[str, str]:
        return {"policy": "answer_labels"}

    def _answer_loss(self, logprobs: Tensor, fields: Batch, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        index, lengths = answer_index(batch)
        log_ratio = answer_sums(logprobs - fields["old"], index, len(lengths))
        advantage = answer_sums(fields["advantage"], index, len(lengths)) / lengths  # one number for the whole answer
        surrogate, clipped = clipped_surrogate(log_ratio, advantage, self.clip_range, self.clip_range)
        return {"policy": -surrogate.sum()}, clipped[index]


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
