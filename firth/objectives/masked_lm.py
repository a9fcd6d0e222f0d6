"""Masked language modeling (BERT) and the span boundary objective (SpanBERT).

Masked language modeling: hide some tokens and predict them from both sides (BERT, Devlin 2019, section 3.1).

15% of the tokens are selected. Of those 80% are shown as [MASK], 10% as a random token and 10% unchanged, so that the model
cannot know which tokens to trust. BERT drew the masks once for each of ten copies of the text; RoBERTa (Liu 2019) draws
them anew at every visit, which is the default here. The copy goes by the epoch and its random numbers by the example's
index, so neither depends on what is masked.

    the quick brown fox jumps over     shown     the [MASK] brown fox tree over
                                       labels     -   quick   -    -  jumps  -

Span boundary objective: predict a masked token from the tokens around its span (SpanBERT, Joshi 2020, section 3.2).

The two neighbors of a span learn to represent its content, which a task that selects spans (question answering, coreference)
can then read from them. Token i of a masked span s..e is predicted from the states at s - 1 and e + 1 and its offset:

    shown       Super Bowl 50 was [MASK] [MASK] [MASK] [MASK] to determine the champion
    predicted                  an American football game         "football": 3rd after "was", before "to"

SpanBERT is `MLM(noise="geometric", whole_span_replacement=True) + SBO()`, on single text segments without NSP. A boundary is a
token that is not masked: two spans that touch are one span here. A span at the start or end of a text has one neighbor only
and is not predicted, nor are tokens deeper in a span than `max_span_length` (in SpanBERT's own code: 20).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from firth.data.collate import build_examples
from firth.data.noise import NOISES, Kind, apply_mask_tokens, text_units
from firth.data.shuffle import ExampleRNG
from firth.fields import NonNegativeInt, OpenShare, Share, TokenCount
from firth.model import flops
from firth.model.config import ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.objectives.objective import Objective, TokenObjective, forward_flops, hidden_states, label_indices
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Constraints, Example, Outputs, UserError


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
        at = label_indices(batch["boundary"])
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
