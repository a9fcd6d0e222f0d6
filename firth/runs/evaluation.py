"""Evaluation of a run: held-out examples and tasks while it trains, per-class results of the exported model, and files afterwards.

`evaluation.tasks` of a recipe are tasks that are evaluated while the model trains:

    evaluation: {every: 100, tasks: [in_context, copying, {name: minimal_pairs, data: pairs.jsonl, limit: 100}]}

in_context and copying are those of `firth.evaluate.in_context`; others are tasks in prompts (`firth.evaluate.prompting`). At each
validation their metrics are added to those of the held-out examples, as task/NAME or task/TASK/NAME. The trainer restores
the random state, so a run has the same weights with and without tasks.

Afterwards a run is evaluated on files with the metrics of its task, or with its own objective if that is not a task:

    firth evaluate runs/electra held-out.txt         loss/generator, loss/replaced, replaced_accuracy, auc
    firth evaluate runs/vae held-out.txt             elbo, kl, active
    firth evaluate runs/elmo held-out.txt            loss/forward, loss/backward
    firth evaluate runs/bert held-out.txt --task objective       the accuracy of NSP and the masked loss

Examples are built as in the run's recipe. The objective's losses and metrics are those of the evaluation during training
(`Validator`), in fp32.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from firth.align.held_out import HeldOutPrompts
from firth.data.collate import Batches
from firth.data.labels import has_spans
from firth.data.source import Source
from firth.evaluate import evaluate as tasks
from firth.evaluate import metrics
from firth.evaluate.heads import READERS, HeadOutput, head_of, validated_head_of
from firth.evaluate.in_context import InContextTexts, copying, in_context_score, in_context_texts
from firth.evaluate.prompting.prompt_task import PromptConfig, PromptTask
from firth.evaluate.prompting.responders import LocalModel
from firth.evaluate.prompting.runner import run_tasks
from firth.evaluate.prompting.task_files import load_tasks
from firth.evaluate.task import EvaluatedModel, load_evaluated_model
from firth.evaluate.tasks import TASKS, default_for
from firth.generate.scoring import scoring_mode
from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.objectives.reward_model import pair_margins
from firth.runs import examples
from firth.runs.examples import spread
from firth.runs.prepare import RunData
from firth.runs.recipe import EvalTask, ResolvedRecipe, load_resolved
from firth.runs.start_model import StartModel
from firth.tokenizer.tokenizer import Tokenizer
from firth.tokenizer.vocab import Vocab
from firth.training.distributed import Parallel, Ranks
from firth.training.step import SINGLE, no_reduce, validate
from firth.types import LOGGER, Batch, Outputs, UserError

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


MEASURES = ("in_context", "copying")
"""Built-in measures, which need a causal decoder."""
PREFIX = "task/"
"""Start of the names of the metrics."""


@dataclass(frozen=True, eq=False)
class EvalTasks:
    """The tasks of a run.

    Args:
        directory: The run directory, which is named in errors.
        tokenizer: The tokenizer.
        measures: Built-in measures with the number of their texts or sequences.
        texts: Held-out texts of in_context; None without it.
        prompts: Tasks in prompts with the number of their items.
    """

    directory: Path
    tokenizer: Tokenizer
    measures: Sequence[EvalTask]
    texts: InContextTexts | None
    prompts: Sequence[tuple[PromptTask, int]]

    @staticmethod
    def of(recipe: ResolvedRecipe, held_out: Source | None, directory: Path, tokenizer: Tokenizer) -> EvalTasks | None:
        """Load the tasks of a recipe; None if it has none.

        Args:
            recipe: The recipe.
            held_out: The held-out examples; None if there are none.
            directory: The run directory.
            tokenizer: The tokenizer.

        Raises:
            UserError: A task does not exist or fit its items, or the model cannot do it.
        """
        if not recipe.evaluation.tasks:
            return None
        check_model(recipe)
        measures, texts, prompts = [], None, []
        for one in recipe.evaluation.tasks:
            if bool(one.name) == bool(one.file):
                raise UserError(
                    "evaluation.tasks: a task has either a name (in_context, copying, minimal_pairs, ...) or a file: set one of them"
                )
            if one.name not in MEASURES:
                for task in load_tasks(one.file or one.name, one.data):
                    task.check(PromptConfig(limit=one.limit))
                    prompts.append((task, one.limit))
                continue
            if one.data:
                raise UserError(f"evaluation.tasks: {one.name} reads no data: leave out {', '.join(one.data)}")
            measures.append(one)
            if one.name == "in_context":
                if held_out is None or not len(held_out) or "tokens" not in held_out[0]:
                    raise UserError(
                        "evaluation.tasks: in_context needs held-out text: set data.validation_fraction or leave it out"
                    )
                texts = in_context_texts(held_out, recipe.model.max_positions, one.limit)
        names = [*(one.name for one in measures), *(task.name for task, _ in prompts)]
        if len(set(names)) < len(names):
            raise UserError(
                f"evaluation.tasks names {next(n for n in names if names.count(n) > 1)} twice: leave one out"
            )
        return EvalTasks(directory, tokenizer, measures, texts, prompts)

    @property
    def notes(self) -> list[str]:
        """Sentences on what is measured."""
        if self.texts is None:
            return []
        return [
            f"in_context: loss at token {self.texts.late} against token {self.texts.early}, {len(self.texts.rows)} held-out texts"
        ]

    def measure(self, model: LM) -> dict[str, float]:
        """Return the metrics of a model by name."""
        vocab = self.tokenizer.vocab
        found: dict[str, float] = {}
        for one in self.measures:
            values = (
                in_context_score(model, vocab, self.texts)
                if one.name == "in_context" and self.texts
                else copying(model, vocab, one.limit)
            )
            found |= {f"{PREFIX}{name}": value for name, value in values.items()}
        if self.prompts:
            responder = self._responder(model)
            for task, limit in self.prompts:
                [result] = run_tasks([task], responder, PromptConfig(limit=limit))
                found |= {f"{PREFIX}{task.name}/{name}": value.value for name, value in result.metrics.items()}
        return found

    def check(self, model: LM) -> list[str]:
        """Evaluate little of each task before training, and return the names of the metrics.

        Raises:
            UserError: A prompt is longer than the context, or the model cannot reply to a request.
        """
        responder = self._responder(model)
        for task, limit in self.prompts:
            config = PromptConfig(limit=limit)
            for index, item in enumerate(task.selected(config)):
                try:
                    responder.check(next(task.ask(item, index, config, responder)))
                except UserError as error:
                    raise UserError(f"evaluation.tasks: {item.location}: {error}") from error
        few = replace(
            self,
            measures=[replace(one, limit=1) for one in self.measures],
            texts=self.texts and replace(self.texts, rows=self.texts.rows[:1]),
            prompts=[(task, 1) for task, _ in self.prompts],
        )
        with torch.random.fork_rng():
            return list(few.measure(model))

    def _responder(self, model: LM) -> LocalModel:
        """Return the model as `firth evaluate` will open it after its export."""
        bos = self.tokenizer.vocab.roles.get("bos") if self.tokenizer.bos is not False else None
        return LocalModel(EvaluatedModel(model, self.tokenizer, self.directory, self.directory / "model"), bos=bos)


def check_model(recipe: ResolvedRecipe) -> None:
    """Raise a UserError if the model of a recipe has no LM head, or a measure needs another family."""
    config: ModelConfig = recipe.model
    with torch.device("meta"):
        heads = recipe.objective.heads(config)
    if "lm" not in heads:
        raise UserError("evaluation.tasks needs an LM head, which this objective does not train: leave the tasks out")
    mode = scoring_mode(config)
    for one in recipe.evaluation.tasks:
        if one.name in MEASURES and (mode != "causal" or config.attention.prefix_lm):
            raise UserError(
                f"evaluation.tasks: {one.name} measures a causal decoder, and this model is {config.description}: leave it out"
            )


OBJECTIVE = "objective"
"""Name of the task that evaluates a run's own objective."""


def measure(
    directory: Path,
    paths: Sequence[str],
    *,
    task: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluate a run or model directory on files; return metrics by name.

    Args:
        directory: A run or model directory.
        paths: Text or records; runs for the task "glue".
        task: One of `firth.evaluate.tasks.TASKS`, "likelihood", "glue" or "objective"; None chooses the model's own task.
        limit: The most tokens to evaluate, spread over the text; for a task, the number of records, from the first.

    Raises:
        UserError: The model does not support the task, or the files hold nothing to evaluate.
    """
    if task == "glue":
        return tasks.evaluate(directory, paths, task=task, limit=limit)
    return measure_with(load_evaluated_model(directory), paths, task=task, limit=limit)


def measure_with(
    evaluated: EvaluatedModel,
    paths: Sequence[str],
    *,
    task: str | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """Evaluate a loaded model on files; see `measure`."""
    task = default_for(evaluated, paths) if task is None else task
    if task == "likelihood" and (evaluated.model.config.encoder.latent_size or not evaluated.model.has_lm_head):
        task = ""  # only the objective can evaluate a bound (VAE) or two separate directions (ELMo)
    if task in (OBJECTIVE, ""):
        noted = {} if limit is None else {"limit": limit}
        return {"task": OBJECTIVE} | noted | by_objective(evaluated, paths, limit)
    return tasks.evaluate_model(evaluated, paths, task=task, limit=limit)


def by_objective(evaluated: EvaluatedModel, paths: Sequence[str], limit: int | None) -> dict[str, Any]:
    """Return the losses and metrics of a run's own objective on files.

    Raises:
        UserError: The directory has no recipe, or its model has a task head, which is evaluated by its task.
    """
    where = evaluated.directory
    if not (where / "recipe.yaml").is_file():
        raise UserError(
            f"{where}: this model has {', '.join(evaluated.model.heads) or 'no head'}, and no recipe of its training: "
            f"name its run directory, or a task that it supports (--task {', '.join(TASKS)})"
        )
    if head := head_of(dict(evaluated.model.heads)):
        raise UserError(f"{where}: this model has a head for {head}: leave out --task to evaluate it")
    recipe = load_resolved(where)
    source = replace(recipe.data, path=tuple(paths), validation_path=tuple(paths), corpus="", weights=(), cache_dir="")
    with tempfile.TemporaryDirectory() as folder:
        data = RunData(
            source, evaluated.tokenizer, Path(folder), recipe.batch.size, recipe.seed,
            lambda _: None, recipe.model.attention.memory_length, start=StartModel(recipe.init_from),
        )  # fmt: skip
        cut = examples.build_datasets(recipe.examples, data, recipe.objective)
        if cut.validation is None or not len(cut.validation):
            raise UserError(f"{', '.join(paths)}: there is nothing to evaluate in it")
        for remark in cut.validation.notes:
            LOGGER.warning(remark)
        count = len(cut.validation)
        if limit is not None:
            some = examples.spread(cut.validation, 64)
            mean = sum(max(field.size for field in some[i].values()) for i in range(len(some))) / len(some)
            count = max(1, min(count, round(limit / mean)))
        shown = replace(recipe, evaluation=replace(recipe.evaluation, max_examples=count))
        held = Validator(shown, cut.validation, cut.bytes_per_target, evaluated.tokenizer, Ranks())
        return {"examples": len(held.examples), "share": len(held.examples) / len(cut.validation)} | held.measure(
            evaluated.model, 0
        )
