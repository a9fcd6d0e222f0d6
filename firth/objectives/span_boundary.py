"""Span boundary objective: predict a masked token from the tokens around its span (SpanBERT, Joshi 2020, section 3.2).

The two neighbors of a span learn to represent its content, which a task that selects spans (question answering, coreference)
can then read from them. Token i of a masked span s..e is predicted from the states at s - 1 and e + 1 and its offset:

    shown       Super Bowl 50 was [MASK] [MASK] [MASK] [MASK] to determine the champion
    predicted                  an American football game         "football": 3rd after "was", before "to"

SpanBERT is `MLM(noise="geometric", whole_span_replacement=True) + SBO()`, on single text segments without NSP. A boundary is a
token that is not masked: two spans that touch are one span here. A span at the start or end of a text has one neighbor only
and is not predicted, nor are tokens deeper in a span than `max_span_length` (in SpanBERT's own code: 20).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from firth.fields import TokenCount
from firth.model import flops
from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import Objective, forward_flops, hidden_states
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs, UserError


@dataclass(frozen=True)
class SBO(Objective):
    """Predict the tokens that MLM masked from the boundaries of their span.

    Shown: what MLM shows. Predicted: the masked tokens, with the vocabulary matrix of MLM's head. Loss: -sum over i of
    log p(x_i | h[s - 1], h[e + 1], offset i - s + 1). `before` and `after` are the distances to the two boundaries (0
    elsewhere): distances and not positions, so that they hold in a packed row.

    Args:
        max_span_length: The largest distance from the left boundary that is predicted.

    >>> example = {"tokens": np.array([2, 1, 1, 8, 1]), "labels": np.array([-100, 5, 6, -100, 9])}
    >>> seen = SBO().build_example(example, Vocab(size=10, roles={}, special=np.arange(10) < 4), np.random.default_rng(0))
    >>> for name in ("boundary", "before", "after"): print(name, seen[name].tolist())
    boundary [-100, 5, 6, -100, -100]
    before [0, 1, 2, 0, 0]
    after [0, 2, 1, 0, 0]
    """

    labels = {"boundary": "boundary"}

    max_span_length: TokenCount = 20

    inputs = frozenset({"tokens", "labels"})
    attention = "bidirectional"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        """Two layers with GELU and a norm (the paper's equations 3 and 4), and an embedding of the offset in a span."""
        width, read = config.hidden_size, LMHead.input_size(config)
        place = nn.Embedding(self.max_span_length, width)
        first, second = nn.Linear(3 * width, width), nn.Linear(width, read)
        nn.init.normal_(place.weight, std=config.init.std or 0.02)
        for linear in (first, second):
            nn.init.normal_(linear.weight, std=config.init.std or linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        head = nn.Sequential(first, nn.GELU(), nn.LayerNorm(width), second, nn.GELU(), nn.LayerNorm(read))
        return {"boundary": head, "place": place}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        if "labels" not in example:
            raise UserError(
                "sbo predicts what another objective has masked: set objective=[mlm, sbo], or write MLM() + SBO()"
            )
        labels = example["labels"]
        masked, at = labels != IGNORE, np.arange(len(labels))
        left = np.maximum.accumulate(np.where(masked, -1, at))
        right = np.minimum.accumulate(np.where(masked, len(at), at)[::-1])[::-1]
        valid = masked & (left >= 0) & (right < len(at)) & (at - left <= self.max_span_length)
        return example | {
            "boundary": np.where(valid, labels, IGNORE),
            "before": np.where(valid, at - left, 0),
            "after": np.where(valid, right - at, 0),
        }

    def forward(self, model: LM, batch: Batch) -> Outputs:
        return {"hidden": hidden_states(model, batch)}  # the boundaries are not at the labels

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        lm: LMHead = model.heads["lm"]  # type: ignore[assignment]
        states, labels = outputs["hidden"].flatten(0, -2), batch["boundary"].flatten()
        at = (labels != IGNORE).nonzero()[:, 0]
        before, after = batch["before"].flatten()[at], batch["after"].flatten()[at]
        around = (states[at - before], states[at + after], model.heads["place"](before - 1))
        read = model.heads["boundary"](torch.cat([x.to(states.dtype) for x in around], -1))
        return {"boundary": lm.nll_of_transformed(read, labels[at])}

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        count, width = flops.supervised_positions(batch["boundary"]), model.config.hidden_size
        read = LMHead.input_size(model.config)
        total = forward_flops(model, batch) if forward is None else forward
        return (
            total + flops.linear(count, 3 * width, width) + flops.linear(count, read, width + model.config.vocab_size)
        )
