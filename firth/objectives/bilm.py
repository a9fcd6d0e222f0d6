"""The two language models of ELMo, one from left to right and one from right to left (Peters 2018, section 3.1).

They share the embedding and the softmax and nothing else: what one of them says of a token has seen only the tokens
before it, what the other says only those behind it. (One bidirectional network could not be trained so: its second
layer sees, through the other direction, the token that it is asked for.)

    the  cat  sat        forward asked   cat  sat   -         backward asked   -  the  cat

Where we differ: a full softmax in the place of a sampled one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from torch import Tensor, nn

from firth.model import flops
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import Objective, token_loss
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs


@dataclass(frozen=True)
class BiLM(Objective):
    """Predict the next token from the left and the previous one from the right: {"tokens"}, and "document_ids" where several.

    >>> vocab = Vocab(size=10, roles={}, special=np.zeros(10, bool))
    >>> seen = BiLM().build_example({"tokens": np.array([5, 6, 7])}, vocab, np.random.default_rng(0))
    >>> seen["tokens"].tolist(), seen["next"].tolist(), seen["previous"].tolist()
    ([5, 6, 7], [6, 7, -100], [-100, 5, 6])
    """

    labels: ClassVar[dict[str, str]] = {"forward": "next", "backward": "previous"}
    keeps_fields: ClassVar[bool] = True

    def attention_pattern(self) -> AttentionPattern:
        return "bidirectional_separate"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"lm": LMHead(one_reader(config))}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        after, before = np.full(len(tokens), IGNORE), np.full(len(tokens), IGNORE)
        after[:-1], before[1:] = tokens[1:], tokens[:-1]
        if "document_ids" in example:
            border = np.diff(example["document_ids"]) != 0
            after[:-1][border] = before[1:][border] = IGNORE
        return example | {"next": after, "previous": before}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        ahead, back = outputs["hidden"].chunk(2, -1)  # (..., T, width / 2) each
        return {
            "forward": token_loss(model, ahead, batch["next"]),
            "backward": token_loss(model, back, batch["previous"]),
        }

    def loss_flops(self, model: LM, batch: Batch) -> float:
        asked = flops.supervised_positions(batch["next"]) + flops.supervised_positions(batch["previous"])
        return flops.head_flops(one_reader(model.config), asked)


def one_reader(config: ModelConfig) -> ModelConfig:
    """The shape of one of the two language models, whose head this is."""
    return replace(config, hidden_size=config.embedding_dim, head_dim=0, separate_directions=False, causal=True)
