"""A task is a source, a prompt and a metric; `evaluate` measures any run or model directory by one of them.

    evaluate(Path("runs/gpt"), ["held-out/"])               {"task": "likelihood", "bits_per_byte": 2.31, ...}
    evaluate(Path("runs/verse"), ["held-out.jsonl"])        {"task": "classification", "accuracy": 0.75, ...}

What is asked follows from what the model has: a head for classes answers "classification", a reward head
"comparisons", a vocabulary head "likelihood"; `task` asks for another one. The tasks are in `firth.evaluate.tasks`.
Every score of items comes with a 95% bootstrap interval, and with what the commonest answer alone would get.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from firth.evaluate import metrics
from firth.model.lm import LM
from firth.model.weights import load_model
from firth.text.tokenizer import Tokenizer
from firth.text.vocab import Vocab
from firth.types import UserError

Metric = Callable[[Sequence[Any], Sequence[Any]], float]
Progress = Callable[[float], None]
Answers = tuple[list[str], list[str]]
"""What is right and what was answered, item by item."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured: a model and its tokenizer. directory: what the user named; place: where the model is."""

    model: LM
    tokenizer: Tokenizer
    directory: Path
    place: Path

    @property
    def vocab(self) -> Vocab:
        """The tokenizer's ids and roles."""
        return self.tokenizer.vocab

    @cached_property
    def recipe(self) -> Mapping[str, Any]:
        """The recipe that a run kept, as plain data; empty for a bare model directory."""
        file = self.directory / "recipe.yaml"
        found = yaml.safe_load(file.read_text("utf-8")) if file.exists() else None
        return found if isinstance(found, dict) else {}

    @property
    def segment(self) -> Mapping[str, Any]:
        """How the recipe cuts text: its settings, empty where it says none."""
        found = self.recipe.get("segment")
        return found if isinstance(found, dict) else {}

    @property
    def context(self) -> int:
        """The longest row to read: what training read, which may be shorter than what the shape is meant for."""
        shape: int = self.model.shape.context
        return min(shape, int(self.segment.get("length", shape)))

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.tokens.weight.device


def open_subject(directory: Path) -> Subject:
    """The model and tokenizer of a run directory (its `model/`) or of a model directory."""
    place = directory / "model" if (directory / "model").is_dir() else directory
    return Subject(load_model(place), Tokenizer.load(place), directory, place)


def likeliest(options: Sequence[str], scores: Sequence[float]) -> str:
    """The option with the highest score; "" where two share it, since whoever cannot tell them apart does not know.

    >>> likeliest(["a", "b"], [0.1, 0.3]), likeliest(["a", "b"], [0.3, 0.3])
    ('b', '')
    """
    best = max(scores)
    at = [i for i, score in enumerate(scores) if score == best]
    return options[at[0]] if len(at) == 1 else ""


@dataclass(frozen=True)
class Task:
    """source: the items of the files, as this subject reads them. answer: puts each before the subject.

    metrics: name -> function of (right, answered). commonest: whether the commonest right answer is worth knowing.
    """

    name: str
    source: Callable[[Subject, Sequence[str]], Any]
    answer: Callable[[Subject, Any, Progress], Answers]
    metrics: Mapping[str, Metric]
    commonest: bool = False

    def run(self, subject: Subject, paths: Sequence[str], progress: Progress) -> dict[str, Any]:
        """The number of items, all metrics, and the interval of each as `NAME_interval`."""
        items = self.source(subject, paths)
        if not len(items):
            raise UserError(f"{', '.join(paths)}: there is no record to score")
        right, answered = self.answer(subject, items, progress)
        out: dict[str, Any] = {"items": len(right)}
        for name, metric in self.metrics.items():
            out[name] = metric(right, answered)
            out[f"{name}_interval"] = metrics.bootstrap(metric, right, answered)
        if self.commonest:
            label, count = Counter(right).most_common(1)[0]
            out |= {"commonest": label, "commonest_accuracy": count / len(right)}
        return out


def evaluate(
    directory: Path,
    paths: Sequence[str],
    *,
    task: str | None = None,
    limit: int | None = None,
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Measure the model of a run or model directory on files; plain numbers by name.

    task: a name of `firth.evaluate.tasks.TASKS`, or "likelihood"; None chooses by the parts of the model.
    limit: for likelihood, ask at most about this many tokens, spread over the text. progress: told the share done.
    Raises UserError where the directory holds no model, the files no item, or the model cannot do the task.
    """
    from firth.evaluate.tasks import DEFAULTS, TASKS
    from firth.evaluate.text import likelihood

    subject = open_subject(directory)
    if task is None:
        task = next((name for part, name in DEFAULTS.items() if part in subject.model.parts), None)
    if task is None:
        parts = ", ".join(subject.model.parts) or "no part"
        raise UserError(f"{directory}: this model has {parts} and so nothing to measure: name a task")
    if task == "likelihood":
        found = likelihood(subject, paths, limit, progress)
    elif task in TASKS:
        found = TASKS[task].run(subject, paths, progress)
    else:
        raise UserError(f"there is no task {task!r}; there is likelihood, {', '.join(TASKS)}")
    return {"task": task} | found
