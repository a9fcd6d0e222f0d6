"""A task is a source, a prompt and a metric; the subject is the model that is asked. The tasks are in `firth.evaluate.tasks`.

Every score of items comes with a 95% bootstrap interval, and with what the commonest answer alone would get.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from firth.corpora.readers import first_records
from firth.evaluate import metrics
from firth.evaluate.prediction_inputs import InputSchema
from firth.evaluate.tokenizer_match import check_adapter_base, load_tokenizer
from firth.io.yaml_files import read_yaml
from firth.model.model import LM
from firth.objectives import OBJECTIVES, find
from firth.peft import adapter_files
from firth.pretrained.load_save import check_vocab_fits, load_model, metadata_of
from firth.tokenizer.chat_template import TEMPLATE
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import Vocab
from firth.types import UserError

Metric = Callable[..., float]
Progress = Callable[[float], None]
Say = Callable[[str], None]
Answers = tuple[Any, ...]
"""Columns of one value per item, as the task's metrics take them: what is right, and what was answered."""


@dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """What is measured: a model and its tokenizer. directory: what the user named; place: where the model is."""

    model: LM
    tokenizer: Tokenizer
    directory: Path
    model_directory: Path

    @property
    def vocab(self) -> Vocab:
        """The tokenizer's ids and roles, as the model reads them."""
        return self.tokenizer.vocab.with_decoder_start(self.model.config.decoder_start_token)

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe that a run kept, as plain data; empty for a bare model directory."""
        file = self.directory / "recipe.yaml"
        found = read_yaml(file)[0] if file.exists() else None
        return found if isinstance(found, dict) else {}

    @property
    def examples(self) -> Mapping[str, Any]:
        """How the recipe cuts text: its settings, empty where it says none."""
        found = self.recipe.get("examples")
        while isinstance(found, dict) and isinstance(found.get("base"), dict):  # partly labelled, voted on
            found = found["base"]
        return found if isinstance(found, dict) else {}

    @property
    def objective(self) -> Mapping[str, Any]:
        """The settings of the recipe's objective, of all addends together; empty where it says none."""
        found = self.recipe.get("objective")
        settings: dict[str, Any] = {}
        for one in found if isinstance(found, list) else [found]:
            settings |= one if isinstance(one, dict) else {}
        return settings

    @cached_property
    def is_chat_model(self) -> bool:
        """Whether prompts are written to it by the chat template: its run was trained on the answers in dialogues. A model of
        others, whose run is not known, brings a template of its own."""
        found = self.recipe.get("objective", metadata_of(self.model_directory).get("objective"))
        names = [
            str(one.get("kind") if isinstance(one, dict) else one)
            for one in (found if isinstance(found, list) else [found])
        ]
        if found is None:
            return self.tokenizer.template not in (None, TEMPLATE)
        known = [find(name)() for name in names if name in OBJECTIVES]  # a stranger's file may name anything
        return any("mask" in field for objective in known for field in objective.inputs())

    @property
    def context(self) -> int:
        """The longest row to read: what training read, which may be shorter than what the shape is meant for."""
        longest: int = self.model.context
        return min(longest, int(self.examples.get("max_length", longest)))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.tokens.weight.device


def load_evaluated_model(directory: Path) -> EvaluatedModel:
    """The model and tokenizer of a run directory (its `model/`), of a model directory, or of an adapter's and its base's."""
    place = directory / "model" if (directory / "model").is_dir() else directory
    if adapter_files.present(place):
        check_adapter_base(place, adapter_files.base_of(place))
        model = adapter_files.load(place)
        place = place if (place / "tokenizer.json").is_file() else adapter_files.base_of(place)
    else:
        model = load_model(place)
    tokenizer = load_tokenizer(place)
    check_vocab_fits(tokenizer, model.config, f"{place}")
    model.restrict_vocab(tokenizer.vocab)
    return EvaluatedModel(model, tokenizer, directory, place)


def most_likely(options: Sequence[str], scores: Sequence[float]) -> str:
    """The option with the highest score; "" where two share it, since whoever cannot tell them apart does not know.

    >>> most_likely(["a", "b"], [0.1, 0.3]), most_likely(["a", "b"], [0.3, 0.3])
    ('b', '')
    """
    best = max(scores)
    at = [i for i, score in enumerate(scores) if score == best]
    return options[at[0]] if len(at) == 1 else ""


@dataclass(frozen=True)
class Task:
    """source: the items of the files, as this subject reads them; with `asked=False`, of records without answers, for tasks
    that `predict` serves. remarks: whole sentences on items that were cut or left out.

    answer: puts each item before the subject and returns columns, a value per item, the right answers first (`Answers`).
    metrics: name -> function of these columns; more: those that depend on the items (F1, of two classes).
    commonest: whether the commonest right answer is worth knowing.
    tell: what the subject says of each item, one row each in their order; wanted: what it reads of a file: for `predict`.
    """

    name: str
    load: Callable[..., Any]
    respond: Callable[[EvaluatedModel, Any, Progress], Answers]
    metrics: Mapping[str, Metric]
    majority_baseline: bool = False
    predict: Callable[[EvaluatedModel, Any, Progress], Iterator[dict[str, Any]]] | None = None
    input_schema: Callable[[EvaluatedModel], InputSchema] | None = None
    notes: Callable[[Any], Sequence[str]] = lambda items: items.notes
    extra_metrics: Callable[[Any], Mapping[str, Metric]] = lambda items: {}

    def run(
        self, evaluated: EvaluatedModel, paths: Sequence[str], progress: Progress, say: Say, limit: int | None = None
    ) -> dict[str, Any]:
        """The number of items, all metrics, and the interval of each as `NAME_interval`. say: is told the remarks. limit: only
        the first so many records of the files are read."""
        with first_records(limit):
            items = self.load(evaluated, paths)
        for remark in self.notes(items):
            say(remark)
        if not len(items):
            raise UserError(f"{', '.join(paths)}: there is no record to score")
        columns = self.respond(evaluated, items, progress)
        right: Sequence[Any] = columns[0]
        out: dict[str, Any] = {"items": len(right)}
        for name, metric in {**self.metrics, **self.extra_metrics(items)}.items():
            out[name] = metric(*columns)
            out[f"{name}_interval"] = metrics.bootstrap(metric, *columns)
        if self.majority_baseline:
            label, count = Counter(right).most_common(1)[0]
            out |= {"commonest": label, "commonest_accuracy": count / len(right)}
        return out
