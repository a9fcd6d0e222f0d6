"""A run's held-out examples: what is measured of them on the way, and what the exported model tells of each class.

Losses and accuracies are sums over batches. A task's head is asked for each answer too, and then there is F1, Matthews'
correlation, rank correlation, whatever the part has (`firth.evaluate.heads`): all of them may choose the best checkpoint.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from firth.data.collate import Batches
from firth.data.source import Source
from firth.data.tags import has_spans
from firth.evaluate import entity_metrics, metrics
from firth.evaluate.heads import HEADS, HeadOutput, head_of
from firth.model.model import LM
from firth.runs.examples import spread
from firth.runs.recipe import Recipe
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import Vocab
from firth.train.distributed import Ranks
from firth.train.step import no_reduce
from firth.train.validate import validate
from firth.types import Batch, Outputs, UserError

FEW = 8
"""Examples that tell which measurements there are."""

MOST = 12
"""Classes that a table of confusions has room for."""


@dataclass(frozen=True, eq=False)
class Validator:
    """`evaluation.max_examples` held-out examples, spread over all; the same each time, and always shown alike."""

    recipe: Recipe
    source: Source
    bytes_per_target: float
    tokenizer: Tokenizer
    ranks: Ranks

    @cached_property
    def head(self) -> str:
        """The head whose answers are looked at one by one; empty for most objectives."""
        config = self.recipe.model
        assert config is not None
        with torch.device("meta"):  # only their names are wanted
            return head_of(self.recipe.objective.heads(config))

    @cached_property
    def examples(self) -> Source:
        """The examples that are measured."""
        return spread(self.source, self.recipe.evaluation.max_examples)

    @cached_property
    def batches(self) -> Batches:
        """Of a head's answers each rank reads all, in their order; else the ranks share the work."""
        recipe, shared = self.recipe, not self.head
        return Batches(
            self.examples, recipe.objective, vocab(recipe, self.tokenizer),
            batch_size=min(recipe.batch.size, 64), seed=recipe.seed, pack_to_length=recipe.batch.packed_length if shared else 0,
            rank=self.ranks.rank if shared else 0, world=self.ranks.world if shared else 1,
        )  # fmt: skip

    def measure(self, model: LM, step: int) -> dict[str, float]:
        """Everything that is measured, by name."""
        found, readings = self._read(model)
        return found | (HEADS[self.head].metrics(readings, self.recipe.objective, self.examples) if self.head else {})

    def check_best_metric(self, model: LM) -> None:
        """Raise a UserError if `evaluation.best_metric` is none of the measurements: it is asked of a few examples, before a run begins."""
        best = self.recipe.evaluation.best_metric
        if best:
            evaluation = replace(self.recipe.evaluation, max_examples=FEW)
            few = replace(self, recipe=replace(self.recipe, evaluation=evaluation))
            with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):  # a correlation of two numbers
                found = few.measure(model, 0)
            if best not in found:
                raise UserError(
                    f"evaluation.best_metric={best} is not among the held-out measurements: there is {', '.join(found)}"
                )

    def class_report(self, model: LM) -> dict[str, Any]:
        """{"classes", "confusion": rows of what is right, "per_class"}, as far as the head has classes."""
        classes = self.recipe.objective.class_names
        if self.head not in ("classes", "tags") or len(classes) < 2:
            return {}
        _, readings = self._read(model)
        if self.head == "tags" and has_spans(classes):
            sentences = [([classes[i] for i in r], [classes[i] for i in s.argmax(-1)]) for r, s in readings]
            return {"per_class": entity_metrics.by_kind(sentences)}
        right = np.concatenate([np.atleast_1d(r) for r, _ in readings])
        said = np.concatenate([np.atleast_1d(s.argmax(-1)) for _, s in readings])
        rows = metrics.per_class(right, said, range(len(classes)))
        per_class = [{"class": name} | row for name, row in zip(classes, rows, strict=True)]
        if len(classes) > MOST:
            return {"per_class": per_class}
        table = np.bincount(right * len(classes) + said, minlength=len(classes) ** 2)
        return {"classes": classes, "confusion": table.reshape(len(classes), -1).tolist(), "per_class": per_class}

    def _read(self, model: LM) -> tuple[dict[str, float], Sequence[HeadOutput]]:
        """The means over all, and the head's answers one by one."""
        readings: list[HeadOutput] = []

        def watch(outputs: Outputs, batch: Batch) -> None:
            readings.extend(HEADS[self.head].read(model, self.recipe.objective, outputs, batch))

        found = validate(
            model, self.recipe.objective, self.batches.all_batches(), bytes_per_target=self.bytes_per_target,
            reduce=no_reduce if self.head else self.ranks.sum, watch=watch if self.head else None,
        )  # fmt: skip
        return found, readings


def vocab(recipe: Recipe, tokenizer: Tokenizer) -> Vocab:
    """What views know of the tokenizer and of the model."""
    return (
        tokenizer.vocab
        if recipe.model is None
        else tokenizer.vocab.with_decoder_start(recipe.model.decoder_start_token)
    )
