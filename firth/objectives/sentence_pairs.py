"""Two segments in one row, and a question about the two: what NSP and SOP share.

    [CLS] first [SEP] second [SEP]      segments 0 0 .. 1 1

The question has two answers and is asked at [CLS], through BERT's pooler (Devlin 2019, section 3.1).
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from firth.data import layout
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.heads import pooled
from firth.model.model import LM
from firth.objectives.objective import Objective, choice_loss, num_correct, supervised
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs


class SentencePairObjective(Objective):
    """A subclass names its term (`asks`: of the loss, the field, the part) and says what stands there in `view`."""

    asks: ClassVar[str]

    def attention_pattern(self) -> AttentionPattern:
        return "bidirectional"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {self.asks: pooled(config.hidden_size, 2)}

    def laid(self, first: np.ndarray, second: np.ndarray, answer: bool, vocab: Vocab) -> Example:
        """Both segments in a row, and the answer at [CLS]."""
        shown = layout.pair(first, second, vocab)
        answers = np.full(len(shown["tokens"]), IGNORE)
        answers[0] = answer
        return shown | {self.asks: answers}

    def needed_positions(self, batch: Batch) -> Tensor | None:
        answers = batch.get(self.asks)  # a cloze test does not ask this
        return None if answers is None else answers != IGNORE

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        states, answers = supervised(outputs["hidden"], batch[self.asks])
        scores = model.heads[self.asks](states)  # (N, 2)
        return {self.asks: choice_loss(scores, answers), f"{self.asks}_accuracy": num_correct(scores, answers)}
