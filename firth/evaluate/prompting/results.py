"""Results of tasks: a table, a JSON file in the layout of lm-evaluation-harness, a record per item, and comparisons."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from firth.evaluate.prompting.contamination import NGRAM_WORDS
from firth.evaluate.prompting.prompt_task import PromptConfig
from firth.evaluate.prompting.runner import MetricValue, TaskResult, paired_bootstrap
from firth.io.atomic import make_directory, write_text


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
        "config": {"model": results[0].model if results else "", **asdict(config)},
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
        name = "".join(c if c.isalnum() or c in "-_." else "_" for c in result.task)
        write_text(directory / f"samples_{name}.jsonl", "\n".join(lines) + "\n")


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


def comparisons(by_model: Sequence[Sequence[TaskResult]]) -> list[str]:
    """Return a sentence per task, metric and pair of models; "better" only where the 95% interval of the difference allows it.

    Args:
        by_model: The results of each model, the same tasks in the same order.
    """
    lines = []
    for a in range(len(by_model)):
        for b in range(a + 1, len(by_model)):
            for first, second in zip(by_model[a], by_model[b], strict=True):
                for name, value in first.metrics.items():
                    if math.isnan(value.stderr) or name not in second.metrics:
                        continue
                    difference, low, high = paired_bootstrap(first, second, name)
                    verdict = "is better than" if low > 0 else "is worse than" if high < 0 else "does not differ from"
                    lines.append(
                        f"{first.task}: {first.model} {verdict} {second.model} in {name} "
                        f"(difference {difference:+.4f}, 95% interval {low:+.4f} to {high:+.4f}, {len(first.items):,} items)"
                    )
    return lines
