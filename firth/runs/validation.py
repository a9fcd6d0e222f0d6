"""Validation during training, and per-class results of the exported model.

Losses and accuracies are summed over batches. A task head is also evaluated per example, which adds its metrics (F1, Matthews
correlation, rank correlation; see `firth.evaluate.heads`), and so is ELECTRA's detector (area under the ROC curve). Each metric can
choose the best checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from firth.align.held_out import HeldOutPrompts
from firth.data.collate import Batches
from firth.data.labels import has_spans
from firth.data.source import Source
from firth.evaluate import metrics
from firth.evaluate.heads import READERS, HeadOutput, validated_head_of
from firth.model.model import LM
from firth.objectives.reward_model import pair_margins
from firth.runs.examples import spread
from firth.runs.recipe import ResolvedRecipe
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import Vocab
from firth.training.data_parallel import Parallel
from firth.training.distributed import Ranks
from firth.training.step import SINGLE, no_reduce, validate
from firth.types import Batch, Outputs, UserError

PROBE_EXAMPLES = 8
"""Examples that are evaluated to find the names of the metrics."""

MAX_CONFUSION_CLASSES = 12
"""Most classes of a confusion matrix."""


@dataclass(frozen=True, eq=False)
class Validator:
    """Evaluates a model on `evaluation.max_examples` evenly spaced held-out examples, the same ones each time.

    Args:
        recipe: The resolved recipe.
        source: The held-out examples.
        bytes_per_target: UTF-8 bytes per label, for bits per byte; 0 if not defined.
        tokenizer: The tokenizer.
        ranks: The ranks of the run.
        parallel: Runs the passes on the ranks; the sharding of a sharded model, which is evaluated in shards.
    """

    recipe: ResolvedRecipe
    source: Source
    bytes_per_target: float
    tokenizer: Tokenizer
    ranks: Ranks
    parallel: Parallel = SINGLE

    @cached_property
    def heads(self) -> Mapping[str, object]:
        """The heads that the objective adds, without weights."""
        with torch.device("meta"):
            return self.recipe.objective.heads(self.recipe.model)

    @cached_property
    def head(self) -> str:
        """The head that is evaluated per example; empty for most objectives."""
        return validated_head_of(self.heads)

    @cached_property
    def examples(self) -> Source:
        """The examples to evaluate."""
        return spread(self.source, self.recipe.evaluation.max_examples)

    @cached_property
    def batches(self) -> Batches:
        """The batches: all examples in order on every rank for such a head, else divided among the ranks."""
        recipe, shared = self.recipe, not self.head
        return Batches(
            self.examples, recipe.objective, vocab(recipe, self.tokenizer),
            batch_size=min(recipe.batch.size, 64), seed=recipe.seed, pack_to_length=recipe.batch.packed_length if shared else 0,
            rank=self.ranks.rank if shared else 0, world=self.ranks.world if shared else 1,
        )  # fmt: skip

    def measure(self, model: LM, step: int) -> dict[str, float]:
        """Return the metrics of a model by name; `step` is unused."""
        found, readings = self._read(model)
        return found | (READERS[self.head].metrics(readings, self.recipe.objective, self.examples) if self.head else {})

    def check_best_metric(self, model: LM) -> None:
        """Raise a UserError if `evaluation.best_metric` is not a metric; evaluates a few examples before a run to find out."""
        best = self.recipe.evaluation.best_metric
        if best:
            evaluation = replace(self.recipe.evaluation, max_examples=PROBE_EXAMPLES)
            few = replace(self, recipe=replace(self.recipe, evaluation=evaluation))
            with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):  # a correlation of two numbers
                found = few.measure(model, 0)
            if best not in found:
                raise UserError(
                    f"evaluation.best_metric={best} is not among the held-out metrics: choose one of {', '.join(found)}"
                )

    def class_report(self, model: LM) -> dict[str, Any]:
        """Return {"classes", "confusion": rows are labels, "per_class"}, or {"calibration"} of a reward model; {} for other heads."""
        if "reward" in self.heads:
            return {"calibration": self._calibration(model)}
        classes = self.recipe.objective.constraints.class_names
        if self.head not in ("classes", "tags") or len(classes) < 2:
            return {}
        _, readings = self._read(model)
        if self.head == "tags" and has_spans(classes):
            sentences = [([classes[i] for i in r], [classes[i] for i in s.argmax(-1)]) for r, s in readings]
            return {"per_class": metrics.by_kind(sentences)}
        right = np.concatenate([np.atleast_1d(r) for r, _ in readings])
        predicted = np.concatenate([np.atleast_1d(s.argmax(-1)) for _, s in readings])
        rows = metrics.per_class(right, predicted, range(len(classes)))
        per_class = [{"class": name} | row for name, row in zip(classes, rows, strict=True)]
        if len(classes) > MAX_CONFUSION_CLASSES:
            return {"per_class": per_class}
        table = np.bincount(right * len(classes) + predicted, minlength=len(classes) ** 2)
        return {"classes": classes, "confusion": table.reshape(len(classes), -1).tolist(), "per_class": per_class}

    def _calibration(self, model: LM) -> list[tuple[float, float, int]]:
        """Return the bins of `firth.evaluate.metrics.calibration_bins` over all pairs; none for rankings of more answers."""
        margins: list[float] = []

        def watch(outputs: Outputs, batch: Batch) -> None:
            if batch["tokens"].shape[1] == 2:
                margins.extend(pair_margins(model, outputs, batch).tolist())

        whole = replace(self, ranks=Ranks())  # the first rank alone writes the report
        validate(model, self.recipe.objective, whole.batches.all_batches(), watch=watch)
        difference = np.array(margins)
        return metrics.calibration_bins(1 / (1 + np.exp(-np.abs(difference))), difference > 0) if margins else []

    def _read(self, model: LM) -> tuple[dict[str, float], Sequence[HeadOutput]]:
        """Return the means over all examples, and the outputs of the task head for each."""
        readings: list[HeadOutput] = []

        def watch(outputs: Outputs, batch: Batch) -> None:
            readings.extend(READERS[self.head].read(model, self.recipe.objective, outputs, batch))

        found = validate(
            model, self.recipe.objective, self.batches.all_batches(), bytes_per_target=self.bytes_per_target,
            reduce=no_reduce if self.head else self.ranks.sum, watch=watch if self.head else None,
            parallel=self.parallel, filler=self.batches.filler(),
        )  # fmt: skip
        return found, readings


@dataclass(frozen=True, eq=False)
class PromptValidator:
    """Answers `evaluation.max_examples` held-out prompts, the same ones each time, in a run that trains on its own answers.

    Args:
        recipe: The resolved recipe.
        prompts: The held-out prompts.
    """

    recipe: ResolvedRecipe
    prompts: HeldOutPrompts

    def measure(self, model: LM, step: int) -> dict[str, float]:
        """Return reward, truth, KL, length and the share finished; `step` is unused. The ranks share the prompts.

        A sharded model is gathered for it.
        """
        with model.whole():
            return self.prompts.measure(model, self.recipe.evaluation.max_examples)

    def check_best_metric(self, model: LM) -> None:
        """Raise a UserError if `evaluation.best_metric` is not a metric."""
        best = self.recipe.evaluation.best_metric
        with torch.random.fork_rng(), model.whole() if best else nullcontext():
            found = self.prompts.measure(model, PROBE_EXAMPLES) if best else {}
        if best and best not in found:
            raise UserError(
                f"evaluation.best_metric={best} is not among the held-out metrics: choose one of {', '.join(found)}"
            )

    def class_report(self, model: LM) -> dict[str, Any]:
        """Return {}: there are no classes."""
        return {}


def vocab(recipe: ResolvedRecipe, tokenizer: Tokenizer) -> Vocab:
    """Return the vocabulary that examples are built with: the tokenizer's, with the model's decoder start token."""
    return tokenizer.vocab.with_decoder_start(recipe.model.encoder.decoder_start_token)
