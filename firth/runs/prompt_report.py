"""Page of an evaluation in prompts: a board of models, groups, comparisons, and the items that failed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from firth.evaluate.prompting.evaluate import evaluate_prompts
from firth.evaluate.prompting.prompt_task import ItemResult, PromptConfig
from firth.evaluate.prompting.results import comparisons, contamination_lines, table, to_json
from firth.evaluate.prompting.runner import TaskResult
from firth.report.page import Cell, Report, Section, StatCell, Table, TextSample, write
from firth.runs.loaded_model import fast_weights
from firth.runs.training_text import training_texts
from firth.types import LOGGER

MAX_ITEMS = 20
"""Failed items shown of each task and model."""


def evaluate_and_report(
    models: Sequence[str],
    tasks: Sequence[str],
    config: PromptConfig,
    *,
    data: Sequence[str],
    examples: Sequence[str],
    weights: str | None,
    within_word: bool,
    out: Path | None,
    as_json: bool,
    contamination: Sequence[str] = (),
) -> str:
    """Evaluate models on tasks in prompts, write the files of `out`, and return the table or a JSON array.

    The arguments are those of `firth.evaluate.prompting.evaluate.evaluate_prompts`; `contamination` names the runs in whose
    training text the items are looked up. Without `weights`, fp32 weights are held in bf16 where this machine also trains in bf16.
    """
    texts = [text for run in contamination for text in training_texts(Path(run))]
    found = evaluate_prompts(
        models, tasks, config, data=data, examples=examples, weights=weights or fast_weights, within_word=within_word, out=out,
        training_texts=texts, progress=lambda done, total: LOGGER.info(f"{done:,} of {total:,} replies"),
    )  # fmt: skip
    if out is not None:
        write(prompt_report(found, config), out / "report.html")
    if as_json:
        return json.dumps([to_json(results, config) for results in found])
    every = [one for results in found for one in results]
    return "\n".join((*table(every), *contamination_lines(every), *comparisons(every)))


def prompt_report(by_model: Sequence[Sequence[TaskResult]], config: PromptConfig) -> Report:
    """Return the page of the results of each model, the same tasks in the same order."""
    results = [result for found in by_model for result in found]
    sections = [Section("Results", tables=(_board(results),))]
    seen = contamination_lines(results)
    if seen:
        sections.append(Section("Items in training text", "\n\n".join(f"{line}." for line in seen)))
    compared = comparisons(results)
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
    rows: list[tuple[Cell, ...]] = [
        (
            result.task, result.model, len(result.items), result.shots, name, round(value.value, 4),
            None if math.isnan(value.stderr) else round(value.stderr, 4),
        )
        for result in results
        for name, value in result.metrics.items()
    ]  # fmt: skip
    dropped = sum(result.dropped for result in results)
    note = (
        f"{dropped:,} prompts had fewer examples than wanted: they were too long, or their group has fewer."
        if dropped
        else ""
    )
    return Table("", ("task", "model", "items", "examples", "metric", "value", "standard error"), rows, note)


def _groups(result: TaskResult) -> Table:
    """Return the metrics of a result by group, the lowest first."""
    names = list(result.metrics)
    ordered = sorted(result.groups.items(), key=lambda pair: pair[1][names[0]].value)
    rows: list[tuple[Cell, ...]] = [
        (group, *(round(values[name].value, 4) for name in names)) for group, values in ordered
    ]
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
