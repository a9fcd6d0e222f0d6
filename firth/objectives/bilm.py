"""Bidirectional language model of ELMo: one left to right, one right to left (Peters 2018, section 3.1).

The two share the embedding and the softmax and nothing else: the state of one has seen only the tokens before a token, that
of the other only those after it. (One bidirectional network could not be trained so: its second layer would see the token
to predict through the other direction.)

    the  cat  sat        forward labels   cat  sat   -         backward labels   -  the  cat

Difference from the original: a full softmax instead of a sampled one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from firth.model import flops
from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import Objective, token_loss
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs


@dataclass(frozen=True)
class BiLM(Objective):
    """Predict the next token from those before it and the previous token from those after it.

    Shown: the whole text. Predicted: the next token ("next") by one half of the state, the previous one ("previous") by the
    other. Loss: sum of -log p(w_t | w_<t) and -log p(w_t | w_>t). Example: {"tokens"}, and "document_ids" for several texts.

    >>> vocab = Vocab(size=10, roles={}, special=np.zeros(10, bool))
    >>> seen = BiLM().build_example({"tokens": np.array([5, 6, 7])}, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["next"].tolist(), seen["previous"].tolist()
    ([5, 6, 7], [6, 7, -100], [-100, 5, 6])
    """

    labels = {"forward": "next", "backward": "previous"}

    attention = "bidirectional_separate"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"lm": LMHead(direction_config(config))}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        after, before = np.full(len(tokens), IGNORE), np.full(len(tokens), IGNORE)
        after[:-1], before[1:] = tokens[1:], tokens[:-1]
        if "document_ids" in example:
            border = np.diff(example["document_ids"]) != 0
            after[:-1][border] = before[1:][border] = IGNORE
        return example | {"next": after, "previous": before}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        ahead, back = outputs["hidden"].chunk(2, -1)  # (..., T, hidden_size / 2) each
        return {
            "forward": token_loss(model, ahead, batch["next"]),
            "backward": token_loss(model, back, batch["previous"]),
        }

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        count = flops.supervised_positions(batch["next"]) + flops.supervised_positions(batch["previous"])
        return super().flops(model, batch, forward) + flops.head_flops(direction_config(model.config), count)


def direction_config(config: ModelConfig) -> ModelConfig:
    """Return the config of one of the two directions, for the shared LM head."""
    return config.with_fields(
        {"hidden_size": config.embedding_dim, "head_dim": 0, "rnn.separate_directions": False, "causal": True}
    )
