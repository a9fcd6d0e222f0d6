"""A board of evaluations that were made at different times: a table, and a page, from the directories of their results."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from firth.evaluate.prompting.results import Comparison, base_name, common_items, compare, main_metric, read_results
from firth.evaluate.prompting.runner import LOWER_IS_BETTER, TaskResult
from firth.io.atomic import make_directory
from firth.report.page import Cell, Report, Section, Table, write
from firth.types import UserError

SETTINGS = ("model_dtype", "shots", "chat", "cot", "votes", "temperature", "seed", "limit")
"""Settings that tell results of one model from each other."""

HEAD = ("model", "value", "standard error", "better than", "metric", "items", "shots", "in training text")
"""Columns of the table of a task."""


@dataclass(frozen=True)
class Entry:
    """A result on the board.

    Args:
        result: The result, whose model has a name of its own among the results of the task.
        share: Share of its items that are in training text; None if they were not searched.
    """

    result: TaskResult
    share: float | None


def board(directories: Sequence[str], out: Path | None = None, as_json: bool = False) -> str:
    """Compare results of `firth evaluate --out`; return the tables and comparisons or a JSON object, and write the page.

    Args:
        directories: Directories of results.
        out: Directory for report.html; None for no page.
        as_json: Whether to return JSON.

    Raises:
        UserError: A directory has no results, or there are fewer than two.
    """
    entries = read_entries(directories)
    if len(entries) < 2:
        raise UserError("a board needs two results or more: name directories that `firth evaluate --out` wrote")
    compared = compare([entry.result for entry in entries])
    tables = {task: rows(task, entries, compared) for task in dict.fromkeys(entry.result.task for entry in entries)}
    if out is not None:
        make_directory(out)
        write(board_report(tables, compared, entries), out / "report.html")
    if as_json:
        listed = [
            dict(zip(("task", *HEAD), (task, *row), strict=True)) for task, found in tables.items() for row in found
        ]
        return json.dumps({
            "results": listed, "comparisons": [asdict(one) | {"better": one.better} for one in compared],
        })  # fmt: skip
    lines = [line for task, found in tables.items() for line in (task, *_aligned([HEAD, *found]), "")]
    return "\n".join([*lines, *map(str, compared), *_unmatched(entries)])


def read_entries(directories: Sequence[str]) -> list[Entry]:
    """Read results and name their models: by the model, by the settings in which its results differ, or by the directory."""
    read = [(name, result, config) for name in directories for result, config in read_results(Path(name))]
    entries = []
    for name, result, config in read:
        same = [one for one in read if one[1].task == result.task and one[1].model == result.model]
        changed = [key for key in SETTINGS if len({json.dumps(one[2].get(key)) for one in same}) > 1]
        label = " ".join([result.model, *(f"{key}={config.get(key)}" for key in changed)])
        alike = [one for one in same if all(one[2].get(key) == config.get(key) for key in changed)]
        if len(alike) > 1:
            label += f" ({name})"
        entries.append(Entry(replace(result, model=label), config["share"]))
    labels = [(entry.result.task, entry.result.model) for entry in entries]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise UserError(f"the results of {twice[1]} on {twice[0]} are named twice: name each directory once")
    return entries


def rows(task: str, entries: Sequence[Entry], compared: Sequence[Comparison]) -> list[tuple[Cell, ...]]:
    """Return the rows of a task: the first metric with a standard error (else the first) of each model, the best first."""
    found: list[tuple[float, tuple[Cell, ...]]] = []
    for entry in entries:
        result = entry.result
        name = main_metric(result) or next(iter(result.metrics), "")
        if result.task != task or not name:
            continue
        value = result.metrics[name]
        pairs = [one for one in compared if one.task == task and one.better == result.model]
        worse = [one.second if one.first == result.model else one.first for one in pairs]
        sign = 1.0 if base_name(name) in LOWER_IS_BETTER else -1.0
        cells: tuple[Cell, ...] = (
            result.model, round(value.value, 4), None if math.isnan(value.stderr) else round(value.stderr, 4), ", ".join(worse),
            name, len(result.items), result.shots, None if entry.share is None else round(entry.share, 4),
        )  # fmt: skip
        found.append((sign * value.value, cells))
    return [cells for _, cells in sorted(found, key=lambda pair: pair[0])]


def board_report(
    tables: Mapping[str, Sequence[tuple[Cell, ...]]], compared: Sequence[Comparison], entries: Sequence[Entry]
) -> Report:
    """Return the page: a table per task, and all comparisons."""
    sections = [Section(task, tables=(_without_empty(found),)) for task, found in tables.items()]
    method = (
        "Two models are compared on the items that both answered. The interval is that of 10,000 paired bootstrap samples. A model "
        "is called better only if the interval excludes 0 and p is below 0.05 after Holm's correction for all "
        f"{len(compared)} comparisons."
    )
    pairs: list[tuple[Cell, ...]] = [
        (
            one.task, one.first, one.second, one.better or "-", round(one.difference, 4), round(one.low, 4), round(one.high, 4),
            float(f"{one.adjusted:.2g}"), one.metric, one.items,
        )
        for one in compared
    ]  # fmt: skip
    head = ("task", "first", "second", "better", "difference", "low", "high", "p", "metric", "items")
    sections.append(Section("Comparisons", method, tables=(Table("", head, pairs, "\n".join(_unmatched(entries))),)))
    return Report("Board of evaluations", sections=tuple(sections))


def _without_empty(found: Sequence[tuple[Cell, ...]]) -> Table:
    """Return the table of a task without columns that have no value in any row."""
    kept = [i for i in range(len(HEAD)) if any(row[i] not in (None, "") for row in found) or HEAD[i] == "better than"]
    return Table("", [HEAD[i] for i in kept], [tuple(row[i] for i in kept) for row in found])


def _unmatched(entries: Sequence[Entry]) -> list[str]:
    """Return a sentence for each two results of a task that have no item in common."""
    results = [entry.result for entry in entries]
    return [
        f"{first.task}: {first.model} and {second.model} have no item in common, so they are not compared"
        for i, first in enumerate(results)
        for second in results[i + 1 :]
        if first.task == second.task and not common_items(first, second)
    ]


def _aligned(table: Sequence[Sequence[Cell]]) -> list[str]:
    """Return the lines of a table; numbers are aligned on the right."""
    texts = [
        ["" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row]
        for row in table
    ]
    widths = [max(len(row[i]) for row in texts) for i in range(len(HEAD))]
    right = [all(isinstance(row[i], int | float | None) for row in table[1:]) for i in range(len(HEAD))]
    return [
        "  ".join(cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True)).rstrip()
        for row in texts
    ]
