"""Evaluation task: how to load items, predict them and score the predictions. The tasks are in `firth.evaluate.tasks`.

Every metric over items has a 95% bootstrap interval; a task can also report the majority baseline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from firth.corpora.readers import first_records
from firth.data.records import Records, RecordsConfig
from firth.data.source import Source
from firth.evaluate import metrics
from firth.evaluate.heads import MAX_BATCH_TOKENS, HeadOutput, head_batches
from firth.evaluate.prediction_inputs import FormField, InputSchema
from firth.evaluate.tokenizer_match import check_adapter_base, load_tokenizer
from firth.io.sharded import run_of
from firth.io.yaml_files import read_yaml
from firth.model.model import LM
from firth.objectives import OBJECTIVES, find
from firth.objectives.objective import Objective, reads_dialogues
from firth.peft import adapter_files
from firth.pretrained.load_save import check_vocab_fits, load_model, metadata_of
from firth.tokenizer.chat_template import TEMPLATE
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import Vocab
from firth.types import LOGGER, Example, UserError

MetricFunction = Callable[..., float]
Progress = Callable[[float], None]
Answers = tuple[Any, ...]
"""Columns of one value per item, as the task's metrics take them: gold answers first, then predictions."""


@dataclass(frozen=True, eq=False)
class EvaluatedModel:
    """Model and tokenizer under evaluation.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        directory: The run or model directory that the user gave.
        model_directory: The directory of the weights.
    """

    model: LM
    tokenizer: Tokenizer
    directory: Path
    model_directory: Path

    @property
    def vocab(self) -> Vocab:
        """Vocabulary of the tokenizer with the model's decoder start token."""
        return self.tokenizer.vocab.with_decoder_start(self.model.config.encoder.decoder_start_token)

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        """Recipe of the run as plain data; empty for a bare model directory."""
        file = run_of(self.directory) / "recipe.yaml"
        found = read_yaml(file)[0] if file.exists() else None
        return found if isinstance(found, dict) else {}

    @property
    def examples(self) -> Mapping[str, Any]:
        """`examples` section of the recipe; empty where there is none."""
        found = self.recipe.get("examples")
        while isinstance(found, dict) and isinstance(
            found.get("base"), dict
        ):  # partially labeled, simulated annotators
            found = found["base"]
        return found if isinstance(found, dict) else {}

    @property
    def objective(self) -> Mapping[str, Any]:
        """`objective` section of the recipe, merged over the components of a sum; empty where there is none."""
        found = self.recipe.get("objective")
        settings: dict[str, Any] = {}
        for one in found if isinstance(found, list) else [found]:
            settings |= one if isinstance(one, dict) else {}
        return settings

    @cached_property
    def objective_names(self) -> list[str]:
        """Names of the objectives that the model was trained with; empty if unknown."""
        found = self.recipe.get("objective", metadata_of(self.model_directory).get("objective"))
        listed = found if isinstance(found, list) else [] if found is None else [found]
        return [str(one.get("kind") if isinstance(one, dict) else one) for one in listed]

    @cached_property
    def is_chat_model(self) -> bool:
        """Whether prompts are rendered with the chat template.

        True if its run was trained on the answers in dialogues, or, for a model not trained by firth, if its tokenizer has
        a chat template of its own.
        """
        if not self.objective_names:
            return self.tokenizer.template not in (None, TEMPLATE)
        # Files that firth did not write may name anything.
        known = [find(name)() for name in self.objective_names if name in OBJECTIVES]
        return any(map(reads_dialogues, known))

    @property
    def context(self) -> int:
        """Most tokens of a row: the length used in training, which may be below the model's maximum."""
        longest: int = self.model.context
        return min(longest, int(self.examples.get("max_length", longest)))

    def records(
        self,
        kind: type[RecordsConfig],
        paths: Sequence[str],
        labeled: bool = True,
        *,
        classes: Sequence[str] = (),
        **changes: Any,
    ) -> Records:
        """Return the records of files, read with the settings of the run's recipe, if it has one.

        Args:
            kind: The kind of examples.
            paths: The files.
            labeled: Whether the records have labels.
            classes: Names of the classes.
            **changes: Settings that the recipe does not set.
        """
        settings = kind.of(self.examples, **{"max_length": self.context, **changes})
        return Records(settings, paths, self.tokenizer, classes=classes, purpose="evaluate" if labeled else "predict")

    @property
    def device(self) -> torch.device:
        """Device of the model."""
        return self.model.tokens.weight.device


def load_evaluated_model(directory: Path) -> EvaluatedModel:
    """Load the model and tokenizer of a run directory (its `model/`), a model directory, or an adapter and its base."""
    location = directory / "model" if (directory / "model").is_dir() else directory
    if adapter_files.present(location):
        base = adapter_files.base_of(location)
        check_adapter_base(location, base)
        model = adapter_files.load(location)
        location = location if (location / "tokenizer.json").is_file() else base
    else:
        model = load_model(location)
    tokenizer = load_tokenizer(location)
    check_vocab_fits(tokenizer, model.config, f"{location}")
    model.restrict_vocab(tokenizer.vocab)
    return EvaluatedModel(model, tokenizer, directory, location)


def most_likely(options: Sequence[str], scores: Sequence[float]) -> str:
    """Return the option with the highest score; "" for a tie, which counts as wrong.

    >>> most_likely(["a", "b"], [0.1, 0.3]), most_likely(["a", "b"], [0.3, 0.3])
    ('b', '')
    """
    best = max(scores)
    at = [i for i, score in enumerate(scores) if score == best]
    return options[at[0]] if len(at) == 1 else ""


@dataclass(frozen=True)
class HeadTask:
    """How a task reads its head, in two steps: a server does something else between the forward passes of the first.

    Args:
        head: Name of the head.
        objective: Returns the objective that reads the head, for a model and its items.
        rows: Yields a row of predictions for each record, from a model, its items and the outputs of all of them.
    """

    head: str
    objective: Callable[[EvaluatedModel, Records], Objective]
    rows: Callable[[EvaluatedModel, Records, Iterator[HeadOutput]], Iterator[dict[str, Any]]]

    def batches(
        self, evaluated: EvaluatedModel, items: Records, progress: Progress, max_tokens: int = MAX_BATCH_TOKENS
    ) -> Iterator[list[HeadOutput]]:
        """Yield the outputs of all items in order, those of a forward pass together (`head_batches`)."""
        objective = self.objective(evaluated, items)
        source = _all_examples(items, progress)
        return head_batches(evaluated.model, objective, self.head, source, evaluated.vocab, max_tokens)

    def outputs(self, evaluated: EvaluatedModel, items: Records, progress: Progress) -> Iterator[HeadOutput]:
        """Yield the outputs of all items in order."""
        return chain.from_iterable(self.batches(evaluated, items, progress))

    def predict(self, evaluated: EvaluatedModel, items: Records, progress: Progress) -> Iterator[dict[str, Any]]:
        """Yield a row of predictions for each record."""
        outputs = self.outputs(evaluated, items, progress)
        yield from self.rows(evaluated, items, outputs)
        next(outputs, None)  # exhaust the generator, which restores the mode of the model


def _all_examples(items: Source, progress: Progress) -> Iterator[Example]:
    for i in range(len(items)):
        yield items[i]
        progress((i + 1) / len(items))


@dataclass(frozen=True)
class Task:
    """Evaluation task.

    Args:
        name: Name on the command line.
        load: Loads the items of files for a model. With `labeled=False` the records need no labels (tasks with `predict`).
        respond: Runs the model on the items and returns columns, one value per item, gold answers first (`Answers`).
        metrics: Name -> function of these columns.
        majority_baseline: Whether to report the accuracy of always predicting the most frequent gold answer.
        predict: Yields a row of predictions for each item, in order.
        input_schema: Returns the input that `predict` reads.
        notes: Returns sentences about truncated or skipped items; by default `items.notes`, if the items have it.
        extra_metrics: Returns the metrics that depend on the items, such as F1 for two classes.
        route: Name of the route by which a server predicts, such as "classify"; empty if it does not.
        form: Returns the fields of a record as a page asks for them (tasks with `route`).
        head: How the head is read, for tasks that predict with one.
    """

    name: str
    load: Callable[..., Any]
    respond: Callable[[EvaluatedModel, Any, Progress], Answers]
    metrics: Mapping[str, MetricFunction]
    majority_baseline: bool = False
    predict: Callable[[EvaluatedModel, Any, Progress], Iterator[dict[str, Any]]] | None = None
    input_schema: Callable[[EvaluatedModel], InputSchema] | None = None
    notes: Callable[[Any], Sequence[str]] = lambda items: getattr(items, "notes", ())
    extra_metrics: Callable[[Any], Mapping[str, MetricFunction]] = lambda items: {}
    route: str = ""
    form: Callable[[EvaluatedModel], Sequence[FormField]] = lambda evaluated: ()
    head: HeadTask | None = None

    def run(
        self,
        evaluated: EvaluatedModel,
        paths: Sequence[str],
        progress: Progress,
        limit: int | None = None,
    ) -> dict[str, Any]:
        """Evaluate a model on files.

        Args:
            evaluated: The model.
            paths: The files.
            progress: Called with the share done, 0 to 1.
            limit: Most records to read.

        Returns:
            "items" (their number), each metric, and its interval as NAME_interval.
        """
        with first_records(limit):
            items = self.load(evaluated, paths)
        for note in self.notes(items):
            LOGGER.warning(note)
        if not len(items):
            raise UserError(f"{', '.join(paths)}: there is no record to score")
        columns = self.respond(evaluated, items, progress)
        gold: Sequence[Any] = columns[0]
        out: dict[str, Any] = {"items": len(gold)}
        for name, metric in {**self.metrics, **self.extra_metrics(items)}.items():
            out[name] = metric(*columns)
            out[f"{name}_interval"] = metrics.bootstrap(metric, *columns)
        if self.majority_baseline:
            label, count = Counter(gold).most_common(1)[0]
            out |= {"majority_label": label, "majority_accuracy": count / len(gold)}
        return out
