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
    >>> seen = RTD(rate=0.5).view({"tokens": np.array([2, 5, 6, 7, 8, 3])}, vocab, np.random.default_rng(2))
    >>> for name in ("tokens", "labels", "real"): print(name, seen[name].tolist())
    tokens [2, 1, 6, 1, 8, 3]
    labels [-100, 5, -100, 7, -100, -100]
    real [2, 5, 6, 7, 8, 3]
    >>> seen["chance"].shape
    (6,)
    """

    targets: ClassVar[dict[str, str]] = {"generator": "labels", "replaced": "real"}
    measures: ClassVar[dict[str, str]] = {
        "guessed": "labels", "replaced_share": "real", "original_share": "real", "caught": "real", "passed": "real"
    }  # fmt: skip
    ratios: ClassVar[dict[str, tuple[str, str]]] = {
        "replaced_accuracy": ("caught", "replaced_share"),
        "original_accuracy": ("passed", "original_share"),
    }

    keeps: ClassVar[bool] = True

    rate: OpenShare = 0.15
    noise: Kind = "iid"
    size: ShareAboveZero = 0.25
    weight: NonNegativeFloat = 50.0

    @property
    def text_units(self) -> frozenset[str]:
        return text_units(self.noise)

    def reads(self) -> AttentionPattern:
        return "both"

    def lacks(self, shape: ModelConfig) -> str:
        if not shape.recurrent or (self.size == 1 and not shape.apart):
            return ""
        apart = "shape.apart=false and " if shape.apart else ""
        return f"recurrent layers are as wide as their tables, which its generator shares: set {apart}objective.size=1"

    def parts(self, shape: ModelConfig) -> dict[str, nn.Module]:
        small = thinner(shape, self.size)
        return {"generator": TiedSubmodel(small, {"lm": LMHead(small)}), "replaced": replaced_token_head(shape.width)}

    def view(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        shown = MLM(rate=self.rate, noise=self.noise, masked=1.0, random=0.0).view(example, vocab, rng)
        return shown | {"real": example["tokens"], "chance": rng.random(len(example["tokens"]), dtype=np.float32)}

    def writer(self, model: LM) -> LM:
        """The generator."""
        generator: LM = model.parts["generator"]  # type: ignore[assignment]
        return generator

    def run(self, model: LM, batch: Batch) -> Outputs:
        """draft: the generator's states where it is asked (N, its width); guesses: its logits there (N, vocab), and what it
        drew (N,); shown, hidden: what the discriminator is shown (..., T), and its states (..., T, width)."""
        generator, at = self.writer(model), batch["labels"] != IGNORE
        draft, _ = supervised(generator(batch, wanted=at), batch["labels"])
        guesses = generator.parts["lm"](draft).float()
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
        scores = model.parts["replaced"](states)[:, 0].float()
        replaced = outputs["shown"][here] != real
        errors = F.binary_cross_entropy_with_logits(scores, replaced.float(), reduction="none")
        said = scores > 0
        return errors[at[here]], {
            "replaced": self.weight * errors.sum(),
            "guessed": (outputs["drew"] == batch["labels"][at]).sum().float(),
            "replaced_share": replaced.sum().float(),
            "original_share": (~replaced).sum().float(),
            "caught": (replaced & said).sum().float(),
            "passed": (~replaced & ~said).sum().float(),
        }

    def run_flops(self, model: LM, batch: Batch) -> float:
        generator = self.writer(model)
        drafting = flops.stack_flops(generator.shape, forward_work(generator, batch, batch["labels"] != IGNORE))
        whole = flops.stack_flops(model.shape, flops.work(batch)) + drafting
        return whole + flops.head_flops(generator.shape, flops.supervised_positions(batch["labels"]))

    def loss_flops(self, model: LM, batch: Batch) -> float:
        return flops.linear(flops.supervised_positions(batch["real"]), model.shape.width, model.shape.width + 1)


@dataclass(frozen=True)
class AdversarialRTD(RTD):
    """The generator learns by REINFORCE to be taken for the text (appendix F): its reward for a token that it drew is the
    discriminator's cross-entropy there, less a baseline that is learnt from the generator's own states.

    The baseline is the softplus of a linear map, as in the paper; its error is squared here. `surprise` is the
    cross-entropy of the text under the generator, which it is not told: what RTD logs as its loss.
    """

    targets: ClassVar[dict[str, str]] = RTD.targets | {"baseline": "labels"}
    measures: ClassVar[dict[str, str]] = RTD.measures | {"reward": "labels", "surprise": "labels"}

    def parts(self, shape: ModelConfig) -> dict[str, nn.Module]:
        baseline = nn.Linear(thinner(shape, self.size).width, 1)
        nn.init.zeros_(baseline.weight)
        nn.init.zeros_(baseline.bias)
        return super().parts(shape) | {"baseline": baseline}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        errors, terms = self._judged(model, outputs, batch)
        reward = errors.detach()
        expected = F.softplus(model.parts["baseline"](outputs["draft"].detach())[:, 0].float())
        said = outputs["guesses"].log_softmax(-1)
        chosen = said.gather(-1, outputs["drew"][:, None])[:, 0]
        wanted = batch["labels"][batch["labels"] != IGNORE]
        return terms | {
            "generator": -((reward - expected.detach()) * chosen).sum(),
            "baseline": (expected - reward).square().sum(),
            "reward": reward.sum(),
            "surprise": -said.detach().gather(-1, wanted[:, None]).sum(),
        }


def thinner(shape: ModelConfig, size: float) -> ModelConfig:
    """The same architecture with a share of the width, the MLP and the heads, on tables of the same width.

    >>> small = thinner(ModelConfig(vocab=30522, width=256, depth=12, heads=4, embed=128, head="transform"), 0.25)
    >>> small.width, small.heads, small.hidden, small.embed
    (64, 1, 256, 128)
    """
    heads = max(1, round(shape.heads * size))
    width = 2 * heads * max(1, round(shape.width * size / (2 * heads)))  # even heads, for rotary positions
    embed = 0 if width == shape.table_width else shape.table_width
    return replace(
        shape, width=width, heads=heads, kv_heads=0, head_width=0, hidden=max(1, round(shape.hidden * size)),
        embed=embed, head="transform" if embed else shape.head,
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
