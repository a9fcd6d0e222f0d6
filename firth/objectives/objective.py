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

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from firth.data.collate import counted_fields
from firth.fields import Validated
from firth.model import flops
from firth.model.config import AttentionPattern, ModelConfig
from firth.model.forward_context import ForwardContext
from firth.model.heads import LMHead
from firth.model.model import LM
from firth.model.transformer import subset_positions
from firth.model.variants import ScalarMix
from firth.objectives import name_of
from firth.tokenizer.vocab import Vocab
from firth.types import (
    IGNORE,
    Batch,
    Constraints,
    DataStats,
    Example,
    Metric,
    Outputs,
    UserError,
    host_copy,
    on_both,
    with_host_copy,
)

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


class Objective(Validated, section="objective"):
    """Interface of a training objective. Subclasses are frozen dataclasses; their fields are the objective's settings.

    A subclass sets `attention = "causal"` and the like in its body, or defines a property where it depends on a setting.
    """

    @property
    def attention(self) -> AttentionPattern:
        """The attention pattern that it needs; a recipe whose model does not support it is rejected."""
        return "any"

    @property
    def inputs(self) -> frozenset[str]:
        """The example fields that `build_example` reads; a recipe whose examples have fewer is rejected."""
        return frozenset({"tokens"})

    @property
    def labels(self) -> Mapping[str, str]:
        """Loss term -> the batch field that holds its labels."""
        return {}

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Further numbers for the log (accuracy, KL) by name."""
        return {}

    @property
    def constraints(self) -> Constraints:
        """What it demands of batches, tokenizer and data."""
        return Constraints()

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Objective:
        """Return a copy whose open settings ("auto", 0, no class names) are those of the data and the model.

        Args:
            stats: Returns the statistics of the training data; called only where they are needed, since it reads the data.
            config: The model.

        Raises:
            UserError: The model cannot be trained with it; the message names the setting that fixes it.
        """
        return self

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        """Return the modules it adds to the model: an LM head, a generator, a value head."""
        return {}

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        """Return the model's inputs and the labels of an example: a pure function of (example, rng), NumPy only, on the CPU."""
        return example

    def forward(self, model: LM, batch: Batch) -> Outputs:
        """Run the model; states are computed only where the labels are. Override where `loss` reads others.

        Args:
            model: The model.
            batch: What `build_example` returned, collated. In training also "step", the number of the step, a scalar.

        Returns:
            "hidden": (..., T, hidden_size), and what else `loss` needs.
        """
        return {"hidden": hidden_states(model, batch, label_positions(self, batch))}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        """Return one SUM (not mean) per term of `labels` and per metric with a count."""
        raise UserError(f"objective {name_of(type(self))} has no method loss(model, outputs, batch)")

    def hide(self, pieces: Sequence[np.ndarray], vocab: Vocab, answer: int | None = None) -> Example | None:
        """Return the example in which the gaps of a text are filled, from as much of the rest as it lets a model see.

        Args:
            pieces: Token ids of the text around the gaps, without special tokens: one piece more than there are gaps.
            vocab: The vocabulary.
            answer: The token of the only gap, to be scored: `labels` holds it and nothing else. None: gaps of any length, to be
                filled by generation from the prompt, which is `source_tokens`, or `tokens` without an encoder.

        Returns:
            The example, or None where it predicts no tokens, or (without an answer) does not learn to fill gaps.

        Raises:
            UserError: There are more gaps than the vocabulary has sentinels for.
        """
        return None

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        """Return the FLOPs of a step on a batch, forward and backward (`firth.model.flops`).

        Small heads count as zero; an LM head does not. Override where `forward` is not one pass, or `loss` has a large head.

        Args:
            model: The model.
            batch: The batch.
            forward: The FLOPs of the forward pass, where another component of a sum runs it; None: count it here.
        """
        return forward_flops(model, batch, label_positions(self, batch)) if forward is None else forward

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
        names = "+".join(name_of(type(one)) for one in components(self))
        remedy = "train with one of them, or with one after the other (init_from=RUN)"
        shared = self.first.labels.keys() & self.second.labels.keys()
        if shared:
            raise UserError(f"cannot add {names}: two of them have the loss term {sorted(shared)[0]!r}; {remedy}")
        if len(self._with_forward) > 1:
            raise UserError(f"cannot add {names}: each has its own forward pass; {remedy}")
        first, second = self.first.attention, self.second.attention
        if len({first, second} - {"any"}) == 2:
            patterns = f"{PATTERN_DESCRIPTIONS[first]}, the other {PATTERN_DESCRIPTIONS[second]}"
            raise UserError(f"cannot add {names}: one {patterns}; {remedy}")

    @property
    def _with_forward(self) -> list[Objective]:
        """The components with a forward pass of their own: at most one, which then serves all."""
        return [one for one in components(self) if type(one).forward is not Objective.forward]

    @property
    def attention(self) -> AttentionPattern:
        return self.second.attention if self.first.attention == "any" else self.first.attention

    @property
    def inputs(self) -> frozenset[str]:
        # A component that reads nothing (a penalty) adds to the example that it is given.
        built = frozenset({"tokens"} if self.first.inputs else ()).union(counted_fields(self.first).values())
        return self.first.inputs | (self.second.inputs - built)

    @property
    def labels(self) -> Mapping[str, str]:
        return {**self.first.labels, **self.second.labels}

    @property
    def metrics(self) -> Mapping[str, Metric]:
        return {**self.first.metrics, **self.second.metrics}

    @property
    def constraints(self) -> Constraints:
        return self.first.constraints | self.second.constraints

    def configure(self, stats: Callable[[], DataStats], config: ModelConfig) -> Objective:
        return Sum(self.first.configure(stats, config), self.second.configure(stats, config))

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return self.first.heads(config) | self.second.heads(config)

    def build_example(self, example: Example, vocab: Vocab, rng: np.random.Generator) -> Example:
        return self.second.build_example(self.first.build_example(example, vocab, rng), vocab, rng)

    def forward(self, model: LM, batch: Batch) -> Outputs:
        for one in self._with_forward:
            return one.forward(model, batch)
        return super().forward(model, batch)

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return self.first.loss(model, outputs, batch) | self.second.loss(model, outputs, batch)

    def hide(self, pieces: Sequence[np.ndarray], vocab: Vocab, answer: int | None = None) -> Example | None:
        hidden = self.second.hide(pieces, vocab, answer)
        return self.first.hide(pieces, vocab, answer) if hidden is None else hidden

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        total, runners = forward, self._with_forward
        for one in runners:
            total = one.flops(model, batch, total)
        total = super().flops(model, batch) if total is None else total
        for one in components(self):
            total = total if one in runners else one.flops(model, batch, total)
        return total


def components(objective: Objective) -> tuple[Objective, ...]:
    """Return the objectives that an objective is the sum of, in the order in which they build an example."""
    if isinstance(objective, Sum):
        return components(objective.first) + components(objective.second)
    return (objective,)


def cannot_train(objective: Objective, why: str) -> UserError:
    """Return the error of `Objective.configure` for a model that lacks something.

    Args:
        objective: The objective.
        why: What the model config lacks, and the setting that fixes it.
    """
    return UserError(f"objective {name_of(type(objective))} cannot be trained with this model: {why}")


def reads_dialogues(objective: Objective) -> bool:
    """Return whether an objective trains on the answers in dialogues, which a mask marks."""
    return any("mask" in field for field in objective.inputs)


def label_positions(objective: Objective, batch: Batch) -> Tensor | None:
    """Return where the labels of a batch are, (..., T) bool; None: anywhere, since some are not at token positions."""
    fields = [batch[name] for name in sorted({*counted_fields(objective).values()}) if name in batch]
    if not fields or any(field.shape != batch["tokens"].shape for field in fields):
        return None
    at, here = _any_labels(fields), [*map(host_copy, fields)]
    return at if any(x is copy for x, copy in zip(fields, here, strict=True)) else with_host_copy(at, _any_labels(here))


def _any_labels(fields: Sequence[Tensor]) -> Tensor:
    at = fields[0] != IGNORE
    for field in fields[1:]:
        at = at | (field != IGNORE)
    return at


def hidden_states(model: LM, batch: Batch, needed: Tensor | None = None) -> Tensor:
    """Return the hidden states that the heads of a model read, (..., T, hidden_size).

    They are those of the last layer, or a mixture of all layers if the model has one (`LayerMixture`).

    Args:
        model: The model.
        batch: The batch.
        needed: (..., T) bool, the states that will be read; others may be zeros. None: all.
    """
    if "mixture" not in model.heads:
        return model(batch, ForwardContext(needed_positions=needed))
    mixture: ScalarMix = model.heads["mixture"]  # type: ignore[assignment]
    training = model.training
    model.train(training and not mixture.frozen)
    with torch.no_grad() if mixture.frozen else nullcontext():
        states = model.all_hidden_states(batch)  # (num_layers + 1, ..., T, hidden_size)
    model.train(training)
    return mixture(states)


def forward_flops(model: LM, batch: Batch, needed: Tensor | None = None) -> float:
    """Return the FLOPs of `hidden_states` and its backward, less those of the backward that frozen weights save."""
    mixture: ScalarMix | None = model.heads["mixture"] if "mixture" in model.heads else None  # type: ignore[assignment]  # noqa: SIM401
    work = forward_work(model, batch, needed if mixture is None else None)
    counts = [0 if module is None else module.tokens for module in (model.prefix, model.prompt)]
    if any(counts):
        work = flops.with_prefix(work, batch, model.config, *counts)
    total = flops.trained_share(model) * flops.stack_flops(model.config, work)
    # A frozen mixture has no backward pass, which `trained_share` knows only if the weights are frozen too.
    frozen = mixture is not None and mixture.frozen and any(p.requires_grad for p in model.stack.parameters())
    return total / 3 if frozen else total


class TokenObjective(Objective):
    """Token cross-entropy on `labels`: the loss of MLM, causal and prefix LM, span corruption, denoising and SFT."""

    labels = {"tokens": "labels"}

    def heads(self, config: ModelConfig) -> dict[str, nn.Module]:
        return {"lm": LMHead(config)}

    def loss(self, model: LM, outputs: Outputs, batch: Batch) -> dict[str, Tensor]:
        return {"tokens": token_loss(model, outputs["hidden"], batch["labels"])}

    def flops(self, model: LM, batch: Batch, forward: float | None = None) -> float:
        return super().flops(model, batch, forward) + vocabulary_flops(model, batch["labels"])


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
    at = label_indices(labels)
    flat = hidden.flatten(0, -2)
    if len(at) == len(flat):
        return flat, labels.flatten()
    return flat.index_select(0, at), labels.flatten().index_select(0, at)


def label_indices(labels: Tensor) -> Tensor:
    """Return the supervised positions of labels (..., T) as indices into the flattened rows, (N,), in row order."""
    at, here = labels.flatten() != IGNORE, host_copy(labels)
    return at.nonzero()[:, 0] if here is labels else torch.nonzero_static(at, size=int((here != IGNORE).sum()))[:, 0]


def labeled(labels: Tensor) -> Tensor:
    """Return which positions are supervised, (..., T) bool, as `ForwardContext.needed_positions`."""
    return on_both(lambda x: x != IGNORE, labels)


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
