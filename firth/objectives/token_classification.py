"""Token classification: predict a class for each word at its first token (BERT, Devlin 2019, section 5.3; Collobert 2011).

tokens   [CLS]  the  fir  ##th  of  [SEP]
tags       -    DT   NN     -   IN    -
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from firth.data import attention_fields
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.model import LM
from firth.objectives.classification import classification_head
from firth.objectives.objective import (
    DataStats,
    Objective,
    choice_loss,
    forward_flops,
    hidden_states,
    num_correct,
    supervised,
)
from firth.tokenizer.vocab import Vocab
from firth.types import Batch, Constraints, Example, Metric, Outputs


@dataclass(frozen=True)
class TokenClassification(Objective):
    """Predict the tag of each word: {"tokens", "tags"}, a tag at the first token of a word and IGNORE elsewhere.

    Shown: the whole text. Predicted: the tag of each word, at its first token. Loss: -sum over words of
    log softmax(A h + b)[tag].

    Args:
        class_names: Names of the tags.
        causal: Whether the text is read from left to right, as by a decoder (None: as the model does). A tag is then
            predicted from the words before it and its own first token.

    >>> vocab = Vocab(size=9, roles={}, special=np.zeros(9, bool))
    >>> example = {"tokens": np.array([5, 6, 7]), "tags": np.array([1, -100, 0]), "record": 4}
    >>> sorted(TokenClassification(class_names=("NN", "VB")).build_example(example, vocab, np.random.default_rng(0)))
    ['tags', 'tokens']
    """

    labels = {"tags": "tags"}
    metrics = {"accuracy": Metric("tags")}

    class_names: tuple[str, ...] = ()
    causal: bool | None = None

    inputs = frozenset({"tokens", "tags"})

    @property
    def attention(self) -> AttentionPattern:
        return "causal" if self.causal else "any"

    @property
    def constraints(self) -> Constraints:
        return Constraints(class_names=self.class_names)

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Objective:
        return dataclasses.replace(
            self,
            class_names=self.class_names or stats().class_names,
            causal="bidirectional" not in config.supported_patterns if self.causal is None else self.causal,
        )

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"tags": classification_head(config.hidden_size, len(self.class_names))}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        order = attention_fields.causal(len(example["tokens"])) if self.causal else {}
        return {"tokens": example["tokens"], "tags": example["tags"]} | order

    def forward(self, model: LM, batch: Batch) -> Outputs:
        return {"hidden": hidden_states(model, batch)}  # most tokens have a tag

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        return forward_flops(model, batch) if forward is None else forward

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, targets = supervised(outputs["hidden"], batch["tags"])
        scores = model.heads["tags"](states)  # (N, classes)
        return {"tags": choice_loss(scores, targets), "accuracy": num_correct(scores, targets)}
