"""The span boundary objective: guess a hidden token from what stands around its span (SpanBERT, Joshi 2020, section 3.2).

A span's two neighbours must come to hold what is in it, which a task that picks spans (question answering, coreference)
can then read from its ends. Token i of a hidden span s..e is asked of the states at s - 1 and e + 1 and of its place:

    shown    Super Bowl 50 was [MASK] [MASK] [MASK] [MASK] to determine the champion
    asked               an American football game         "football": 3rd after "was", which "to" follows

SpanBERT is `MLM(noise="geometric", alike=True) + SBO()`, on single segments and without NSP. A boundary is a token that
is not hidden: two spans that touch are one span here. What a text begins or ends with has one neighbour only and is not
asked, nor is what lies deeper in a span than `longest` (in SpanBERT's own code: 20).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from firth.model import flops
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import Objective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs, UserError
from firth.validated import TokenCount


@dataclass(frozen=True)
class SBO(Objective):
    """Asks again, of the boundaries, what MLM has hidden; scored with the vocabulary matrix of MLM's head.

    before, after: how far off the two boundaries of an asked token are (0 elsewhere): distances and not places in the
    row, so that a packed row says the same.

    >>> example = {"tokens": np.array([2, 1, 1, 8, 1]), "labels": np.array([-100, 5, 6, -100, 9])}
    >>> seen = SBO().build_example(example, Vocab(size=10, roles={}, special=np.arange(10) < 4), np.random.default_rng(0))
    >>> for name in ("boundary", "before", "after"): print(name, seen[name].tolist())
    boundary [-100, 5, 6, -100, -100]
    before [0, 1, 2, 0, 0]
    after [0, 2, 1, 0, 0]
    """

    labels: ClassVar[dict[str, str]] = {"boundary": "boundary"}
    keeps_fields: ClassVar[bool] = True
    standalone: ClassVar[bool] = False
    required_heads: ClassVar[frozenset[str]] = frozenset({"lm"})

    max_span_length: TokenCount = 20

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        return frozenset({"tokens", "labels"})

    def attention_pattern(self) -> AttentionPattern:
        return "bidirectional"

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        """Two layers with GELU and a norm (the paper's equations 3 and 4), and a vector for each place in a span."""
        width, read = config.hidden_size, LMHead.input_size(config)
        place = nn.Embedding(self.max_span_length, width)
        first, second = nn.Linear(3 * width, width), nn.Linear(width, read)
        nn.init.normal_(place.weight, std=config.init_std or 0.02)
        for linear in (first, second):
            nn.init.normal_(linear.weight, std=config.init_std or linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        head = nn.Sequential(first, nn.GELU(), nn.LayerNorm(width), second, nn.GELU(), nn.LayerNorm(read))
        return {"boundary": head, "place": place}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        if "labels" not in example:
            raise UserError("sbo asks what another objective has hidden: write objective=[mlm, sbo], or MLM() + SBO()")
        labels = example["labels"]
        hidden, at = labels != IGNORE, np.arange(len(labels))
        left = np.maximum.accumulate(np.where(hidden, -1, at))
        right = np.minimum.accumulate(np.where(hidden, len(at), at)[::-1])[::-1]
        fair = hidden & (left >= 0) & (right < len(at)) & (at - left <= self.max_span_length)
        return example | {
            "boundary": np.where(fair, labels, IGNORE),
            "before": np.where(fair, at - left, 0),
            "after": np.where(fair, right - at, 0),
        }

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        lm: LMHead = model.heads["lm"]  # type: ignore[assignment]
        states, labels = outputs["hidden"].flatten(0, -2), batch["boundary"].flatten()
        at = (labels != IGNORE).nonzero()[:, 0]
        before, after = batch["before"].flatten()[at], batch["after"].flatten()[at]
        around = (states[at - before], states[at + after], model.heads["place"](before - 1))
        read = model.heads["boundary"](torch.cat([x.to(states.dtype) for x in around], -1))
        return {"boundary": lm.nll_of_transformed(read, labels[at])}

    def loss_flops(self, model: LM, batch: Batch) -> float:
        count, width = flops.supervised_positions(batch["boundary"]), model.config.hidden_size
        read = LMHead.input_size(model.config)
        return flops.linear(count, 3 * width, width) + flops.linear(count, read, width + model.config.vocab_size)
