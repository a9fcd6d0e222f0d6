"""Page of an evaluation in prompts: a board of models, groups, comparisons, and the items that failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from firth.evaluate.prompting.prompt_task import ItemResult, PromptConfig
from firth.evaluate.prompting.results import comparisons
from firth.evaluate.prompting.runner import TaskResult
from firth.report.page import Report, Section, StatCell, Table, TextSample, write

MAX_ITEMS = 20
"""Failed items shown of each task and model."""


def write_prompt_report(by_model: Sequence[Sequence[TaskResult]], config: PromptConfig, path: Path) -> None:
    """Write the page of the results of each model."""
    write(prompt_report(by_model, config), path)


def prompt_report(by_model: Sequence[Sequence[TaskResult]], config: PromptConfig) -> Report:
    """Return the page of the results of each model, the same tasks in the same order."""
    results = [result for found in by_model for result in found]
    sections = [Section("Results", tables=(_board(results),))]
    compared = comparisons(by_model)
    if compared:
        sections.append(Section("Comparison", "\n\n".join(f"{line}." for line in compared)))
    groups = [_groups(result) for result in results if result.groups]
    if groups:
        sections.append(Section("Groups", tables=tuple(groups)))
    for result in results:
        failed = [item for item in result.items if _failed(item)]
        if failed:
            text = f"{len(failed):,} of {len(result.items):,} items" + (
                f"; the first {MAX_ITEMS} are shown." if len(failed) > MAX_ITEMS else "."
            )
            samples = tuple(_sample(item) for item in failed[:MAX_ITEMS])
            sections.append(Section(f"Wrong answers: {result.task}, {result.model}", text, samples=samples))
    return Report(
        ", ".join(dict.fromkeys(result.task for result in results)),
        numbers=tuple(_number(result) for result in results[:4] if result.metrics),
        sections=tuple(sections),
    )


def _number(result: TaskResult) -> StatCell:
    """Return the first metric of a result."""
    name, value = next(iter(result.metrics.items()))
    return StatCell(f"{result.task}: {name}", round(value.value, 4), result.model)


def _board(results: Sequence[TaskResult]) -> Table:
    """Return the table of all results."""
    rows = [
        (
            result.task, result.model, len(result.items), result.shots, name, round(value.value, 4),
            None if math.isnan(value.stderr) else round(value.stderr, 4),
        )
        for result in results
        for name, value in result.metrics.items()
    ]  # fmt: skip
    dropped = sum(result.dropped for result in results)
    note = f"{dropped:,} prompts had fewer examples than wanted, for they were too long." if dropped else ""
    return Table("", ("task", "model", "items", "examples", "metric", "value", "standard error"), rows, note)


def _groups(result: TaskResult) -> Table:
    """Return the metrics of a result by group, the lowest first."""
    names = list(result.metrics)
    ordered = sorted(result.groups.items(), key=lambda pair: pair[1][names[0]].value)
    rows = [(group, *(round(values[name].value, 4) for name in names)) for group, values in ordered]
    return Table(f"{result.task}, {result.model}", ("group", *names), rows)


def _failed(item: ItemResult) -> bool:
    """Return whether an item has an answer and its first metric is 0."""
    return bool(item.answers) and next(iter(item.metrics.values()), 1.0) == 0.0


def _sample(item: ItemResult) -> TextSample:
    """Return the prompt of an item with the given and the right answer, and what the model replied."""
    replies = [f"{reply:.3f}" if isinstance(reply, float) else str(reply) for reply in item.replies]
    answers = {"answer" if name == "none" else name: text for name, text in item.answers.items()}
    return TextSample(
        item.prompt, answers | {"right": str(item.gold)}, f"{item.location}; replies: {' | '.join(replies)}"
    )
