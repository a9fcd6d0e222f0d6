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
from dataclasses import dataclass

import numpy as np

from firth.evaluate.prompting.aggregates import bootstrap_difference, jackknife_error, value_of
from firth.evaluate.prompting.prompt_task import ItemResult, PromptConfig, PromptTask
from firth.evaluate.prompting.requests import Reply, ReplyCache, Request, Responder
from firth.types import UserError

PERPLEXITIES = {"perplexity": -1.0, "word_perplexity": 1.0, "byte_perplexity": 1.0}
"""Metric -> sign of its items' values under exp: `perplexity` is exp of minus the mean log p of the targets."""


PROGRESS_SECONDS = 5
"""Time between two reports of progress."""


@dataclass(frozen=True)
class MetricValue:
    """A metric over items.

    Args:
        value: The mean (perplexities: exp of the mean).
        stderr: Standard error of the mean, clustered by group where there are groups; NaN for perplexities and one item.
        macro: Mean over groups of their means; NaN without groups.
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
    """

    task: str
    model: str
    shots: int
    dropped: int
    metrics: Mapping[str, MetricValue]
    groups: Mapping[str, Mapping[str, MetricValue]]
    items: Sequence[ItemResult]


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
            running.append((number, index, asking, next(asking)))
    while running:
        replies = _replies([request for *_, requests in running for request in requests], model, cache, progress)
        following = []
        for number, index, asking, requests in running:
            try:
                following.append((number, index, asking, asking.send([replies[request] for request in requests])))
            except StopIteration as finished:
                results[number][index] = finished.value
        running = following
    return [
        summarize(task, model.name, config, [found[i] for i in range(len(found))])
        for task, found in zip(tasks, results, strict=True)
    ]


def _replies(
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
    names = list(dict.fromkeys(name for item in items for name in item.metrics))
    wanted = task.shots if config.shots is None else config.shots
    by_group: dict[str, list[ItemResult]] = {}
    if task.group:
        for item in items:
            by_group.setdefault(item.group, []).append(item)
    return TaskResult(
        task.name, model, max((item.shots for item in items), default=0), sum(item.shots < wanted for item in items),
        {name: metric_value(name, items) for name in names},
        {group: {name: metric_value(name, some) for name in names} for group, some in sorted(by_group.items())},
        items,
    )  # fmt: skip


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
        macro = float(np.mean([values[[g == one for g in groups]].mean() for one in sorted(set(groups))]))
    return MetricValue(mean, standard_error(values, groups), macro)


def standard_error(values: np.ndarray, groups: Sequence[str]) -> float:
    """Return the standard error of a mean, clustered by group where there is more than one (Miller 2024, section 2.2).

    Args:
        values: Value of each item, (n,).
        groups: Group of each item.

    >>> round(standard_error(np.array([1.0, 0.0, 1.0, 1.0]), ["", "", "", ""]), 3)
    0.25
    >>> round(standard_error(np.array([1.0, 1.0, 0.0, 0.0]), ["a", "a", "b", "b"]), 3)
    0.5
    """
    n = len(values)
    if n < 2:
        return math.nan
    residuals = values - values.mean()
    names = sorted(set(groups))
    if len(names) < 2:
        return float(values.std(ddof=1) / math.sqrt(n))
    index = np.array([names.index(group) for group in groups])
    sums = np.bincount(index, residuals)
    count = len(names)
    return float(np.sqrt((sums**2).sum() * count / (count - 1)) / n)


def paired_bootstrap(
    first: TaskResult, second: TaskResult, name: str, draws: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Return the difference of a metric between two models on the same items, and its 95% paired bootstrap interval.

    Items are resampled by group where there are groups.

    Raises:
        UserError: The results are of different items.
    """
    if [item.location for item in first.items] != [item.location for item in second.items]:
        raise UserError(f"{first.model} and {second.model} were not evaluated on the same items of {first.task}")
    if all(name in item.counts for item in (*first.items, *second.items)):
        ours, theirs = ([item.counts[name] for item in result.items] for result in (first, second))
        draws_of = bootstrap_difference(
            ours, theirs, [item.group for item in first.items], draws, np.random.default_rng(seed)
        )
        low, high = np.quantile(draws_of, [0.025, 0.975])
        return value_of(ours) - value_of(theirs), float(low), float(high)
    differences = np.array(
        [a.metrics[name] - b.metrics[name] for a, b in zip(first.items, second.items, strict=True)], np.float64
    )
    groups = [item.group for item in first.items]
    names = sorted(set(groups))
    clusters = [np.flatnonzero([g == one for g in groups]) for one in names] if len(names) > 1 else None
    sums = np.array([differences[c].sum() for c in clusters]) if clusters else differences
    sizes = np.array([len(c) for c in clusters], np.float64) if clusters else np.ones(len(differences))
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(sums), size=(draws, len(sums)))
    means = sums[picks].sum(1) / sizes[picks].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(differences.mean()), float(low), float(high)
