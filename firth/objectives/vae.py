"""Text VAE: encode a text into a Gaussian latent and reconstruct it (Bowman 2016, sections 2 and 3; Kingma 2014).

    loss = -E_q(z|x) log p(x|z)  +  w KL(q(z|x) || N(0, 1))        at w = 1 the negative ELBO, here in nats per token

A decoder that sees its previous tokens can do without z; then KL falls to zero and the latent is unused ("posterior
collapse"). Three remedies, each a setting. `kl_anneal_steps`: w grows from 0 to 1 over the first steps. `free_bits`: the KL of
a text costs at least so many nats, so that reducing it further gains nothing (Kingma 2016, for groups of units and the mean of
a minibatch; ours is per text, which needs no other text). `word_dropout`: a share of the decoder's input words is masked in
training. The decoder sees the source through z only (`firth.model.variants`): the model is an encoder-decoder with
`encoder.latent_size` above 0.

The noise of z is drawn in `build_example`, so it is data: the same example and seed have the same ELBO in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor

from firth.data import attention_fields
from firth.fields import NonNegativeFloat, NonNegativeInt, PositiveInt, Share
from firth.model.config import ModelConfig
from firth.model.forward_context import ForwardContext
from firth.model.model import LM
from firth.objectives.objective import TokenObjective, cannot_train
from firth.tokenizer.vocab import Vocab
from firth.types import Batch, DataStats, Example, Metric, Outputs

ACTIVE_VARIANCE = 0.01
"""Variance of a unit's mean over texts above which it is active (Burda 2016, section 5.2)."""
COLLAPSED_KL_NATS = 0.1
"""KL in nats per text below which the posterior counts as collapsed."""


@dataclass(frozen=True)
class VAE(TokenObjective):
    """Reconstruct a text from its latent: {"tokens"}, without special tokens.

    Shown: the text, to the encoder; the latent z, and the previous tokens with `word_dropout` of them masked, to the decoder.
    Predicted: the text and its stop token. Loss: -sum over t of log p(w_t | w_<t, z) + w max(KL(q(z|x) || N(0, 1)), free_bits).
    Metrics: "kl" in nats per text, as it is; "active", units whose mean differs between the texts of a batch; "elbo" in nats
    per token, without w and free bits.

    Args:
        latent_size: Size of the latent; equal to the model's.
        kl_anneal_steps: Steps until w has its full size (0: from the start).
        free_bits: Smallest KL of a text that is counted, in nats.
        word_dropout: Share of the decoder's input words that is masked in training.
        kl_weight: w after annealing.

    >>> vocab = Vocab(size=9, roles={"pad": 0, "eos": 1, "mask": 2}, special=np.arange(9) < 3)
    >>> seen = VAE(latent_size=2, word_dropout=0.5).build_example({"tokens": np.array([5, 6, 7])}, vocab, np.random.default_rng(1))
    >>> for name in ("source_tokens", "tokens", "labels", "gaps"): print(name, seen[name].tolist())
    source_tokens [5, 6, 7, 1]
    tokens [0, 5, 6, 7]
    labels [5, 6, 7, 1]
    gaps [0, 5, 6, 2]
    """

    labels = {"tokens": "labels", "divergence": "labels"}
    latent_size: PositiveInt = 32
    kl_anneal_steps: NonNegativeInt = 0
    free_bits: NonNegativeFloat = 0.0
    word_dropout: Share = 0.0
    kl_weight: NonNegativeFloat = 1.0

    attention = "latent"

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {"kl": Metric("text", remark=self._remark), "active": Metric("text"), "elbo": Metric("labels")}

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Self:
        if config.encoder.latent_size != self.latent_size:
            sizes = (
                f"objective.latent_size={self.latent_size} and model.encoder.latent_size={config.encoder.latent_size}"
            )
            raise cannot_train(self, f"{sizes} differ: make them equal")
        return self

    def kl_weight_of(self, batch: Batch) -> float:
        """Return w at the step of a batch."""
        step = int(batch["step"]) if "step" in batch else self.kl_anneal_steps
        return self.kl_weight if step >= self.kl_anneal_steps else self.kl_weight * step / self.kl_anneal_steps

    def _remark(self, metrics: Mapping[str, float]) -> str:
        kl, active = (metrics.get(f"valid/{name}", metrics.get(name, 0.0)) for name in ("kl", "active"))
        if kl >= COLLAPSED_KL_NATS and active >= 1:
            return f"The latent carries {kl:.3g} nats per text, in {active:.3g} of its {self.latent_size} units."
        return (
            f"The posterior has collapsed: the latent carries {kl:.2g} nats per text, in {active:.2g} of its "
            f"{self.latent_size} units, so the decoder does not use it. Increase objective.kl_anneal_steps, or set "
            "objective.free_bits or objective.word_dropout."
        )

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        text = np.append(example["tokens"], vocab.eos)
        seen = attention_fields.seq2seq(text, text, vocab.pad)
        gaps = seen["tokens"].copy()
        if self.word_dropout:
            gaps[1:][rng.random(len(gaps) - 1) < self.word_dropout] = vocab.mask
        noise = rng.standard_normal(self.latent_size, np.float32)
        return seen | {"gaps": gaps, "noise": noise, "text": np.int64(0)}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        mean, log_variance = model.posterior(batch)  # (B, latent_size) each
        z = mean + (log_variance / 2).exp() * batch["noise"]
        shown = batch["gaps"] if model.training else batch["tokens"]
        hidden = model(batch | {"tokens": shown}, ForwardContext(encoder_output=model.latent_output(z)))
        return {"hidden": hidden, "mean": mean, "log_variance": log_variance}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        tokens = super().loss(model, outputs, batch)["tokens"]
        mean, log_variance = outputs["mean"], outputs["log_variance"]
        kl = (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1) / 2  # (B,)
        is_active = mean.detach().var(0, correction=0) > ACTIVE_VARIANCE
        return {
            "tokens": tokens,
            "divergence": self.kl_weight_of(batch) * kl.clamp(min=self.free_bits).sum(),
            "kl": kl.detach().sum(),
            "active": is_active.sum().float() * len(mean),
            "elbo": -(tokens + kl.sum()).detach(),
        }
