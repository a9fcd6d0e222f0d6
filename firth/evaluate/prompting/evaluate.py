"""Evaluate models on tasks in text, as `firth evaluate MODEL... --task TASK` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from firth.evaluate.prompting.contamination import TrainingText, find_contaminated
from firth.evaluate.prompting.endpoint import PREFIX, Endpoint
from firth.evaluate.prompting.local_model import LocalModel
from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.evaluate.prompting.requests import ReplyCache, Responder
from firth.evaluate.prompting.results import write_results
from firth.evaluate.prompting.runner import TaskResult, run_tasks, with_contamination
from firth.evaluate.prompting.task_files import load_tasks
from firth.io.cache import cache
from firth.model.model import LM
from firth.types import UserError


def evaluate_prompts(
    models: Sequence[str],
    tasks: Sequence[str],
    config: PromptConfig,
    *,
    data: Sequence[str] = (),
    examples: Sequence[str] = (),
    weights: str | Callable[[LM], str | None] | None = None,
    within_word: bool = False,
    out: Path | None = None,
    training_texts: Sequence[TrainingText] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[TaskResult]]:
    """Evaluate models on tasks; replies are kept in firth's cache directory, so that the same call resumes.

    Args:
        models: Runs, model directories, adapters, GGUF files or `openai:URL`.
        tasks: Names of shipped tasks or task files.
        config: How prompts are built.
        data: Files of the questions, for one task that names none.
        examples: Files of the records that examples in prompts are taken from, likewise.
        weights: Weight format of local models, or a function that chooses it for a model; None keeps the stored one.
        within_word: For masked models: whether the rest of a word is masked with each of its tokens.
        out: Directory for results.json and the record of each item, in a directory per model if there are several.
        training_texts: Text in which the items are looked up, for the share that models may have seen.
        progress: Called with the number of replies and of requests of a round of a model.

    Returns:
        For each model the results of the tasks.

    Raises:
        UserError: A model or a task cannot be read, or does not fit the other. Endpoints are tried before any model runs.
    """
    if len(set(models)) < len(models):
        raise UserError("a model is named twice: compare a model with another one")
    loaded = [task for name in tasks for task in load_tasks(name, data, examples)]
    names = [task.name for task in loaded]
    if len(set(names)) < len(names):
        raise UserError(
            f"two of the tasks have the name {next(n for n in names if names.count(n) > 1)!r}: rename one (task: ...)"
        )
    for task in loaded:
        task.check(config)
    endpoints = {model: Endpoint(model) for model in models if model.startswith(PREFIX)}
    for endpoint in endpoints.values():
        if not all(task.generates(config) for task in loaded):
            endpoint.check_scores()
    searched = find_contaminated([task.selected(config) for task in loaded], training_texts) if training_texts else []
    found = []
    for number, model in enumerate(models):
        responder: Responder = endpoints.get(model) or LocalModel.open(Path(model), weights, within_word)
        replies = ReplyCache(cache() / "replies", responder.digest)
        try:
            results = run_tasks(loaded, responder, config, replies, progress)
        finally:
            replies.close()
        results = [replace(one, weights=responder.weights) for one in results]
        if searched:
            results = [with_contamination(one, where) for one, where in zip(results, searched, strict=True)]
        found.append(results)
        if out is not None:
            write_results(out / f"model-{number + 1}" if len(models) > 1 else out, results, config)
    return found
