"""Base of the sentence pair objectives, NSP and SOP: two text segments in one row and a binary label.

    [CLS] first [SEP] second [SEP]      token types 0 0 .. 1 1

The label is predicted at [CLS], through BERT's pooler (Devlin 2019, section 3.1).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from firth.data import attention_fields
from firth.model.config import ModelConfig
from firth.model.heads import pooled
from firth.model.model import LM
from firth.objectives.objective import Objective, choice_loss, num_correct, supervised
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs


class SentencePairObjective(Objective):
    """Base of objectives that predict a binary label of two text segments.

    Attributes:
        label_field: The name of the loss term, the batch field and the head.
    """

    label_field: ClassVar[str]

    attention = "bidirectional"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {self.label_field: pooled(config.hidden_size, 2)}

    def build_pair(self, first: np.ndarray, second: np.ndarray, label: bool, vocab: Vocab) -> Example:
        """Return both segments in one row, with the label at [CLS]."""
        shown = attention_fields.pair(first, second, vocab)
        labels = np.full(len(shown["tokens"]), IGNORE)
        labels[0] = label
        return shown | {self.label_field: labels}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, labels = supervised(outputs["hidden"], batch[self.label_field])
        scores = model.heads[self.label_field](states)  # (N, 2)
        return {
            self.label_field: choice_loss(scores, labels),
            f"{self.label_field}_accuracy": num_correct(scores, labels),
        }
