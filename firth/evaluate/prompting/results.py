"""Results of tasks: a table, a JSON file in the layout of lm-evaluation-harness, a record per item, and comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from firth.evaluate.prompting.aggregates import Counts
from firth.evaluate.prompting.comparison import compare
from firth.evaluate.prompting.contamination import NGRAM_WORDS
from firth.evaluate.prompting.prompt_task import ItemResult, PromptConfig
from firth.evaluate.prompting.runner import MetricValue, TaskResult, task_result
from firth.io.atomic import make_directory, write_text
from firth.io.json_files import read_object, read_rows
from firth.types import UserError


def to_json(results: Sequence[TaskResult], config: PromptConfig) -> dict[str, Any]:
    """Return the results of one model in the layout of lm-evaluation-harness's results file."""
    return {
        "results": {
            result.task: {"alias": result.task, "sample_len": len(result.items)} | _metrics(result.metrics)
            for result in results
        },
        "groups": {
            f"{result.task}/{group}": {"alias": group} | _metrics(values)
            for result in results
            for group, values in result.groups.items()
        },
        "n-shot": {result.task: result.shots for result in results},
        "n-samples": {result.task: {"effective": len(result.items)} for result in results},
        "contamination": {
            result.task: {
                "runs": list(one.runs),
                "ngram_words": NGRAM_WORDS,
                "checked": one.checked,
                "found": one.found,
                "share": one.share if one.checked else None,
                "clean": _metrics(result.clean),
            }
            for result in results
            if (one := result.contamination) is not None
        },
        "config": {
            "model": results[0].model if results else "",
            "model_dtype": results[0].weights if results else "",
            **asdict(config),
        },
    }


def _metrics(values: Mapping[str, MetricValue]) -> dict[str, Any]:
    """Return metrics as "metric,filter" -> value, with standard errors and means over groups."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name, _, chain = key.partition(",")
        chain = chain or "none"
        found[f"{name},{chain}"] = value.value
        found[f"{name}_stderr,{chain}"] = "N/A" if math.isnan(value.stderr) else value.stderr
        if not math.isnan(value.macro):
            found[f"{name}_macro,{chain}"] = value.macro
    return found


def write_results(directory: Path, results: Sequence[TaskResult], config: PromptConfig) -> None:
    """Write results.json, and samples_TASK.jsonl with a record per item: prompt, answer, gold, metrics, replies."""
    make_directory(directory)
    write_text(directory / "results.json", json.dumps(to_json(results, config), indent=2, ensure_ascii=False) + "\n")
    for result in results:
        known = result.contamination.items if result.contamination else [None] * len(result.items)
        lines = [
            json.dumps(asdict(item) | ({} if found is None else {"contaminated": found}), ensure_ascii=False)
            for item, found in zip(result.items, known, strict=True)
        ]
        write_text(directory / samples_name(result.task), "\n".join(lines) + "\n")


def table(results: Sequence[TaskResult]) -> list[str]:
    """Return the lines of a table: task, model, items, examples, metric, value with standard error."""
    rows = [("task", "model", "items", "shots", "metric", "value", "")]
    for result in results:
        for name, value in result.metrics.items():
            error = "" if math.isnan(value.stderr) else f"± {value.stderr:.4f}"
            macro = "" if math.isnan(value.macro) else f"  {value.macro:.4f} over {len(result.groups)} groups"
            rows.append((
                result.task, result.model, f"{len(result.items):,}", str(result.shots), name, f"{value.value:.4f}", error + macro,
            ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    right = (2, 3, 5)
    return [
        "  ".join(
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) if i < 6 else cell
            for i, cell in enumerate(row)
        ).rstrip()
        for row in rows
    ]


def contamination_lines(results: Sequence[TaskResult]) -> list[str]:
    """Return a sentence per task on the items in training text, and one per model on the other items."""
    lines = []
    for task in dict.fromkeys(result.task for result in results):
        searched = [result for result in results if result.task == task and result.contamination is not None]
        for number, result in enumerate(searched):
            one = result.contamination
            assert one is not None
            if not number:
                short = len(one.items) - one.checked
                lines.append(
                    f"{task}: {one.found:,} of {one.checked:,} items ({one.share:.1%}) have {NGRAM_WORDS} consecutive words that are in "
                    f"the training text of {', '.join(one.runs)}" + (f"; too short to tell: {short:,}" if short else "")
                )
            if one.found:
                values = ", ".join(
                    f"{name} {value.value:.4f}" + ("" if math.isnan(value.stderr) else f" ± {value.stderr:.4f}")
                    for name, value in result.clean.items()
                )
                lines.append(f"{task}: {result.model} on the other {one.checked - one.found:,}: {values or 'no item'}")
    return lines


def comparisons(results: Sequence[TaskResult]) -> list[str]:
    """Return a sentence per comparison of two models (`firth.evaluate.prompting.comparison.compare`)."""
    return [str(one) for one in compare(results)]


def read_results(directory: Path) -> list[tuple[TaskResult, dict[str, Any]]]:
    """Read what `write_results` wrote, of one model or of several.

    Args:
        directory: The directory of results.json, or of model-1, model-2, ...

    Returns:
        The result of each task of each model, with "config" and, if items were searched in training text, its "share".

    Raises:
        UserError: There are no results, or a file is damaged.
    """
    if not (directory / "results.json").is_file():
        below = sorted(directory.glob("model-*/results.json"), key=lambda file: (len(str(file)), file))
        if not below:
            raise UserError(
                f"{directory}: there is no results.json: name a directory that `firth evaluate --out` wrote"
            )
        return [one for file in below for one in read_results(file.parent)]
    cure = "evaluate again"
    record = read_object(directory / "results.json", {"results": dict, "config": dict}, cure)
    found = []
    for task in record["results"]:
        rows = read_rows(directory / samples_name(task), ITEM_FIELDS, cure)
        if not rows:
            raise UserError(f"{directory / samples_name(task)}: there is no item of {task}: {cure}")
        items = [_item(row) for row in rows]
        share = record.get("contamination", {}).get(task, {}).get("share")
        found.append(
            (task_result(task, str(record["config"].get("model")), items), record["config"] | {"share": share})
        )
    return found


def _item(row: Mapping[str, Any]) -> ItemResult:
    """Return the result of an item from its record."""
    plain = {field.name: row[field.name] for field in fields(ItemResult) if field.name != "counts"}
    counts = {name: Counts(one["kind"], tuple(one["values"])) for name, one in row["counts"].items()}
    return ItemResult(**plain, counts=counts)


ITEM_FIELDS = {
    "location": str, "group": str, "prompt": str, "shots": int, "answers": dict, "metrics": dict, "replies": list, "weights": dict,
    "counts": dict, "gold": object,
}  # fmt: skip
"""Fields of a record in samples_TASK.jsonl."""


def samples_name(task: str) -> str:
    """Return the name of the file with the items of a task."""
    return f"samples_{''.join(c if c.isalnum() or c in '-_.' else '_' for c in task)}.jsonl"
