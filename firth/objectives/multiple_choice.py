"""Multiple choice: one score for each option, and a softmax over them (GPT, Radford 2018, figure 1; BERT on SWAG,
Devlin 2019, section 4.4).

    [CLS] She opens the door [SEP] and walks in. [SEP]          1.9   <-
    [CLS] She opens the door [SEP] of the sea. [SEP]           -0.4

Every option is a row that starts with the context, and a question is a group of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from firth.data import attention_fields
from firth.fields import NonNegativeInt
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.model import LM
from firth.objectives.classification import READOUTS, classification_head, readout_of
from firth.objectives.objective import DataStats, Objective, choice_loss, forward_flops, hidden_states, num_correct
from firth.objectives.reward_model import last_state, last_token_mask
from firth.tokenizer.vocab import Vocab
from firth.types import Batch, Constraints, Example, Metric, Outputs, UserError


@dataclass(frozen=True)
class MultipleChoice(Objective):
    """Predict which option is correct: {"options": rows of {"tokens", "token_type_ids"}, "label": its index}.

    Shown: one row for each option. Predicted: the index y of the correct one. Loss: -log softmax(r)[y], r_k the score of
    option k.

    Args:
        max_options: Rows of a group (0: the data's largest number of options). A question with fewer repeats its first row,
            which is masked out of the softmax.
        position: Where a row is read: "first" for an encoder, "last" for a decoder; "auto" is the one that fits the model.

    >>> vocab = Vocab(size=9, roles={"pad": 0}, special=np.arange(9) < 1)
    >>> example = {"options": [{"tokens": np.array([5, 6, 7])}, {"tokens": np.array([5, 8])}], "label": 1}
    >>> seen = MultipleChoice(max_options=3).build_example(example, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["absent"].tolist(), int(seen["choice"])
    ([[5, 6, 7], [5, 8, 0], [5, 6, 7]], [False, False, True], 1)
    """

    labels = {"choice": "choice"}
    metrics = {"accuracy": Metric("choice")}
    constraints = Constraints(packable=False)

    max_options: NonNegativeInt = 0
    position: Literal["auto", "first", "last"] = "auto"

    inputs = frozenset({"options", "label"})

    @property
    def attention(self) -> AttentionPattern:
        return READOUTS[self.position]

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Objective:
        position: Literal["first", "last"] = "last" if readout_of(config) == "last" else "first"
        return dataclasses.replace(
            self,
            position=position if self.position == "auto" else self.position,
            max_options=self.max_options or stats().max_options,
        )

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"choice": classification_head(config.hidden_size, 1)}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        rows = [
            row | (attention_fields.causal(len(row["tokens"])) if self.position == "last" else {})
            for row in example["options"]
        ]
        size = self.max_options or len(rows)
        if not 2 <= len(rows) <= size:
            raise UserError(
                f"a question with {len(rows)} options does not fit into a group of 2 to {size}: set `max_options`"
            )
        absent = np.arange(size) >= len(rows)
        shown = attention_fields.group(rows + rows[:1] * (size - len(rows)))
        return shown | {"absent": absent, "choice": np.int64(example["label"])}

    def forward(self, model: LM, batch: Batch) -> Outputs:
        return {"hidden": hidden_states(model, batch, self._readout(batch))}

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        return forward_flops(model, batch, self._readout(batch)) if forward is None else forward

    def _readout(self, batch: Batch) -> Tensor:
        """Return where each row is read, (B, K, T) bool."""
        if self.position == "last":
            return last_token_mask(batch)
        first = torch.zeros_like(batch["tokens"], dtype=torch.bool)
        first[..., 0] = True
        return first

    def scores(self, model: LM, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the score of each option, (B, K) float32; minus infinity for padding options."""
        hidden = outputs["hidden"]
        states = last_state(hidden, batch) if self.position == "last" else hidden[..., 0, :]  # (B, K, hidden_size)
        scores: Tensor = model.heads["choice"](states)[..., 0].float()
        return scores.masked_fill(batch["absent"], float("-inf"))

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        scores = self.scores(model, outputs, batch)
        return {"choice": choice_loss(scores, batch["choice"]), "accuracy": num_correct(scores, batch["choice"])}
