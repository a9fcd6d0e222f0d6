"""Tasks that are evaluated while a model trains: `evaluation.tasks` of a recipe.

    evaluation: {every: 100, tasks: [in_context, copying, {name: minimal_pairs, data: pairs.jsonl, limit: 100}]}

in_context and copying are those of `firth.evaluate.in_context`; others are tasks in prompts (`firth.evaluate.prompting`). At each
validation their metrics are added to those of the held-out examples, as task/NAME or task/TASK/NAME. The trainer restores
the random state, so a run has the same weights with and without tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from firth.data.source import Source
from firth.evaluate.in_context import InContextTexts, copying, in_context_score, in_context_texts
from firth.evaluate.prompting.prompt_task import PromptConfig, PromptTask
from firth.evaluate.prompting.responders import LocalModel
from firth.evaluate.prompting.runner import run_tasks
from firth.evaluate.prompting.task_files import load_tasks
from firth.evaluate.task import EvaluatedModel
from firth.generate.scoring import scoring_mode
from firth.model.config import ModelConfig
from firth.model.model import LM
from firth.runs.recipe import EvalTask, ResolvedRecipe
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import UserError

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
