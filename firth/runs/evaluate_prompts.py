"""Evaluate models on tasks in text, as `firth evaluate MODEL... --task TASK` does: the results, and their page.

The page has a board of models, groups, comparisons, and the items that failed. With `--contamination RUN` the token stores that
a run was trained on are searched for the test items. A board shows evaluations that were made at different times.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from firth.data.token_store import TokenStore
from firth.evaluate.prompting.contamination import TrainingText, find_contaminated
from firth.evaluate.prompting.prompt_task import ItemResult, PromptConfig
from firth.evaluate.prompting.requests import ReplyCache, Responder
from firth.evaluate.prompting.responders import PREFIX, Endpoint, LocalModel
from firth.evaluate.prompting.results import (
    Comparison,
    base_name,
    common_items,
    compare,
    comparisons,
    contamination_lines,
    main_metric,
    read_results,
    table,
    to_json,
    write_results,
)
from firth.evaluate.prompting.runner import LOWER_IS_BETTER, TaskResult, run_tasks, with_contamination
from firth.evaluate.prompting.task_files import load_tasks
from firth.io.atomic import cache_directory, make_directory
from firth.io.integrity import check_recipe
from firth.model.model import LM
from firth.report.page import Cell, Report, Section, StatCell, Table, TextSample, write
from firth.runs.loaded_model import fast_weights
from firth.runs.prepare import RunData
from firth.runs.recipe import ResolvedRecipe, load_resolved
from firth.tokenizer.tokenizer import Tokenizer
from firth.types import LOGGER, UserError


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
        replies = ReplyCache(cache_directory() / "replies", responder.digest)
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


def training_texts(directory: Path) -> list[TrainingText]:
    """Return the training text of a run, and of the runs that it started from.

    A warning names each run, and each part of a mixture, whose text is not there to be searched.

    Raises:
        UserError: This is no run, or neither it nor the runs before it have a token store.
    """
    found: list[TrainingText] = []
    place = _run_of(directory)
    if not (place / "recipe.yaml").is_file():
        raise UserError(f"--contamination {directory}: this is not a run directory: name a run of `firth train`")
    seen: set[Path] = set()
    while place.resolve() not in seen:
        seen.add(place.resolve())
        check_recipe(place)
        recipe, tokenizer = load_resolved(place), Tokenizer.load(place)
        stores = [TokenStore.open(store, tokenizer) for store in _stores(place, recipe, tokenizer)]
        if stores:
            found.append(TrainingText(str(place), stores, tokenizer))
        if not recipe.init_from:
            break
        place = _run_of(Path(recipe.init_from))
        if not (place / "recipe.yaml").is_file():
            _not_searched(f"the training text of {place}, which is no run directory")
            break
    if not found:
        raise UserError(
            f"--contamination {directory}: there is no token store of its training text: a run on records has none, and that of "
            "a run on text is in its data directory, or in data.cache_dir while the text files are unchanged"
        )
    return found


def _run_of(path: Path) -> Path:
    """Return the run directory of a model directory, or the path itself if it is no part of a run."""
    return path.parent if path.name == "model" and (path.parent / "recipe.yaml").is_file() else path


def _not_searched(what: str) -> None:
    LOGGER.warning(f"--contamination: not searched: {what}")


def _stores(place: Path, recipe: ResolvedRecipe, tokenizer: Tokenizer) -> list[Path]:
    """Return the directories of the training stores of a run, without those of the runs before it."""
    if not recipe.examples.reads_documents:
        _not_searched(f"the records of {place}, since only text has a token store")
        return []
    if not recipe.data.cache_dir:
        found, count = sorted((place / "data").glob("*/train")), len(recipe.data.weights) or 1
        if len(found) < count:
            _not_searched(f"{count - len(found)} of {count} token stores of {place}, missing in {place / 'data'}")
        return found
    data, found = RunData(recipe.data, tokenizer, place), []
    for part in data.per_path() if recipe.data.weights else [data]:
        try:
            store = part.store_directory() / "train"
        except (UserError, OSError) as error:  # a text file is gone
            _not_searched(f"a token store of {place}: {error}")
            continue
        if store.is_dir():
            found.append(store)
        else:
            named = ", ".join(part.config.path) or part.config.corpus
            _not_searched(f"{named} of {place}: data.cache_dir has no token store of the text as it is now")
    return found


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

    The arguments are those of `firth.runs.evaluate_prompts.evaluate_prompts`; `contamination` names the runs in whose
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
