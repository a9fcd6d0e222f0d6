"""Masked language modeling: hide some tokens and predict them from both sides (BERT, Devlin 2019, section 3.1).

15% of the tokens are selected. Of those 80% are shown as [MASK], 10% as a random token and 10% unchanged, so that the model
cannot know which tokens to trust. BERT drew the masks once for each of ten copies of the text; RoBERTa (Liu 2019) draws
them anew at every visit, which is the default here. The copy goes by the epoch and its random numbers by the example's
index, so neither depends on what is masked.

    the quick brown fox jumps over     shown     the [MASK] brown fox tree over
                                       labels     -   quick   -    -  jumps  -
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from firth.data.collate import build_examples
from firth.data.noise import NOISES, Kind, apply_mask_tokens, text_units
from firth.data.shuffle import ExampleRNG
from firth.fields import NonNegativeInt, OpenShare, Share
from firth.objectives.objective import TokenObjective
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Constraints, Example, UserError


@dataclass(frozen=True)
class MLM(TokenObjective):
    """Predict masked tokens from both sides.

    Shown: the text with the selected tokens masked. Predicted: the original of each selected token ("labels"). Loss: -sum of
    log p(token | shown text) over the selected tokens. Special tokens are never selected; other fields of the example
    (token_type_ids) pass through.

    Args:
        mlm_probability: Share of the tokens that is selected.
        noise: How they are selected (`firth.data.noise`).
        mask_fraction: Share of the selected tokens that is shown as [MASK].
        random_fraction: Share of the selected tokens that is shown as a random token; the rest is shown unchanged.
        whole_span_replacement: Replace each run of selected tokens in one way (SpanBERT) instead of each token by itself.
        num_maskings: 0 draws anew at every visit; n rotates through n fixed maskings of each example (BERT: 10). Whatever
            else is drawn for an example (whether its pair belongs together) is fixed with them.

    >>> vocab = Vocab(size=10, roles={"mask": 1, "cls": 2, "sep": 3}, special=np.arange(10) < 4)
    >>> seen = MLM(mlm_probability=0.5, mask_fraction=1.0, random_fraction=0.0).build_example(
    ...     {"tokens": np.array([2, 5, 6, 7, 8, 3])}, vocab, np.random.default_rng(2))
    >>> seen["tokens"].tolist(), seen["labels"].tolist()
    ([2, 1, 6, 1, 8, 3], [-100, 5, -100, 7, -100, -100])
    """

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
                f"mlm: mask_fraction={self.mask_fraction} and random_fraction={self.random_fraction} add up to more than 1: "
                "they are shares of the same tokens"
            )

    @property
    def constraints(self) -> Constraints:
        return Constraints(num_copies=self.num_maskings, text_units=text_units(self.noise))

    attention = "bidirectional"

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

    def hide(self, pieces: Sequence[np.ndarray], vocab: Vocab, answer: int | None = None) -> Example | None:
        if answer is None:
            return None
        shown = vocab.add_special_tokens(np.concatenate((pieces[0], [vocab.mask], pieces[1])))
        labels = np.full(len(shown), IGNORE)
        labels[len(pieces[0]) + 1] = answer
        return {"tokens": shown, "labels": labels}


@build_examples.register(MLM)
def _mask_many(
    mlm: MLM, examples: Sequence[Example], vocab: Vocab, draws: ExampleRNG, streams: Sequence[tuple[int, int]]
) -> list[Example]:
    """Return `build_example` of many examples: the same random numbers for each, one vectorized pass over all."""
    if mlm.noise != "iid" or mlm.whole_span_replacement or type(mlm).build_example is not MLM.build_example:
        return build_examples.dispatch(object)(mlm, examples, vocab, draws, streams)
    tokens = np.concatenate([example["tokens"] for example in examples])
    lengths = np.array([len(example["tokens"]) for example in examples])
    # Random numbers for masked tokens: about six times as many as needed.
    ends, room = np.cumsum(lengths), lengths // 2 + 8
    stops = np.cumsum(lengths + room)
    starts = stops - lengths - room
    drawn = np.empty(int(stops[-1]))
    for stream, low, high in zip(streams, starts.tolist(), stops.tolist(), strict=True):
        draws.at(*stream).random(out=drawn[low:high])
    token_slot = np.repeat(starts - ends + lengths, lengths) + np.arange(len(tokens))
    at = np.flatnonzero((drawn[token_slot] < mlm.mlm_probability) > vocab.special[tokens])
    example_of = ends.searchsorted(at, "right")
    num_masked = np.bincount(example_of, minlength=len(examples))
    first_masked = np.cumsum(num_masked) - num_masked
    slot = np.arange(len(at)) - first_masked[example_of] + (starts + lengths)[example_of]
    kind = drawn[np.minimum(slot, stops[example_of] - 1)]
    masked = kind < mlm.mask_fraction
    replaced = np.flatnonzero((kind < mlm.mask_fraction + mlm.random_fraction) > masked)
    replaced_example = example_of[replaced]
    num_random = np.bincount(replaced_example, minlength=len(examples))
    slot = (
        np.arange(len(replaced))
        - (np.cumsum(num_random) - num_random)[replaced_example]
        + (starts + lengths + num_masked)[replaced_example]
    )
    labels, shown = np.full_like(tokens, IGNORE), tokens.copy()
    labels[at] = tokens[at]
    shown[at[masked]] = vocab.mask
    shown[at[replaced]] = vocab.drawn(drawn[np.minimum(slot, stops[replaced_example] - 1)])
    made = [
        example | {"tokens": shown[low:high], "labels": labels[low:high]}
        for example, low, high in zip(examples, (ends - lengths).tolist(), ends.tolist(), strict=True)
    ]
    for i in np.flatnonzero(num_masked + num_random > room).tolist():
        made[i] = mlm.build_example(examples[i], vocab, draws.at(*streams[i]))
    return made
