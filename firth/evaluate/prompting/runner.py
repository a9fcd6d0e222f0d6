"""Run tasks on a model: batch the requests of all items, keep replies in a cache, and summarize.

    tasks = load_tasks(["mmlu", "arithmetic.yaml"])
    results = run_tasks(tasks, model, PromptConfig(shots=5), ReplyCache(directory, model.digest))
    results[0].metrics["acc"].value, results[0].metrics["acc"].stderr

Items advance in rounds: the requests of a round are sent together, whatever task they come from, and equal requests once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from firth.evaluate.prompting.contamination import Contamination
from firth.evaluate.prompting.metrics import jackknife_error, value_of
from firth.evaluate.prompting.prompt_task import ItemResult, PromptConfig, PromptTask
from firth.evaluate.prompting.requests import Reply, ReplyCache, Request, Responder
from firth.types import UserError

PERPLEXITIES = {"perplexity": -1.0, "word_perplexity": 1.0, "byte_perplexity": 1.0}
"""Metric -> sign of its items' values under exp: `perplexity` is exp of minus the mean log p of the targets."""
LOWER_IS_BETTER = frozenset({*PERPLEXITIES, "bits_per_byte"})
"""Metrics of which lower is better."""

PROGRESS_SECONDS = 5
"""Time between two reports of progress."""


@dataclass(frozen=True)
class MetricValue:
    """A metric over items.

    Args:
        value: The mean (perplexities: exp of the mean).
        stderr: Standard error of the mean, clustered by group where there are groups; NaN for perplexities and one item.
        macro: Mean over groups of their values; NaN without groups, for perplexities and for metrics that are no mean over items.
    """

    value: float
    stderr: float
    macro: float = math.nan


@dataclass(frozen=True)
class TaskResult:
    """Result of a task.

    Args:
        task: Name of the task.
        model: Name of the model.
        shots: Most examples in a prompt.
        dropped: Items whose prompt had fewer examples than wanted.
        metrics: Metric -> value.
        groups: Group -> metric -> value; empty without groups.
        items: Result of each item.
        contamination: Which items are in training text; None if it was not searched.
        clean: Metric -> value over the items that were looked up and not found.
        weights: Format of the model's weights; "" if unknown.
    """

    task: str
    model: str
    shots: int
    dropped: int
    metrics: Mapping[str, MetricValue]
    groups: Mapping[str, Mapping[str, MetricValue]]
    items: Sequence[ItemResult]
    contamination: Contamination | None = None
    clean: Mapping[str, MetricValue] = field(default_factory=dict)
    weights: str = ""


def run_tasks(
    tasks: Sequence[PromptTask],
    model: Responder,
    config: PromptConfig,
    cache: ReplyCache | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[TaskResult]:
    """Run tasks on a model.

    Args:
        tasks: The tasks; every item is checked before the first request.
        model: The model.
        config: How prompts are built.
        cache: Replies of earlier requests, and of these.
        progress: Called with the number of replies and of requests of a round, every few seconds.

    Returns:
        One result per task, in order.

    Raises:
        UserError: A task does not fit its items or the settings, or the model fails.
    """
    for task in tasks:
        task.check(config)
    running: list[tuple[int, int, Generator[Sequence[Request], Sequence[Reply], ItemResult], Sequence[Request]]] = []
    results: list[dict[int, ItemResult]] = [{} for _ in tasks]
    for number, task in enumerate(tasks):
        for index, item in enumerate(task.selected(config)):
            asking = task.ask(item, index, config, model)
            requests = next(asking)
            _check(model, requests, item.location)
            running.append((number, index, asking, requests))
    while running:
        replies = ask_model([request for *_, requests in running for request in requests], model, cache, progress)
        following = []
        for number, index, asking, requests in running:
            try:
                further = asking.send([replies[request] for request in requests])
            except StopIteration as finished:
                results[number][index] = finished.value
                continue
            _check(model, further, tasks[number].items[index].location)
            following.append((number, index, asking, further))
        running = following
    return [
        summarize(task, model.name, config, [found[i] for i in range(len(found))])
        for task, found in zip(tasks, results, strict=True)
    ]


def _check(model: Responder, requests: Sequence[Request], location: str) -> None:
    try:
        model.check(requests)
    except UserError as error:
        raise UserError(f"{location}: {error}") from error


def ask_model(
    requests: Sequence[Request], model: Responder, cache: ReplyCache | None, progress: Callable[[int, int], None]
) -> dict[Request, Reply]:
    """Return the reply to each request: from the cache, or from the model, which gets equal requests once."""
    wanted = list(dict.fromkeys(requests))
    replies: dict[Request, Reply] = {}
    if cache is not None:
        for request in wanted:
            if (known := cache.get(request)) is not None:
                replies[request] = known
    missing = [request for request in wanted if request not in replies]
    shown = time.monotonic()
    for i, reply in model.reply(missing) if missing else ():
        replies[missing[i]] = reply
        if cache is not None:
            cache.put(missing[i], reply)
        if time.monotonic() > shown + PROGRESS_SECONDS:
            progress(len(replies), len(wanted))
            shown = time.monotonic()
    absent = len(wanted) - len(replies)
    if absent:
        raise UserError(f"{model.name} left {absent:,} of {len(wanted):,} requests without a reply")
    return replies


def summarize(task: PromptTask, model: str, config: PromptConfig, items: Sequence[ItemResult]) -> TaskResult:
    """Return the metrics of a task over its items and over each group."""
    wanted = task.shots_under(config)
    return task_result(task.name, model, items, sum(item.shots < wanted for item in items))


def task_result(task: str, model: str, items: Sequence[ItemResult], dropped: int = 0) -> TaskResult:
    """Return the metrics of items of a task, and over each group of items.

    Args:
        task: Name of the task.
        model: Name of the model.
        items: Result of each item.
        dropped: Items whose prompt had fewer examples than wanted.
    """
    names = list(dict.fromkeys(name for item in items for name in item.metrics))
    by_group: dict[str, list[ItemResult]] = {}
    for item in items:
        if item.group:
            by_group.setdefault(item.group, []).append(item)
    return TaskResult(
        task, model, max((item.shots for item in items), default=0), dropped,
        {name: metric_value(name, items) for name in names},
        {group: {name: metric_value(name, some) for name in names} for group, some in sorted(by_group.items())},
        items,
    )  # fmt: skip


def with_contamination(result: TaskResult, contamination: Contamination) -> TaskResult:
    """Return a copy with the items that are in training text, and the metrics over those that are not."""
    clean = [item for item, found in zip(result.items, contamination.items, strict=True) if found is False]
    values = {name: metric_value(name, clean) for name in result.metrics} if clean else {}
    return replace(result, contamination=contamination, clean=values)


def metric_value(name: str, items: Sequence[ItemResult]) -> MetricValue:
    """Return a metric over items, with its standard error clustered by group."""
    base = name.partition(",")[0]
    values = np.array([item.metrics[name] for item in items], np.float64)
    weights = np.array([item.weights.get(name, 1.0) for item in items], np.float64)
    mean = float(values @ weights / weights.sum())
    if base in PERPLEXITIES:
        return MetricValue(math.exp(min(700.0, PERPLEXITIES[base] * mean)), math.nan)
    groups = [item.group for item in items]
    if all(name in item.counts for item in items):
        counts = [item.counts[name] for item in items]
        return MetricValue(value_of(counts), jackknife_error(counts, groups))
    macro = math.nan
    if any(groups):
        members = [[g == one for g in groups] for one in sorted(set(groups))]
        macro = float(np.mean([np.average(values[some], weights=weights[some]) for some in members]))
    return MetricValue(mean, standard_error(values, groups, weights), macro)


def standard_error(values: np.ndarray, groups: Sequence[str], weights: np.ndarray | None = None) -> float:
    """Return the standard error of a mean, clustered by group where there is more than one (Miller 2024, section 2.2).

    Args:
        values: Value of each item, (n,).
        groups: Group of each item.
        weights: Weight of each item (bytes or words); the error is that of a ratio of means (delta method). None for equal ones.

    >>> round(standard_error(np.array([1.0, 0.0, 1.0, 1.0]), ["", "", "", ""]), 3)
    0.25
    >>> round(standard_error(np.array([1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b"]), 3)
    0.5
    """
    n = len(values)
    if n < 2:
        return math.nan
    share = np.ones(n) if weights is None else weights / weights.mean()
    residuals = share * (values - np.average(values, weights=share))
    names = sorted(set(groups))
    if len(names) < 2:
        return float(np.sqrt((residuals**2).sum() / (n - 1) / n))
    index = np.array([names.index(group) for group in groups])
    sums = np.bincount(index, residuals)
    count = len(names)
    return float(np.sqrt((sums**2).sum() * count / (count - 1)) / n)
