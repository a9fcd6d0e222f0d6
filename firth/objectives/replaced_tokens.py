"""Replaced token detection: which tokens did a small generator replace? (ELECTRA, Clark 2020, section 2)

    the chef cooked the meal
    [MASK] chef [MASK] the meal            input of the generator; its labels are "the" and "cooked"
    the chef ate the meal                  its samples, one token for each mask: input of the discriminator
     0    0   1   0   0                    labels of the discriminator, at every token: a correct sample is original

The generator learns by maximum likelihood, the discriminator by binary cross-entropy with weight 50; sampling a token has no
gradient, so none flows from one to the other. The generator is narrower, not shallower, and shares the discriminator's
embeddings (`firth.model.model.TiedSubmodel`; its norm and projection are its own). The discriminator is what is kept.

Difference from the original: the random number that decides each sample is a field of the example, so that a step is a
function of weights and batch alone: the same when resumed, packed or split, and for every evaluation of held-out text.

`AdversarialRTD` is the paper's appendix F: the generator is rewarded for fooling the discriminator and never trained on the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.data.noise import Kind, text_units
from firth.fields import NonNegativeFloat, OpenShare, ShareAboveZero
from firth.model import flops
from firth.model.config import ModelConfig
from firth.model.forward_context import ForwardContext
from firth.model.heads import LMHead, replaced_token_head
from firth.model.model import LM, TiedSubmodel
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import (
    Objective,
    cannot_train,
    forward_flops,
    forward_work,
    hidden_states,
    label_indices,
    labeled,
    supervised,
)
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Constraints, DataStats, Example, Metric, Outputs


@dataclass(frozen=True)
class RTD(Objective):
    """Predict which tokens a generator replaced.

    Shown: the masked text to the generator, its samples in the text to the discriminator. Predicted: the masked tokens by the
    generator, and by the discriminator whether each token is replaced. Loss, x the text, x' with the samples:
    -sum over masked i of log p_G(x_i) - weight * sum over all i of log p_D(x'_i is original or replaced).

    Metrics: the share of replaced tokens, how often the generator is right, and the discriminator's accuracy on replaced
    and on original tokens.

    Args:
        mlm_probability: Share of the tokens that the generator predicts.
        noise: How they are selected (`firth.data.noise`).
        generator_size: The generator's hidden size, MLP and heads as a share of the discriminator's.
        discriminator_weight: Weight of the discriminator's loss.

    >>> vocab = Vocab(size=10, roles={"mask": 1, "cls": 2, "sep": 3}, special=np.arange(10) < 4)
    >>> seen = RTD(mlm_probability=0.5).build_example({"tokens": np.array([2, 5, 6, 7, 8, 3])}, vocab, np.random.default_rng(2))
    >>> for name in ("tokens", "labels", "real"): print(name, seen[name].tolist())
    tokens [2, 1, 6, 1, 8, 3]
    labels [-100, 5, -100, 7, -100, -100]
    real [2, 5, 6, 7, 8, 3]
    >>> seen["chance"].shape
    (6,)
    """

    labels = {"generator": "labels", "replaced": "real"}
    metrics = {
        "guessed": Metric("labels"),
        "replaced_share": Metric("real"),
        "original_share": Metric("real"),
        "caught": Metric("real"),
        "passed": Metric("real"),
        "replaced_accuracy": Metric(ratio=("caught", "replaced_share")),
        "original_accuracy": Metric(ratio=("passed", "original_share")),
    }

    mlm_probability: OpenShare = 0.15
    noise: Kind = "iid"
    generator_size: ShareAboveZero = 0.25
    discriminator_weight: NonNegativeFloat = 50.0

    @property
    def constraints(self) -> Constraints:
        return Constraints(text_units=text_units(self.noise))

    attention = "bidirectional"

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Self:
        if config.rnn.type and (self.generator_size != 1 or config.rnn.separate_directions):
            also = "model.rnn.separate_directions=false and " if config.rnn.separate_directions else ""
            raise cannot_train(
                self,
                "recurrent layers are as wide as their embeddings, which the generator shares: "
                f"set {also}objective.generator_size=1",
            )
        return self

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        small = generator_config(config, self.generator_size)
        return {
            "generator": TiedSubmodel(small, {"lm": LMHead(small)}),
            "replaced": replaced_token_head(config.hidden_size),
        }

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        shown = MLM(
            mlm_probability=self.mlm_probability, noise=self.noise, mask_fraction=1.0, random_fraction=0.0
        ).build_example(example, vocab, rng)
        return shown | {"real": example["tokens"], "chance": rng.random(len(example["tokens"]), dtype=np.float32)}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        """Run both models.

        Returns:
            draft: The generator's states at the masked positions, (N, its hidden_size).
            logits: Its logits there, (N, vocab_size).
            sampled: The tokens it sampled there, (N,).
            shown: The discriminator's input, (..., T).
            hidden: The discriminator's states, (..., T, hidden_size).
        """
        generator, labels = model.language_model, batch["labels"]
        at = label_indices(labels)
        draft, _ = supervised(generator(batch, ForwardContext(needed_positions=labeled(labels))), labels)
        logits = generator.heads["lm"](draft).float()
        sampled = sample_tokens(logits.detach(), batch["chance"].flatten()[at])
        shown = batch["tokens"].flatten().index_copy(0, at, sampled).view_as(labels)
        hidden = hidden_states(model, batch | {"tokens": shown})
        return {"draft": draft, "logits": logits, "sampled": sampled, "shown": shown, "hidden": hidden}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        _, terms = self._discriminator_loss(model, outputs, batch)
        targets = batch["labels"].flatten()[label_indices(batch["labels"])]
        return terms | {"generator": F.cross_entropy(outputs["logits"], targets, reduction="sum")}

    def _discriminator_loss(self, model: LM, outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the discriminator's cross-entropy at every token the generator sampled, (N,), and its terms."""
        here, at, sampled = label_indices(batch["real"]), label_indices(batch["labels"]), outputs["sampled"]
        states, real = supervised(outputs["hidden"], batch["real"])
        scores = model.heads["replaced"](states)[:, 0].float()
        replaced = outputs["shown"].flatten()[here] != real
        errors = F.binary_cross_entropy_with_logits(scores, replaced.float(), reduction="none")
        predicted = scores > 0
        drawn = torch.nonzero_static(batch["labels"].flatten()[here] != IGNORE, size=len(sampled))[:, 0]
        return errors[drawn], {
            "replaced": self.discriminator_weight * errors.sum(),
            "guessed": (sampled == batch["labels"].flatten()[at]).sum().float(),
            "replaced_share": replaced.sum().float(),
            "original_share": (~replaced).sum().float(),
            "caught": (replaced & predicted).sum().float(),
            "passed": (~replaced & ~predicted).sum().float(),
        }

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        width = model.config.hidden_size
        if forward is None:
            generator, labels = model.language_model, batch["labels"]
            drafted = flops.stack_flops(generator.config, forward_work(generator, batch, labels != IGNORE))
            drafted += flops.head_flops(generator.config, flops.supervised_positions(labels))
            forward = forward_flops(model, batch) + flops.trained_share(model) * drafted
        return forward + flops.linear(flops.supervised_positions(batch["real"]), width, width + 1)


@dataclass(frozen=True)
class AdversarialRTD(RTD):
    """RTD with a generator trained by REINFORCE to fool the discriminator (appendix F).

    Shown and predicted: as by `RTD`. Loss of the generator: -(R - b) log p_G(sampled token), R the discriminator's
    cross-entropy there and b a baseline learned from the generator's states: the softplus of a linear map, as in the paper;
    its loss is the squared error here. Metric: "surprise", the generator's cross-entropy on the text, which is not trained:
    what RTD logs as its loss.

    Args:
        mlm_probability: See `RTD`, as the other fields.
    """

    labels = RTD.labels | {"baseline": "labels"}
    metrics = RTD.metrics | {"reward": Metric("labels"), "surprise": Metric("labels")}

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        baseline = nn.Linear(generator_config(config, self.generator_size).hidden_size, 1)
        nn.init.zeros_(baseline.weight)
        nn.init.zeros_(baseline.bias)
        return super().heads(config) | {"baseline": baseline}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        errors, terms = self._discriminator_loss(model, outputs, batch)
        reward = errors.detach()
        expected = F.softplus(model.heads["baseline"](outputs["draft"].detach())[:, 0].float())
        logprobs = outputs["logits"].log_softmax(-1)
        chosen = logprobs.gather(-1, outputs["sampled"][:, None])[:, 0]
        targets = batch["labels"].flatten()[label_indices(batch["labels"])]
        return terms | {
            "generator": -((reward - expected.detach()) * chosen).sum(),
            "baseline": (expected - reward).square().sum(),
            "reward": reward.sum(),
            "surprise": -logprobs.detach().gather(-1, targets[:, None]).sum(),
        }


def generator_config(config: ModelConfig, size: float) -> ModelConfig:
    """Return the config with a share of the hidden size, the MLP and the heads, and the same embedding size.

    >>> large = ModelConfig(30522, hidden_size=256, num_layers=12, num_heads=4).with_fields(
    ...     {"embedding.size": 128, "lm_head.type": "transform"})
    >>> small = generator_config(large, 0.25)
    >>> small.hidden_size, small.num_heads, small.intermediate_size, small.embedding.size
    (64, 1, 256, 128)
    """
    heads = max(1, round(config.num_heads * size))
    width = 2 * heads * max(1, round(config.hidden_size * size / (2 * heads)))  # even heads, for rotary positions
    embed = 0 if width == config.embedding_dim else config.embedding_dim
    return config.with_fields(
        {
            "hidden_size": width,
            "num_heads": heads,
            "num_kv_heads": 0,
            "head_dim": 0,
            "intermediate_size": max(1, round(config.intermediate_size * size)),
            "embedding.size": embed,
            "lm_head.type": "transform" if embed else config.lm_head.type,
        }
    )


def sample_tokens(logits: Tensor, chance: Tensor) -> Tensor:
    """Return the token at which the cumulative probability exceeds `chance`: (N, vocab_size), (N,) in [0, 1) -> (N,).

    >>> sample_tokens(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0.4, 0.6])).tolist()
    [0, 1]
    """
    cumulative = logits.softmax(-1).cumsum(-1)
    # The gap below 1 keeps the product under the total in float32: a token of probability 0 is never sampled.
    at = chance.clamp(max=1 - 2**-20) * cumulative[:, -1]
    found = torch.searchsorted(cumulative, at[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)
