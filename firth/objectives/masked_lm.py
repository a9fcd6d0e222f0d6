"""Masked language modelling: hide some tokens, guess them from both sides (BERT, Devlin 2019, section 3.1).

15% of the tokens are asked. Of those 80% are shown as [MASK], 10% as a random token and 10% as they are, so that
the model cannot know which words it may trust. BERT drew the masks once for each of ten copies of the text;
RoBERTa (Liu 2019) draws them anew at each visit, which is the default here. Which copy an example is shown in goes by the
epoch, and what is drawn for it by its number: neither tells of what is hidden.

    the quick brown fox jumps over     shown    the [MASK] brown fox tree over
                                       asked     -   quick   -    -  jumps  -
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from firth.data.noise import NOISES, Kind, apply_mask_tokens, text_units
from firth.data.shuffle import ExampleRNG
from firth.model.config import AttentionPattern
from firth.objectives.objective import TokenObjective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Example, UserError
from firth.validated import NonNegativeInt, OpenShare, Share


@dataclass(frozen=True)
class MLM(TokenObjective):
    """Guess the hidden tokens. Control tokens are never hidden; other fields of the example (segments) pass through.

    rate: share of the tokens that is asked. noise: which (`firth.data.noise`). masked, random: shares of the asked
    that are shown as [MASK] and as a random token; the rest is shown as it is. alike: one such draw for each run of
    hidden tokens (SpanBERT), not for each token. masks: 0 draws anew at every visit; n takes turns with n copies of each
    example, drawn once (BERT: 10); what else is drawn for a copy (whether its pair belongs together) is fixed with it.

    >>> vocab = Vocab(size=10, roles={"mask": 1, "cls": 2, "sep": 3}, special=np.arange(10) < 4)
    >>> seen = MLM(mlm_probability=0.5, mask_fraction=1.0, random_fraction=0.0).build_example(
    ...     {"tokens": np.array([2, 5, 6, 7, 8, 3])}, vocab, np.random.default_rng(2))
    >>> seen["tokens"].tolist(), seen["labels"].tolist()
    ([2, 1, 6, 1, 8, 3], [-100, 5, -100, 7, -100, -100])
    """

    keeps_fields: ClassVar[bool] = True

    mlm_probability: OpenShare = 0.15
    noise: Kind = "iid"
    mask_fraction: Share = 0.8
    random_fraction: Share = 0.1
    whole_span_replacement: bool = False
    num_maskings: NonNegativeInt = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mask_fraction + self.random_fraction > 1:
            raise UserError(
                f"mlm: masked={self.mask_fraction} and random={self.random_fraction} are shares of the same tokens: make them at most 1 together"
            )

    @property
    def num_copies(self) -> int:
        return self.num_maskings

    @property
    def text_units(self) -> frozenset[str]:
        return text_units(self.noise)

    def attention_pattern(self) -> AttentionPattern:
        return "bidirectional"

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        tokens = example["tokens"]
        at = NOISES[self.noise](tokens, vocab, self.mlm_probability, rng).nonzero()[0]
        kind = rng.random(len(at))
        if self.whole_span_replacement:
            kind = kind[(np.diff(at, prepend=-1) != 1).cumsum() - 1]
        labels, shown = np.empty_like(tokens), tokens.copy()
        labels.fill(IGNORE)
        labels[at] = tokens[at]
        shown[at] = apply_mask_tokens(tokens[at], vocab, self.mask_fraction, self.random_fraction, kind, rng)
        return example | {"tokens": shown, "labels": labels}

    def build_examples(
        self, examples: Sequence[Example], vocab: Vocab, draws: ExampleRNG, streams: Sequence[tuple[int, int]]
    ) -> list[Example]:
        """Return `view` of many examples: the same numbers are drawn for each, and all else is done to all of them at once."""
        if self.noise != "iid" or self.whole_span_replacement or type(self).build_example is not MLM.build_example:
            return super().build_examples(examples, vocab, draws, streams)
        tokens = np.concatenate([example["tokens"] for example in examples])
        lengths = np.array([len(example["tokens"]) for example in examples])
        ends, room = np.cumsum(lengths), lengths // 2 + 8  # draws for hidden tokens: six times as many as they are
        stops = np.cumsum(lengths + room)
        starts = stops - lengths - room
        drawn = np.empty(int(stops[-1]))
        for stream, low, high in zip(streams, starts.tolist(), stops.tolist(), strict=True):
            draws.at(*stream).random(out=drawn[low:high])
        for_each = np.repeat(starts - ends + lengths, lengths) + np.arange(len(tokens))
        at = np.flatnonzero((drawn[for_each] < self.mlm_probability) > vocab.special[tokens])
        owner = ends.searchsorted(at, "right")
        hidden = np.bincount(owner, minlength=len(examples))
        first = np.cumsum(hidden) - hidden
        place = np.arange(len(at)) - first[owner] + (starts + lengths)[owner]
        kind = drawn[np.minimum(place, stops[owner] - 1)]
        masked = kind < self.mask_fraction
        others = np.flatnonzero((kind < self.mask_fraction + self.random_fraction) > masked)
        owners = owner[others]
        random = np.bincount(owners, minlength=len(examples))
        place = np.arange(len(others)) - (np.cumsum(random) - random)[owners] + (starts + lengths + hidden)[owners]
        labels, shown = np.full_like(tokens, IGNORE), tokens.copy()
        labels[at] = tokens[at]
        shown[at[masked]] = vocab.mask
        shown[at[others]] = vocab.drawn(drawn[np.minimum(place, stops[owners] - 1)])
        made = [
            example | {"tokens": shown[low:high], "labels": labels[low:high]}
            for example, low, high in zip(examples, (ends - lengths).tolist(), ends.tolist(), strict=True)
        ]
        for i in np.flatnonzero(hidden + random > room).tolist():
            made[i] = self.build_example(examples[i], vocab, draws.at(*streams[i]))
        return made

    def hide(self, tokens: np.ndarray, at: int, vocab: Vocab) -> Example:
        shown = vocab.add_special_tokens(tokens)
        labels = np.full(len(shown), IGNORE)
        labels[at + 1], shown[at + 1] = tokens[at], vocab.mask
        return {"tokens": shown, "labels": labels}
