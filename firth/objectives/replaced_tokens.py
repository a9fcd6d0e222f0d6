"""Replaced token detection: which tokens has a small generator put there? (ELECTRA, Clark 2020, section 2)

    the chef cooked the meal
    [MASK] chef [MASK] the meal            what the generator is shown; it is asked "the" and "cooked"
    the chef ate the meal                  what it draws, one token for each mask: what the discriminator is shown
     0    0   1   0   0                    what that is asked, at every token: a right guess counts as original

The generator learns by maximum likelihood, the discriminator by binary cross-entropy with weight 50; drawing a token has no
gradient, so none flows from one to the other. The generator is thinner, not shallower, and reads with the discriminator's
tables (`firth.model.model.TiedSubmodel`; its norm and projection are its own). After training the discriminator is what one keeps.

A difference in kind: the number that decides each draw is a field of the example, so that what happens is a function of
weights and batch alone: the same resumed, packed or in other micro-batches, and the same whenever held-out text is scored.

`AdversarialRTD` is the paper's appendix F: the generator is paid for fooling the discriminator and never told the text.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.data.noise import Kind, text_units
from firth.model import flops
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.heads import LMHead, replaced_token_head
from firth.model.model import LM, TiedSubmodel
from firth.objectives.masked_lm import MLM
from firth.objectives.objective import Objective, forward_work, supervised
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs
from firth.validated import NonNegativeFloat, OpenShare, ShareAboveZero


@dataclass(frozen=True)
class RTD(Objective):
    """Tell the generator's tokens from the text's.

    rate, noise: share of the tokens that the generator is asked, and which (`firth.data.noise`). size: the generator's
    width, MLP and heads as a share of the discriminator's. weight: of the discriminator's loss.

    The log shows the share of tokens that were replaced, how often the generator guessed right, and the discriminator's
    accuracy on replaced and on original tokens.

    >>> vocab = Vocab(size=10, roles={"mask": 1, "cls": 2, "sep": 3}, special=np.arange(10) < 4)
    >>> seen = RTD(mlm_probability=0.5).build_example({"tokens": np.array([2, 5, 6, 7, 8, 3])}, vocab, np.random.default_rng(2))
    >>> for name in ("tokens", "labels", "real"): print(name, seen[name].tolist())
    tokens [2, 1, 6, 1, 8, 3]
    labels [-100, 5, -100, 7, -100, -100]
    real [2, 5, 6, 7, 8, 3]
    >>> seen["chance"].shape
    (6,)
    """

    labels: ClassVar[dict[str, str]] = {"generator": "labels", "replaced": "real"}
    metrics: ClassVar[dict[str, str]] = {
        "guessed": "labels", "replaced_share": "real", "original_share": "real", "caught": "real", "passed": "real"
    }  # fmt: skip
    metric_ratios: ClassVar[dict[str, tuple[str, str]]] = {
        "replaced_accuracy": ("caught", "replaced_share"),
        "original_accuracy": ("passed", "original_share"),
    }

    keeps_fields: ClassVar[bool] = True

    mlm_probability: OpenShare = 0.15
    noise: Kind = "iid"
    generator_size: ShareAboveZero = 0.25
    discriminator_weight: NonNegativeFloat = 50.0

    @property
    def text_units(self) -> frozenset[str]:
        return text_units(self.noise)

    def attention_pattern(self) -> AttentionPattern:
        return "bidirectional"

    def missing_from(self, config: ModelConfig) -> str:
        if not config.rnn_type or (self.generator_size == 1 and not config.separate_directions):
            return ""
        apart = "model.separate_directions=false and " if config.separate_directions else ""
        return f"recurrent layers are as wide as their tables, which its generator shares: set {apart}objective.generator_size=1"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        small = thinner(config, self.generator_size)
        return {
            "generator": TiedSubmodel(small, {"lm": LMHead(small)}),
            "replaced": replaced_token_head(config.hidden_size),
        }

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        shown = MLM(
            mlm_probability=self.mlm_probability, noise=self.noise, mask_fraction=1.0, random_fraction=0.0
        ).build_example(example, vocab, rng)
        return shown | {"real": example["tokens"], "chance": rng.random(len(example["tokens"]), dtype=np.float32)}

    def lm_model(self, model: LM) -> LM:
        """The generator."""
        generator: LM = model.heads["generator"]  # type: ignore[assignment]
        return generator

    def forward(self, model: LM, batch: Batch) -> Outputs:
        """draft: the generator's states where it is asked (N, its width); guesses: its logits there (N, vocab), and what it
        drew (N,); shown, hidden: what the discriminator is shown (..., T), and its states (..., T, width)."""
        generator, at = self.lm_model(model), batch["labels"] != IGNORE
        draft, _ = supervised(generator(batch, needed=at), batch["labels"])
        guesses = generator.heads["lm"](draft).float()
        drew = draw(guesses.detach(), batch["chance"][at])
        shown = batch["tokens"].masked_scatter(at, drew)
        hidden = model(batch | {"tokens": shown})
        return {"draft": draft, "guesses": guesses, "drew": drew, "shown": shown, "hidden": hidden}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        _, terms = self._judged(model, outputs, batch)
        wanted = batch["labels"][batch["labels"] != IGNORE]
        return terms | {"generator": F.cross_entropy(outputs["guesses"], wanted, reduction="sum")}

    def _judged(self, model: LM, outputs: Outputs, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The discriminator's cross-entropy at every asked token of the generator's (N,), and its terms."""
        here, at = batch["real"] != IGNORE, batch["labels"] != IGNORE
        states, real = supervised(outputs["hidden"], batch["real"])
        scores = model.heads["replaced"](states)[:, 0].float()
        replaced = outputs["shown"][here] != real
        errors = F.binary_cross_entropy_with_logits(scores, replaced.float(), reduction="none")
        said = scores > 0
        return errors[at[here]], {
            "replaced": self.discriminator_weight * errors.sum(),
            "guessed": (outputs["drew"] == batch["labels"][at]).sum().float(),
            "replaced_share": replaced.sum().float(),
            "original_share": (~replaced).sum().float(),
            "caught": (replaced & said).sum().float(),
            "passed": (~replaced & ~said).sum().float(),
        }

    def forward_flops(self, model: LM, batch: Batch) -> float:
        generator = self.lm_model(model)
        drafting = flops.stack_flops(generator.config, forward_work(generator, batch, batch["labels"] != IGNORE))
        whole = flops.stack_flops(model.config, flops.work(batch)) + drafting
        return whole + flops.head_flops(generator.config, flops.supervised_positions(batch["labels"]))

    def loss_flops(self, model: LM, batch: Batch) -> float:
        return flops.linear(
            flops.supervised_positions(batch["real"]), model.config.hidden_size, model.config.hidden_size + 1
        )


@dataclass(frozen=True)
class AdversarialRTD(RTD):
    """The generator learns by REINFORCE to be taken for the text (appendix F): its reward for a token that it drew is the
    discriminator's cross-entropy there, less a baseline that is learnt from the generator's own states.

    The baseline is the softplus of a linear map, as in the paper; its error is squared here. `surprise` is the
    cross-entropy of the text under the generator, which it is not told: what RTD logs as its loss.
    """

    labels: ClassVar[dict[str, str]] = RTD.labels | {"baseline": "labels"}
    metrics: ClassVar[dict[str, str]] = RTD.metrics | {"reward": "labels", "surprise": "labels"}

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        baseline = nn.Linear(thinner(config, self.generator_size).hidden_size, 1)
        nn.init.zeros_(baseline.weight)
        nn.init.zeros_(baseline.bias)
        return super().heads(config) | {"baseline": baseline}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        errors, terms = self._judged(model, outputs, batch)
        reward = errors.detach()
        expected = F.softplus(model.heads["baseline"](outputs["draft"].detach())[:, 0].float())
        said = outputs["guesses"].log_softmax(-1)
        chosen = said.gather(-1, outputs["drew"][:, None])[:, 0]
        wanted = batch["labels"][batch["labels"] != IGNORE]
        return terms | {
            "generator": -((reward - expected.detach()) * chosen).sum(),
            "baseline": (expected - reward).square().sum(),
            "reward": reward.sum(),
            "surprise": -said.detach().gather(-1, wanted[:, None]).sum(),
        }


def thinner(config: ModelConfig, size: float) -> ModelConfig:
    """The same architecture with a share of the width, the MLP and the heads, on tables of the same width.

    >>> small = thinner(ModelConfig(vocab_size=30522, hidden_size=256, num_layers=12, num_heads=4, embedding_size=128, lm_head="transform"), 0.25)
    >>> small.hidden_size, small.num_heads, small.intermediate_size, small.embedding_size
    (64, 1, 256, 128)
    """
    heads = max(1, round(config.num_heads * size))
    width = 2 * heads * max(1, round(config.hidden_size * size / (2 * heads)))  # even heads, for rotary positions
    embed = 0 if width == config.embedding_dim else config.embedding_dim
    return replace(
        config, hidden_size=width, num_heads=heads, num_kv_heads=0, head_dim=0, intermediate_size=max(1, round(config.intermediate_size * size)),
        embedding_size=embed, lm_head="transform" if embed else config.lm_head,
    )  # fmt: skip


def draw(logits: Tensor, chance: Tensor) -> Tensor:
    """The token at which the cumulative probability passes `chance`: (N, vocab), (N,) in [0, 1) -> (N,).

    >>> draw(torch.tensor([[0.0, 0.0], [0.0, 0.0]]), torch.tensor([0.4, 0.6])).tolist()
    [0, 1]
    """
    passed = logits.softmax(-1).cumsum(-1)
    # The gap below 1 keeps the product under the total in float32: a token of probability 0 is never drawn.
    at = chance.clamp(max=1 - 2**-20) * passed[:, -1]
    found = torch.searchsorted(passed, at[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)
