"""Stages that train a recipe and that evaluate models."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml

from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.fields import NonNegativeInt, PositiveInt
from firth.io.atomic import write_text
from firth.pipelines.stage import Stage, Summary, Weights, files_of
from firth.runs import config_io
from firth.runs.evaluate_prompts import evaluate_and_report
from firth.runs.recipe import Recipe, load
from firth.runs.run import run


@dataclass(frozen=True)
class TrainRecipe(Stage):
    """Train a recipe; the stage's directory is the run directory.

    Args:
        recipe: A recipe's name or a YAML file.
        settings: Fields of the recipe -> values, as on the command line of `firth train`.
    """

    main: ClassVar[str] = "recipe"

    recipe: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        _ = self.loaded

    def inputs(self) -> Iterator[Path]:
        yield from files_of("recipe", self.recipe)
        for name, value in self.settings.items():
            yield from files_of(name, value)
        for name, kind, value in config_io.paths(self.loaded):
            yield from files_of("data" if kind == "files" else name, value)

    @cached_property
    def loaded(self) -> Recipe:
        """The recipe with its settings."""
        return load(self.recipe, [f"{name}={_written(value)}" for name, value in self.settings.items()])

    def run(self, directory: Path) -> Summary:
        result = run(self.loaded, directory)
        numbers = {name: value for name, value in result.metrics.items() if isinstance(value, int | float)}
        return {"steps": result.steps, "seconds": result.seconds, "tokens": result.tokens, **numbers}


def _written(value: Any) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, str):
        return value
    return yaml.safe_dump(value, default_flow_style=True, width=1 << 20).removesuffix("\n").removesuffix("\n...")


@dataclass(frozen=True)
class EvaluateModels(Stage):
    """Evaluate models on tasks in prompts, as `firth evaluate` does; writes the table, results.json and report.html.

    Args:
        models: Runs, model directories, adapters, GGUF files or `openai:URL`.
        task: Names of tasks or task files.
        data: Files of the questions, for one task that names none.
        examples: Files of the examples in prompts.
        shots: Examples in each prompt; null for the task's own number.
        chat: Whether prompts are messages of the model's chat template.
        cot: "zero-shot" or "few-shot" chain of thought; "" for none.
        max_new_tokens: Most tokens of an answer; 0 for the task's own number.
        votes: Sampled answers of each question, of which the most frequent counts.
        limit: Most items; 0 for all.
        seed: Seed of examples and samples.
        weights: Data type of the weights; "" takes bf16 where it is faster.
    """

    main: ClassVar[str] = "models"

    models: tuple[str, ...]
    task: tuple[str, ...]
    data: tuple[str, ...] = ()
    examples: tuple[str, ...] = ()
    shots: NonNegativeInt | None = None
    chat: bool = False
    cot: Literal["", "zero-shot", "few-shot"] = ""
    max_new_tokens: NonNegativeInt = 0
    votes: PositiveInt = 1
    limit: NonNegativeInt = 0
    seed: NonNegativeInt = 0
    weights: Weights = ""

    def run(self, directory: Path) -> Summary:
        config = PromptConfig(
            self.shots, self.chat, self.cot, self.votes, seed=self.seed, limit=self.limit or None, max_new_tokens=self.max_new_tokens
        )  # fmt: skip
        text = evaluate_and_report(
            self.models, self.task, config, data=self.data, examples=self.examples, weights=self.weights or None, within_word=False,
            out=directory, as_json=True,
        )  # fmt: skip
        write_text(directory / "table.json", text)
        return {
            f"{task}: {name.removesuffix(',none')}, {model}": value
            for model, one in zip(self.models, json.loads(text), strict=True)
            for task, metrics in one["results"].items()
            for name, value in metrics.items()
            if isinstance(value, float) and "stderr" not in name
        }
