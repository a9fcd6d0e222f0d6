"""Results of tasks: a table, a JSON file in the layout of lm-evaluation-harness, a record per item, and comparisons.

Two models are compared on the items that both answered, in the first metric of a task that has a standard error (paired bootstrap).
With several comparisons some intervals exclude 0 by chance, so a model is called better only if the 95% interval of the difference
excludes 0 and the p-value is below 0.05 after Holm's correction over all comparisons that are printed together (Holm 1979).

>>> holm([0.01, 0.04, 0.03])
[0.03, 0.06, 0.06]
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from firth.evaluate.prompting.contamination import NGRAM_WORDS
from firth.evaluate.prompting.metrics import Counts, bootstrap_difference, value_of
from firth.evaluate.prompting.prompt_task import ItemResult, PromptConfig
from firth.evaluate.prompting.runner import LOWER_IS_BETTER, MetricValue, TaskResult, task_result
from firth.io.atomic import make_directory, write_text
from firth.io.json_files import read_object, read_rows
from firth.types import UserError

ALPHA = 0.05
DRAWS = 10_000
"""Bootstrap samples: the smallest p-value is 2 in 10,000, which Holm's correction lets pass for up to 249 comparisons."""
CHUNK_PICKS = 2_000_000
"""Items that are drawn at once, which bounds the memory."""


@dataclass(frozen=True)
class Comparison:
    """Difference of a metric between two models on the same items.

    Args:
        task: Name of the task.
        metric: Name of the metric.
        first: Name of the first model.
        second: Name of the second model.
        difference: Value of the first minus value of the second.
        low: Start of its 95% interval.
        high: End of its 95% interval.
        p: Two-sided p-value of the bootstrap.
        items: Number of items that both answered.
        adjusted: The p-value after Holm's correction.
        count: Comparisons that were corrected together.
    """

    task: str
    metric: str
    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    items: int
    adjusted: float = 1.0
    count: int = 1

    @property
    def better(self) -> str:
        """The model that is better; "" if the interval or the corrected p-value does not allow to say so."""
        if self.low <= 0 <= self.high or self.adjusted >= ALPHA:
            return ""
        higher = self.first if self.difference > 0 else self.second
        lower = self.second if self.difference > 0 else self.first
        return lower if base_name(self.metric) in LOWER_IS_BETTER else higher

    def __str__(self) -> str:
        """Return a sentence without its full stop."""
        verdict = {self.first: "is better than", self.second: "is worse than"}.get(self.better, "does not differ from")
        corrected = f" after Holm's correction for {self.count} comparisons" if self.count > 1 else ""
        return (
            f"{self.task}: {self.first} {verdict} {self.second} in {self.metric} (difference {self.difference:+.4f}, 95% interval "
            f"{self.low:+.4f} to {self.high:+.4f}, p {self.adjusted:.2g}{corrected}, {self.items:,} items)"
        )


def base_name(metric: str) -> str:
    """Return the name of a metric without its filter chain."""
    return metric.partition(",")[0]


def main_metric(result: TaskResult) -> str:
    """Return the first metric that has a standard error, by which models are compared; "" if none has."""
    return next((name for name, value in result.metrics.items() if not math.isnan(value.stderr)), "")


def compare(results: Sequence[TaskResult]) -> list[Comparison]:
    """Return the comparisons of each two models of each task, with Holm's correction over all of them.

    Two results without a common item are left out.
    """
    found = []
    for task in dict.fromkeys(result.task for result in results):
        mine = [result for result in results if result.task == task]
        for a, first in enumerate(mine):
            for second in mine[a + 1 :]:
                metric = main_metric(first)
                if metric and metric in second.metrics and (one := paired_bootstrap(first, second, metric)) is not None:
                    found.append(one)
    adjusted = holm([one.p for one in found])
    return [replace(one, adjusted=p, count=len(found)) for one, p in zip(found, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number (Holm 1979), in the same order."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def common_items(first: TaskResult, second: TaskResult) -> list[tuple[ItemResult, ItemResult]]:
    """Return the items that both results have: those of equal file, line and gold answer."""
    known = {_identity(item): item for item in second.items}
    return [(item, known[key]) for item in first.items if (key := _identity(item)) in known]


def _identity(item: ItemResult) -> tuple[str, str]:
    return item.location, json.dumps(item.gold, sort_keys=True)


def paired_bootstrap(
    first: TaskResult, second: TaskResult, metric: str, draws: int = DRAWS, seed: int = 0
) -> Comparison | None:
    """Return the difference of a metric between two models, with its 95% interval; None without a common item.

    Items are resampled by group where there are groups. Weighted metrics (bits per byte) are ratios in each sample. The p-value
    is at least what an exact test of signs can give for so many items or groups: few groups always agree with themselves.
    """
    pairs = common_items(first, second)
    if not pairs:
        return None
    differences = np.array([a.metrics[metric] - b.metrics[metric] for a, b in pairs], np.float64)
    weights = np.array([a.weights.get(metric, 1.0) for a, _ in pairs], np.float64)
    names = {group: i for i, group in enumerate(dict.fromkeys(a.group for a, _ in pairs))}
    cluster = np.array([names[a.group] for a, _ in pairs]) if len(names) > 1 else np.arange(len(pairs))
    sums, sizes = np.bincount(cluster, weights * differences), np.bincount(cluster, weights)
    rng, means = np.random.default_rng(seed), []
    difference = float(sums.sum() / sizes.sum())
    if all(metric in one.counts for pair in pairs for one in pair):  # F1, Matthews' correlation, BLEU
        ours, theirs = ([pair[side].counts[metric] for pair in pairs] for side in (0, 1))
        difference = value_of(ours) - value_of(theirs)
        means.append(bootstrap_difference(ours, theirs, [a.group for a, _ in pairs], draws, rng))
    else:
        step = max(1, CHUNK_PICKS // len(sums))
        for start in range(0, draws, step):
            picks = rng.integers(len(sums), size=(min(step, draws - start), len(sums)))
            means.append(sums[picks].sum(1) / sizes[picks].sum(1))
    drawn = np.concatenate(means)
    low, high = np.quantile(drawn, [0.025, 0.975])
    tail = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    return Comparison(
        first.task, metric, first.model, second.model, difference, float(low), float(high),
        max(min(1.0, 2 * (tail + 1) / (draws + 1)), 2.0 ** (1 - len(sums))), len(pairs),
    )  # fmt: skip


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
    """Return a sentence per comparison of two models (`firth.evaluate.prompting.results.compare`)."""
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
