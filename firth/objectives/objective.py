"""Training objectives: build a training example, run the model, compute the loss.

Every way of training a language model in firth is a subclass of `Objective`: `build_example`, `loss`, where needed
`forward` and `heads`, and a description of its inputs. The trainer calls them in `firth.training.step` only:

    terms = objective.loss(model, objective.forward(model, batch), batch)  # one SUM per term
    sum(terms[t] / count[t] for t in objective.labels).backward()          # counts are over all micro-batches and ranks

Labels sit at token positions: a field named in `labels` holds a label where there is one and IGNORE elsewhere. Counting,
gathering, padding and packing are therefore the same for a masked word, the next token, a sentence's class at [CLS] and a
value estimate. (Labels of a whole row, such as which of two responses is preferred, are fields without a token axis.)
Objectives are added with `+`: BERT is `NSP() + MLM()`.
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

from firth.data.attention_fields import InfillPrompt
from firth.data.shuffle import ExampleRNG
from firth.fields import Validated
from firth.model import flops
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.forward_context import ForwardContext
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.transformer import subset_positions
from firth.objectives import name_of
from firth.tokenizer.vocab import Vocab
from firth.types import IGNORE, Batch, Example, Outputs, UserError

PATTERN_DESCRIPTIONS: dict[AttentionPattern, str] = {
    "causal": "reads a text from left to right",
    "bidirectional": "reads a text from both sides",
    "permuted": "predicts a text in a random order",
    "prefix": "reads a prompt in both directions and continues it in the same row",
    "seq2seq": "reads a source and writes a target",
    "bidirectional_separate": "reads a text with two separate models, left to right and right to left",
    "none": "reads each token by itself",
    "latent": "encodes a text into a latent vector",
}
"""Attention pattern -> what an objective that needs it does, for error messages."""


@dataclass(frozen=True)
class DataStats:
    """Statistics of the training data that configure an objective.

    Args:
        class_names: Names of the classes.
        class_counts: Number of examples of each class.
        mean: Mean of the numeric labels.
        std: Standard deviation of the numeric labels.
        max_options: Largest number of options of a question, or of answers in a ranking.
        has_unanswerable: Whether some question has no answer.
    """

    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    mean: float = 0.0
    std: float = 1.0
    max_options: int = 0
    has_unanswerable: bool = False


class Objective(Validated, section="objective"):
    """Interface of a training objective. Subclasses are frozen dataclasses; their fields are the objective's settings.

    Attributes:
        labels: Loss term -> the batch field that holds its labels.
        metrics: Further sums that `loss` returns for the log only (accuracy, KL) -> the batch field that counts them.
        metric_ratios: Logged name -> (numerator, denominator), two metrics with the same count. Exact for any split of a
            step into micro-batches.
        needs_full_batch: Whether the loss of an example depends on the others of the step (in-batch negatives). Such a step
            cannot be split into micro-batches or over ranks; recipes that would do so are rejected.
        packable: Whether several examples may share a row. False for labels of a whole row.
        output_fields: The fields besides the labels that `build_example` returns, on which an added objective may rely.
            Empty for groups of rows, to which no objective can be added.
        keeps_fields: Whether `build_example` passes on fields that it does not know.
        num_sentinels: Number of `<extra_id_n>` tokens of a tokenizer that is trained for it.
        standalone: False for objectives that only add to another's loss (a penalty).
        required_heads: Names of the heads that its loss uses and another component must bring.
        precomputed_fields: The fields of an example that a model computed once and that the loss compares with the model in
            training (log-probabilities under a reference, or under the policy that sampled).
        added_tokens: How many tokens the longest row that `build_example` returns has beyond the example's.
        dropout: Whether training applies the model's dropout, LoRA's included. Objectives with precomputed fields set it to
            False: those are computed without dropout, and two passes of the same weights must agree.
        class_names: Names of the classes, for objectives that predict one.
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
        """Return a copy configured with dataset statistics. `stats` is called only where an objective needs them."""
        return self

    def for_model(self, config: ModelConfig) -> Objective:
        """Return a copy that fits a model config, where a setting is "auto" (the position of a readout)."""
        return self

    @property
    def num_copies(self) -> int:
        """Number of fixed versions of each example, which epochs rotate through; 0: a new one at every visit."""
        return 0

    @property
    def text_units(self) -> frozenset[str]:
        """The units that `build_example` finds in a text: "words", "names", "sentences". A run warns where there are none."""
        return frozenset()

    def components(self) -> tuple[Objective, ...]:
        """Return the objectives that this one is the sum of, in the order in which they build an example."""
        return (self,)

    def inputs(self, given: frozenset[str] = frozenset()) -> frozenset[str]:
        """Return the fields that `build_example` reads of an example with the fields `given`.

        A recipe whose examples have fewer is rejected.
        """
        return frozenset({"tokens"})

    def outputs(self, given: frozenset[str]) -> frozenset[str]:
        """Return the fields of the example that `build_example` makes of one with the fields `given`."""
        own = self.output_fields.union(self.labels.values(), self.metrics.values())
        return own | given if self.keeps_fields else own

    def attention_pattern(self) -> AttentionPattern:
        """Return the attention pattern it needs; a recipe whose model does not support it is rejected."""
        return "any"

    def missing_from(self, config: ModelConfig) -> str:
        """Return what else a model config lacks and the setting that fixes it; empty if nothing."""
        return ""

    def at_step(self, step: int) -> Objective:
        """Return the objective at a training step: a weight that ramps up is a function of the step alone.

        Used in training only; held-out text is always scored with the recipe's objective.
        """
        return self

    def finalize(self, model: LM) -> None:
        """Change a trained model before its export, in place: a head trained on normalized labels is put into their units."""

    def notes(self, metrics: Mapping[str, float]) -> list[str]:
        """Return notes on the last metrics of a run (a collapse), as full sentences."""
        return []

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        """Return the modules it adds to the model: an LM head, a generator, a value head."""
        return {}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        """Return the model's inputs and the labels of an example: a pure function of (example, rng), NumPy only, on the CPU."""
        return example

    def build_examples(
        self, examples: Sequence[Example], vocab: Vocab, draws: ExampleRNG, streams: Sequence[tuple[int, int]]
    ) -> list[Example]:
        """Return `build_example` of many examples, all at once where that is faster.

        Args:
            examples: The examples.
            vocab: The vocabulary.
            draws: Creates the random generator of each example.
            streams: (epoch, index) of each example, the key of its generator.
        """
        return [self.build_example(x, vocab, draws.at(*stream)) for x, stream in zip(examples, streams, strict=True)]

    def needed_positions(self, batch: Batch) -> Tensor | None:
        """Return where the loss reads a hidden state, (..., T) bool, so that others can be skipped; None: anywhere."""
        return None

    def forward(self, model: LM, batch: Batch) -> Outputs:
        """Run the model. Returns "hidden": (..., T, hidden_size), and what else `loss` needs."""
        return {"hidden": model(batch, ForwardContext(needed_positions=self.needed_positions(batch)))}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return one SUM (not mean) per term of `labels` and `metrics`."""
        raise NotImplementedError(type(self).__name__)

    def lm_model(self, model: LM) -> LM:
        """Return the model whose LM head predicts `labels`: `model` itself, or one among its heads (RTD's generator)."""
        return model

    def hide(self, tokens: np.ndarray, at: int, vocab: Vocab) -> Example | None:
        """Return an example in which one token is predicted from as much of the rest as the objective lets a model see.

        Args:
            tokens: A text without special tokens, (n,).
            at: The index of the token to predict: `labels` holds tokens[at] and nothing else.
            vocab: The vocabulary.

        Returns:
            The example, or None for an objective that predicts no tokens.
        """
        return None

    def build_infill(self, pieces: Sequence[np.ndarray], vocab: Vocab) -> InfillPrompt | None:
        """Return the prompt for filling the gaps of a text; None for objectives that do not learn to.

        Args:
            pieces: Token ids of the text around the gaps: one piece more than there are gaps.
            vocab: The ids of sentinels, masks and the stop token.

        Raises:
            UserError: There are more gaps than the vocabulary has sentinels for.
        """
        return None

    def forward_flops(self, model: LM, batch: Batch) -> float:
        """Return the FLOPs of `forward` and its backward (`firth.model.flops`). Override where it is not one pass."""
        work, prefix, prompt = forward_work(model, batch, self.needed_positions(batch)), model.prefix, model.prompt
        if prefix is not None or prompt is not None:
            counts = (0 if module is None else module.tokens for module in (prefix, prompt))
            work = flops.with_prefix(work, batch, model.config, *counts)
        return flops.stack_flops(model.config, work)

    def loss_flops(self, model: LM, batch: Batch) -> float:
        """Return the FLOPs of `loss`, forward and backward. Small heads count as zero; an LM head does not."""
        return 0.0

    def __add__(self, other: Objective) -> Objective:
        return Sum(self, other)


@dataclass(frozen=True)
class Sum(Objective):
    """Two objectives on one forward pass.

    Args:
        first: Builds the example.
        second: Builds on the example that `first` returns.
    """

    first: Objective
    second: Objective

    def __post_init__(self) -> None:
        super().__post_init__()
        names = "+".join(name_of(type(one)) for one in self.components())
        remedy = "train with one of them, or with one after the other (init_from=RUN)"
        shared = self.first.labels.keys() & self.second.labels.keys()
        if shared:
            raise UserError(f"cannot add {names}: two of them have the loss term {sorted(shared)[0]!r}; {remedy}")
        custom = [o for o in (self.first, self.second) if type(o).forward is not Objective.forward]
        if len(custom) == 2 and not any(isinstance(o, Sum) for o in custom):
            raise UserError(f"cannot add {names}: each has its own forward pass; {remedy}")
        first, second = self.first.attention_pattern(), self.second.attention_pattern()
        if len({first, second} - {"any"}) == 2:
            patterns = f"{PATTERN_DESCRIPTIONS[first]}, the other {PATTERN_DESCRIPTIONS[second]}"
            raise UserError(f"cannot add {names}: one {patterns}; {remedy}")
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
        built = self.first.outputs(given)
        return self.first.inputs(given) | (self.second.inputs(built) - built)

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
    def _forward_objective(self) -> Objective:
        """The one of the two whose `forward` runs the model."""
        return self.first if type(self.second).forward is Objective.forward else self.second

    def needed_positions(self, batch: Batch) -> Tensor | None:
        first, second = self.first.needed_positions(batch), self.second.needed_positions(batch)
        return None if first is None or second is None else first | second

    def forward(self, model: LM, batch: Batch) -> Outputs:
        runner = self._forward_objective
        return (
            super().forward(model, batch) if type(runner).forward is Objective.forward else runner.forward(model, batch)
        )

    def lm_model(self, model: LM) -> LM:
        return self._forward_objective.lm_model(model)

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.first.loss(model, outputs, batch) | self.second.loss(model, outputs, batch)

    def hide(self, tokens: np.ndarray, at: int, vocab: Vocab) -> Example | None:
        hidden = self.second.hide(tokens, at, vocab)
        return self.first.hide(tokens, at, vocab) if hidden is None else hidden

    def build_infill(self, pieces: Sequence[np.ndarray], vocab: Vocab) -> InfillPrompt | None:
        shown = self.second.build_infill(pieces, vocab)
        return self.first.build_infill(pieces, vocab) if shown is None else shown

    def forward_flops(self, model: LM, batch: Batch) -> float:
        runner = self._forward_objective
        default = type(runner).forward is Objective.forward
        return super().forward_flops(model, batch) if default else runner.forward_flops(model, batch)

    def loss_flops(self, model: LM, batch: Batch) -> float:
        return self.first.loss_flops(model, batch) + self.second.loss_flops(model, batch)


class TokenObjective(Objective):
    """Token cross-entropy on `labels`: the loss of MLM, causal and prefix LM, span corruption, denoising and SFT."""

    labels: ClassVar[dict[str, str]] = {"tokens": "labels"}

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"lm": LMHead(config)}

    def needed_positions(self, batch: Batch) -> Tensor | None:
        return batch["labels"] != IGNORE

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"tokens": token_loss(model, outputs["hidden"], batch["labels"])}

    def loss_flops(self, model: LM, batch: Batch) -> float:
        return vocabulary_flops(model, batch["labels"])


def forward_work(model: LM, batch: Batch, needed: Tensor | None) -> flops.Work:
    """Return the work of one pass over a batch, whose last block runs only at the needed (..., T) where that is faster."""
    index = None if needed is None or not model.config.supports_subset else subset_positions(needed.flatten(0, -2))
    if needed is None or index is None:
        return flops.work(batch)
    run = torch.zeros_like(needed.flatten(0, -2)).scatter(-1, index, True)
    return flops.work(batch, run.view_as(needed))


def token_loss(model: LM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of -log p(label) over the supervised positions; the head runs only there.

    Args:
        model: A model with an LM head.
        hidden: Hidden states, (..., T, hidden_size).
        labels: Labels, (..., T), IGNORE where there is none.

    Returns:
        A scalar.
    """
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    return head.nll(*supervised(hidden, labels))


def vocabulary_flops(model: LM, labels: Tensor) -> float:
    """Return the FLOPs of the LM head at the supervised positions, in `token_loss` or `log_probs`."""
    whole = flops.head_flops(model.config, flops.supervised_positions(labels))
    return whole if model.heads["lm"].weight.requires_grad else whole * 2 / 3


def supervised(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the states and labels of the supervised positions: (N, hidden_size), (N,), in row order."""
    at = (labels.flatten() != IGNORE).nonzero()[:, 0]
    flat = hidden.flatten(0, -2)
    if len(at) == len(flat):
        return flat, labels.flatten()
    return flat.index_select(0, at), labels.flatten().index_select(0, at)


def log_probs(model: LM, hidden: Tensor, labels: Tensor) -> Tensor:
    """Return log p(label) at every supervised position, 0 elsewhere: (..., T) float32, with gradient."""
    head: LMHead = model.heads["lm"]  # type: ignore[assignment]
    states, targets = supervised(hidden, labels)
    out = torch.zeros(labels.shape, dtype=torch.float32, device=labels.device)
    return out.masked_scatter(labels != IGNORE, head.log_probs(states, targets))


def choice_loss(scores: Tensor, choice: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
    """Return the sum of -log softmax(scores)[choice]: classification, NSP, multiple choice, Bradley-Terry and DPO.

    Args:
        scores: Logits, (..., K). The sigmoid of a difference is K = 2.
        choice: Labels, (...), IGNORE where there is none.
        smoothing: Label smoothing: the share of the target that is spread evenly over all K (Szegedy 2016, section 7).
        weights: Weight of each class, (K,).
    """
    return F.cross_entropy(
        scores.flatten(0, -2).float(), choice.flatten(), weights, ignore_index=IGNORE, reduction="sum",
        label_smoothing=smoothing,
    )  # fmt: skip


def num_correct(scores: Tensor, choice: Tensor) -> Tensor:
    """Count the correct predictions. A tie for the best is wrong, or a constant scorer would be right for free."""
    best = scores.max(-1, keepdim=True).values
    unique = (scores == best).sum(-1) == 1
    return ((scores.argmax(-1) == choice) & unique & (choice != IGNORE)).sum().float()
