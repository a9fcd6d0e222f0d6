"""Masked language modelling: hide some tokens, guess them from both sides (BERT, Devlin 2019, section 3.1).

15% of the tokens are asked. Of those 80% are shown as [MASK], 10% as a random token and 10% as they are, so that
the model cannot know which words it may trust. BERT drew the masks once for each of ten copies of the text;
RoBERTa (Liu 2019) draws them anew at each visit, which is the default here. Which copy an example is shown in goes by the
epoch, and what is drawn for it by its number: neither tells of what is hidden.

    the quick brown fox jumps over     shown    the [MASK] brown fox tree over
                                       asked     -   quick   -    -  jumps  -
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from firth.data.noise import NOISES, Kind, disguised, text_units
from firth.model.shape import Reads
from firth.objectives.objective import Tokens
from firth.ranges import NonNegativeInt, OpenShare, Share
from firth.text.vocab import Vocab
from firth.types import IGNORE, Example, UserError


@dataclass(frozen=True)
class MLM(Tokens):
    """Guess the hidden tokens. Control tokens are never hidden; other fields of the example (segments) pass through.

    rate: share of the tokens that is asked. noise: which (`firth.data.noise`). masked, random: shares of the asked
    that are shown as [MASK] and as a random token; the rest is shown as it is. alike: one such draw for each run of
    hidden tokens (SpanBERT), not for each token. masks: 0 draws anew at every visit; n takes turns with n copies of each
    example, drawn once (BERT: 10); what else is drawn for a copy (whether its pair belongs together) is fixed with it.

    >>> vocab = Vocab(size=10, roles={"mask": 1, "cls": 2, "sep": 3}, special=np.arange(10) < 4)
    >>> seen = MLM(rate=0.5, masked=1.0, random=0.0).view(
    ...     {"tokens": np.array([2, 5, 6, 7, 8, 3])}, vocab, np.random.default_rng(2))
    >>> seen["tokens"].tolist(), seen["labels"].tolist()
    ([2, 1, 6, 1, 8, 3], [-100, 5, -100, 7, -100, -100])
    """

    keeps: ClassVar[bool] = True

    rate: OpenShare = 0.15
    noise: Kind = "iid"
    masked: Share = 0.8
    random: Share = 0.1
    alike: bool = False
    masks: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.masked + self.random > 1:
            raise UserError(
                f"mlm: masked={self.masked} and random={self.random} are shares of the same tokens: make them at most 1 together"
            )

    @property
    def copies(self) -> int:
        return self.masks

    @property
    def text_units(self) -> frozenset[str]:
        return text_units(self.noise)

    def reads(self) -> Reads:
        return "both"

    def view(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        at = NOISES[self.noise](tokens, vocab, self.rate, rng).nonzero()[0]
        kind = rng.random(len(at))
        if self.alike:
            kind = kind[(np.diff(at, prepend=-1) != 1).cumsum() - 1]
        labels, shown = np.empty_like(tokens), tokens.copy()
        labels.fill(IGNORE)
        labels[at] = tokens[at]
        shown[at] = disguised(tokens[at], vocab, self.masked, self.random, kind, rng)
        return example | {"tokens": shown, "labels": labels}

    def cloze(self, tokens: np.ndarray, at: int, vocab: Vocab) -> Example:
        shown = vocab.frame(tokens)
        labels = np.full(len(shown), IGNORE)
        labels[at + 1], shown[at + 1] = tokens[at], vocab.mask
        return {"tokens": shown, "labels": labels}
