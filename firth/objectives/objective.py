"""What an objective is: show an example, run the model, score what it answers.

Every way of training a language model in firth is one subclass: `view`, `loss`, where it needs them `run` and `parts`,
and a few words on what it reads. They meet the trainer in one place, `firth.train.step`, which knows none of them:

    terms = objective.loss(model, objective.run(model, batch), batch)     # one SUM per term
    sum(terms[t] / count[t] for t in objective.targets).backward()        # counts are over all micro-batches and ranks

A question is asked *at a token*: the field named in `targets` holds a label there and IGNORE elsewhere. So the
same counting, gathering, padding and packing serve a masked word, the next token, a sentence's class at [CLS]
and a value estimate. (Whole-row answers, such as which of two responses is preferred, are fields without a token
axis.) Objectives compose with `+`: BERT is `NSP() + MLM()`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.data.layout import InfillPrompt
from firth.data.shuffle import ExampleRNG
from firth.model import flops
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.transformer import subset_positions
from firth.objectives import name_of
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs, UserError
from firth.validated import Ranged

PATTERN_DESCRIPTIONS: dict[AttentionPattern, str] = {
    "causal": "reads a text from left to right",
    "bidirectional": "reads a text from both sides",
    "permuted": "reads a text in an order of its own",
    "prefix": "reads a prompt both ways and writes on in one row",
    "seq2seq": "reads a source and writes an answer",
    "bidirectional_separate": "reads a text from left to right and from right to left, by two readers who do not meet",
    "none": "reads each token by itself",
    "latent": "squeezes a text through a latent",
}
"""A way of reading -> what an objective does that asks for it."""


@dataclass(frozen=True)
class DataStats:
    """What only the data knows. classes: the names of the answers; counts: how many examples each has. mean, spread: mean
    and standard deviation of the numbers to be told. options: the most that a question has. unanswerable: whether some
    question has no answer."""

    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    max_options: int = 0
    has_unanswerable: bool = False


class Objective(Ranged, section="objective"):
    """The whole interface. Subclasses are frozen dataclasses; their fields are the objective's settings.

    targets: loss term -> the batch field that supervises it.
    measures: further sums that `loss` returns for the log alone (accuracy, KL) -> the field that counts them.
    ratios: what the log shows of two measures with one count, one over the other: (over, under). Exact however a step is cut.
    classes: the names of the answers, for objectives that choose among some.
    whole: whether the examples of a step answer each other (in-batch negatives): then a step cannot be cut into
    micro-batches or shared by ranks, and is refused where it would be.
    packs: whether several examples can share a row; those with an answer for the whole row cannot.
    lays: the fields besides the answers that `view` lays out, on which another objective may be added; empty for groups of
    rows, to which nothing can be added. keeps: whether `view` also passes on fields that it does not know.
    sentinels: how many `<extra_id_n>` a tokenizer that is trained for it has.
    alone: False for what only adds to another's loss (a penalty). borrows: names of the parts that its loss uses and another
    addend must bring.
    precomputed: the fields of an example that a model computed once and that the loss compares with the numbers of the model in
    training (log-probabilities under a reference, or under the policy that sampled).
    added_tokens: how many tokens the longest row that `view` makes of an example has beyond the example's.
    dropout: whether training applies the model's dropout, LoRA's included. Objectives with precomputed fields set it to False:
    those are computed without dropout, and two passes of the same weights must agree.
    """

    labels: ClassVar[dict[str, str]] = {}
    metrics: ClassVar[dict[str, str]] = {}
    needs_full_batch: ClassVar[bool] = False
    packable: ClassVar[bool] = True
    output_fields: ClassVar[frozenset[str]] = frozenset({"tokens"})
    keeps_fields: ClassVar[bool] = False
    num_sentinels: ClassVar[int] = 0
    standalone: ClassVar[bool] = True
    required_heads: ClassVar[frozenset[str]] = frozenset()
    precomputed_fields: ClassVar[frozenset[str]] = frozenset()
    added_tokens: ClassVar[int] = 0
    dropout: bool = True
    metric_ratios: ClassVar[dict[str, tuple[str, str]]] = {}
    class_names: tuple[str, ...] = ()

    def with_stats(self, stats: Callable[[], DataStats]) -> Objective:
        """The objective with what its data knows, which is read only if it is asked for; most ask nothing."""
        return self

    def for_model(self, config: ModelConfig) -> Objective:
        """The objective as it suits a shape, where it leaves that open (where an answer is read)."""
        return self

    @property
    def num_copies(self) -> int:
        """How many views each example has, which epochs take turns with; 0: a new one at every visit."""
        return 0

    @property
    def text_units(self) -> frozenset[str]:
        """What `view` looks for in a text: "words", "names", "sentences"; a run reports where it does not find them."""
        return frozenset()

    def components(self) -> tuple[Objective, ...]:
        """The objectives that it is the sum of, in the order of their views."""
        return (self,)

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        """The fields that `view` reads of an example with the fields `given`; a recipe whose segment gives fewer is refused."""
        return frozenset({"tokens"})

    def outputs(self, given: frozenset[str]) -> frozenset[str]:
        """The fields of what `view` makes of such an example, as far as another objective may count on them."""
        own = self.output_fields.union(self.labels.values(), self.metrics.values())
        return own | given if self.keeps_fields else own

    def attention_pattern(self) -> AttentionPattern:
        """What it asks of a trunk; a recipe whose shape does not honour it is refused."""
        return "any"

    def missing_from(self, config: ModelConfig) -> str:
        """What else a shape lacks to be trained so, and the setting that mends it; empty where nothing."""
        return ""

    def at_step(self, step: int) -> Objective:
        """The objective as it stands at a step of training: a weight that ramps up is a function of the step alone.

        Training alone asks; held-out text is always scored by the objective as the recipe states it.
        """
        return self

    def finalize(self, model: LM) -> None:
        """What is done to a trained model before it is exported: a head that learnt in units of its own is put into the
        data's."""

    def notes(self, metrics: Mapping[str, float]) -> list[str]:
        """What a reader of a run's last metrics should be told (a collapse), in whole sentences."""
        return []

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        """What it adds to the model: a head, a generator, a value head."""
        return {}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        """What is shown and what is asked: a pure function of (example, rng), NumPy only, on the CPU."""
        return example

    def build_examples(
        self, examples: Sequence[Example], vocab: Vocab, draws: ExampleRNG, streams: Sequence[tuple[int, int]]
    ) -> list[Example]:
        """Return `view` of many examples, all at once where that is faster.

        Args:
            examples: What is shown.
            vocab: The vocabulary.
            draws: Gives the generator of each example.
            streams: The epoch and the index of each example, which its generator goes by.
        """
        return [self.build_example(x, vocab, draws.at(*stream)) for x, stream in zip(examples, streams, strict=True)]

    def needed_positions(self, batch: Batch) -> Tensor | None:
        """Where the loss reads a state, (..., T) bool: others need not be made. None: it may be anywhere."""
        return None

    def forward(self, model: LM, batch: Batch) -> Outputs:
        """How the model reads the batch; hidden: (..., T, width)."""
        return {"hidden": model(batch, needed=self.needed_positions(batch))}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """One SUM (not mean) per term of `targets` and `measures`."""
        raise NotImplementedError(type(self).__name__)

    def lm_model(self, model: LM) -> LM:
        """The model whose vocabulary head answers `labels`, if one does: this one, or one among its parts."""
        return model

    def hide(self, tokens: np.ndarray, at: int, vocab: Vocab) -> Example | None:
        """How one hidden token of a bare text (n,) is asked: `labels` hold tokens[at] alone, and what is shown is all that
        the objective lets a model see of the rest. None for an objective that asks for no token."""
        return None

    def build_infill(self, pieces: Sequence[np.ndarray], vocab: Vocab) -> InfillPrompt | None:
        """Return how a text with gaps is shown to a model that writes what is missing; None: it does not learn to.

        Args:
            pieces: Token ids of the text between the gaps: one piece more than there are gaps.
            vocab: The ids of sentinels, masks and the stop token.

        Raises:
            UserError: There are more gaps than the vocabulary has sentinels for.
        """
        return None

    def forward_flops(self, model: LM, batch: Batch) -> float:
        """What `run` costs, forward and backward (`firth.model.flops`). To be said anew where it is not one pass."""
        work, prefix, prompt = forward_work(model, batch, self.needed_positions(batch)), model.prefix, model.prompt
        if prefix is not None or prompt is not None:
            counts = (0 if part is None else part.tokens for part in (prefix, prompt))
            work = flops.with_prefix(work, batch, model.config, *counts)
        return flops.stack_flops(model.config, work)

    def loss_flops(self, model: LM, batch: Batch) -> float:
        """What `loss` costs beside that: the heads it runs. Those of a few rows are nothing; a vocabulary's counts."""
        return 0.0

    def __add__(self, other: Objective) -> Objective:
        return Sum(self, other)


@dataclass(frozen=True)
class Sum(Objective):
    """Two objectives on one forward pass: `first` lays the example out, `second` works on what it laid out."""

    first: Objective
    second: Objective

    def __post_init__(self) -> None:
        super().__post_init__()
        names = "+".join(name_of(type(one)) for one in self.components())
        apart = "train with one of them, or with one after the other (init_from=RUN)"
        shared = self.first.labels.keys() & self.second.labels.keys()
        if shared:
            raise UserError(f"cannot add {names}: two of them have the loss term {sorted(shared)[0]!r}; {apart}")
        readers = [o for o in (self.first, self.second) if type(o).forward is not Objective.forward]
        if len(readers) == 2 and not any(isinstance(o, Sum) for o in readers):
            raise UserError(f"cannot add {names}: each runs the model in a way of its own; {apart}")
        if len({self.first.attention_pattern(), self.second.attention_pattern()} - {"any"}) == 2:
            ways = f"{PATTERN_DESCRIPTIONS[self.first.attention_pattern()]}, the other {PATTERN_DESCRIPTIONS[self.second.attention_pattern()]}"
            raise UserError(f"cannot add {names}: one {ways}; {apart}")
        object.__setattr__(self, "labels", self.first.labels | self.second.labels)
        object.__setattr__(self, "metrics", self.first.metrics | self.second.metrics)
        object.__setattr__(self, "standalone", self.first.standalone or self.second.standalone)
        object.__setattr__(self, "required_heads", self.first.required_heads | self.second.required_heads)
        object.__setattr__(self, "precomputed_fields", self.first.precomputed_fields | self.second.precomputed_fields)
        object.__setattr__(self, "dropout", self.first.dropout and self.second.dropout)
        object.__setattr__(self, "needs_full_batch", self.first.needs_full_batch or self.second.needs_full_batch)
        object.__setattr__(self, "packable", self.first.packable and self.second.packable)
        object.__setattr__(self, "metric_ratios", self.first.metric_ratios | self.second.metric_ratios)
        object.__setattr__(self, "class_names", self.first.class_names or self.second.class_names)

    def components(self) -> tuple[Objective, ...]:
        return self.first.components() + self.second.components()

    def with_stats(self, stats: Callable[[], DataStats]) -> Objective:
        return Sum(self.first.with_stats(stats), self.second.with_stats(stats))

    def for_model(self, config: ModelConfig) -> Objective:
        return Sum(self.first.for_model(config), self.second.for_model(config))

    @property
    def num_copies(self) -> int:
        return max(self.first.num_copies, self.second.num_copies)

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        laid = self.first.outputs(given)
        return self.first.inputs(given) | (self.second.inputs(laid) - laid)

    def outputs(self, given: frozenset[str]) -> frozenset[str]:
        return self.second.outputs(self.first.outputs(given))

    def attention_pattern(self) -> AttentionPattern:
        first = self.first.attention_pattern()
        return self.second.attention_pattern() if first == "any" else first

    def missing_from(self, config: ModelConfig) -> str:
        return self.first.missing_from(config) or self.second.missing_from(config)

    def at_step(self, step: int) -> Objective:
        return dataclasses.replace(self, first=self.first.at_step(step), second=self.second.at_step(step))

    def finalize(self, model: LM) -> None:
        self.first.finalize(model)
        self.second.finalize(model)

    def notes(self, metrics: Mapping[str, float]) -> list[str]:
        return self.first.notes(metrics) + self.second.notes(metrics)

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return self.first.heads(config) | self.second.heads(config)

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return self.second.build_example(self.first.build_example(example, vocab, rng), vocab, rng)

    @property
    def _reader(self) -> Objective:
        """The one of the two that runs the model."""
        return self.first if type(self.second).forward is Objective.forward else self.second

    def needed_positions(self, batch: Batch) -> Tensor | None:
        first, second = self.first.needed_positions(batch), self.second.needed_positions(batch)
        return None if first is None or second is None else first | second

    def forward(self, model: LM, batch: Batch) -> Outputs:
        reader = self._reader
        return (
            super().forward(model, batch) if type(reader).forward is Objective.forward else reader.forward(model, batch)
        )

    def lm_model(self, model: LM) -> LM:
        return self._reader.lm_model(model)

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.first.loss(model, outputs, batch) | self.second.loss(model, outputs, batch)

    def hide(self, tokens: np.ndarray, at: int, vocab: Vocab) -> Example | None:
        asked_ = self.second.hide(tokens, at, vocab)
        return self.first.hide(tokens, at, vocab) if asked_ is None else asked_

    def build_infill(self, pieces: Sequence[np.ndarray], vocab: Vocab) -> InfillPrompt | None:
        shown = self.second.build_infill(pieces, vocab)
        return self.first.build_infill(pieces, vocab) if shown is None else shown

    def forward_flops(self, model: LM, batch: Batch) -> float:
        reader = self._reader
        own = type(reader).forward is Objective.forward
        return super().forward_flops(model, batch) if own else reader.forward_flops(model, batch)

    def loss_flops(self, model: LM, batch: Batch) -> float:
        return self.first.loss_flops(model, batch) + self.second.loss_flops(model, batch)


class TokenObjective(Objective):
    """Cross-entropy on `labels`: the loss of MLM, causal and prefix LM, span corruption, denoising and SFT alike."""

    labels: ClassVar[dict[str, str]] = {"tokens": "labels"}

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"lm": LMHead(config)}

    def needed_positions(self, batch: Batch) -> Tensor | None:
        return batch["labels"] != IGNORE

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"tokens": token_loss(model, outputs["hidden"], batch["labels"])}

    def loss_flops(self, model: LM, batch: Batch) -> float:
        return vocabulary_flops(model, batch["labels"])


def forward_work(model: LM, batch: Batch, wanted: Tensor | None) -> flops.Work:
    """What one pass over a batch is to the model, whose last block is run for the wanted (..., T) alone where that pays."""
    index = None if wanted is None or not model.config.supports_subset else subset_positions(wanted.flatten(0, -2))
    if wanted is None or index is None:
        return flops.work(batch)
    run = torch.zeros_like(wanted.flatten(0, -2)).scatter(-1, index, True)
    return flops.work(batch, run.view_as(wanted))


def token_loss(model: LM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum of -log p(label) over the positions that are asked; the head runs nowhere else.

    hidden (..., T, width), labels (..., T) with IGNORE where nothing is asked. Returns a scalar.
    """
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    return head.nll(*supervised(hidden, labels))


def vocabulary_flops(model: LM, labels: Tensor) -> float:
    """What the vocabulary head costs at the positions that are asked, in `token_loss` or `log_probs`."""
    whole = flops.head_flops(model.config, flops.supervised_positions(labels))
    return whole if model.heads["lm"].weight.requires_grad else whole * 2 / 3


def supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The states and labels of the asked positions alone: (N, width), (N,), in row order."""
    at = (labels.flatten() != IGNORE).nonzero()[:, 0]
    flat = hidden.flatten(0, -2)
    if len(at) == len(flat):
        return flat, labels.flatten()
    return flat.index_select(0, at), labels.flatten().index_select(0, at)


def log_probs(model: LM, hidden: Tensor, labels: Tensor) -> Tensor:
    """log p(label) at every asked position, 0 elsewhere: (..., T) float32. Keeps the graph."""
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    states, wanted = supervised(hidden, labels)
    out = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    return out.masked_scatter(labels != IGNORE, head.log_probs(states, wanted))


def choice_loss(scores: Tensor, choice: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Sum of -log softmax(scores)[choice]: classification, NSP, multiple choice, Bradley-Terry and DPO alike.

    scores (..., K), choice (...) with IGNORE where nothing is asked. A sigmoid of a difference is K = 2. smoothing: the
    share of the target that is spread over all K evenly (Szegedy 2016, section 7). weights (K,): what each choice counts.
    """
    return F.cross_entropy(
        scores.flatten(0, -2).float(), choice.flatten(), weights, ignore_index=IGNORE, reduction="sum",
        label_smoothing=smoothing,
    )  # fmt: skip


def num_correct(scores: Tensor, choice: Tensor) -> Tensor:
    """How many choices the scores get right; a tie for the best is wrong (what a constant scorer would get for free)."""
    best = scores.max(-1, keepdim=True).values
    unique = (scores == best).sum(-1) == 1
    return ((scores.argmax(-1) == choice) & unique & (choice != IGNORE)).sum().float()
