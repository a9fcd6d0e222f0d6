"""Layer mixture: a task head on a weighted sum of all layers, frozen or not, as ELMo is used (Peters 2018, section 3.2).

`LayerMixture() + TokenClassification()` tags from the frozen states of a pretrained model: the task learns its head, one
weight for each layer and a scale, and the model stays unchanged. Lower layers represent more syntax, upper ones more meaning.

>>> from firth.objectives.token_tasks import TokenClassification
>>> (LayerMixture() + TokenClassification()).labels
{'tags': 'tags'}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.model.variants import ScalarMix
from firth.objectives.objective import Objective, cannot_train
from firth.types import Batch, DataStats, Outputs


@dataclass(frozen=True)
class LayerMixture(Objective):
    """Give the objective that it is added to a mixture of all layers as hidden state: h = gamma * sum of s_l h_l, s a softmax.

    It predicts nothing itself and has no loss: `firth.objectives.objective.hidden_states` uses its head.

    Args:
        frozen: Run the model without gradient and without dropout, so that it stays unchanged.
    """

    frozen: bool = True

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Objective:
        if config.encoder.latent_size:
            raise cannot_train(
                self, "the decoder of a latent has no mixture of layers: set model.encoder.latent_size=0"
            )
        return self

    inputs = frozenset()

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"mixture": ScalarMix(config.num_layers + 1, self.frozen)}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {}
