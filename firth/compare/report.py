"""Output of a comparison: table.md, results.json, and a page with charts of score against compute.

print(write_comparison(scores, ["roberta", "electra"], {"text": "sarcasm"}, Path("runs/compare"), seconds=False))
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from firth.compare.statistics import (
    COLUMNS,
    METRICS,
    Interval,
    ResultRow,
    Score,
    ScoreMetric,
    differences,
    gains,
    markdown,
    ranked,
    result_row,
)
from firth.io.atomic import write_text
from firth.report.charts import DISTINCT, Curve, Figure, number
from firth.report.page import Cell, Command, Report, Section, Table
from firth.report.page import write as write_report

EXPLANATION = """Every point is a run of its own, with its own seed, order of the text and learning rate schedule; all runs
read the same text with one tokenizer. The probe finetunes the whole model on a few labeled records; its curve starts at the
left with the accuracy of a randomly initialized model. For the cloze score, each model predicts hidden tokens with the
context that its objective provides."""


def write_comparison(
    scores: Sequence[Score], order: Sequence[str], facts: Mapping[str, str], out: Path, *, seconds: bool
) -> str:
    """Write the three files.

    Args:
        scores: Scores of all runs.
        order: Names of the recipes, in the order of the charts.
        facts: Common settings of the runs.
        out: Output directory.
        seconds: Whether the compute is a time, not FLOPs.

    Returns:
        The table and the conclusions as text.
    """
    shares = sorted({s.share for s in scores} - {0.0})
    rows = [result_row(scores, name, share) for share in shares for name in order]
    full = ranked([row for row in rows if row.share == shares[-1]])
    conclusions = [sentence for metric in METRICS for sentence in differences(scores, metric)] + gains(full)
    results = {
        "facts": dict(facts), "conclusions": conclusions, "table": [asdict(row) for row in full],
        "rows": [asdict(row) for row in rows], "scores": [asdict(s) for s in scores],
    }  # fmt: skip
    write_text(out / "results.json", json.dumps(results, indent=1))
    settings = [f"- {name}: {value}" for name, value in facts.items()]
    table = markdown(full)
    write_text(out / "table.md", "\n\n".join([table, *conclusions, "\n".join(settings)]) + "\n")
    figures = [made for metric in METRICS if (made := figure(rows, metric, seconds)) is not None]
    tables = [result_table("With the full compute", full)]
    if len(shares) > 1:
        tables.append(result_table("With each share of the compute", rows))
    best = out / "runs" / full[0].recipe / f"share-{shares[-1]:g}" / "seed-0"
    page = Report(
        f"{', '.join(order[:-1])} and {order[-1]} at equal compute" if len(order) > 1 else order[0],
        sections=(Section("Score against compute", EXPLANATION, figures=figures, tables=tables),),
        text="\n\n".join(conclusions),
        facts=dict(facts),
        commands=(Command(f"Finetune {full[0].recipe}, the first of the table, on your own labeled records",
                          f"firth train classification init_from={best} data.path=labeled.jsonl"),),
    )  # fmt: skip
    write_report(page, out / "report.html")
    files = f"report: {out / 'report.html'}   all results: {out / 'results.json'}"
    return "\n".join([table, "", *conclusions, "", files])


def figure(rows: Sequence[ResultRow], metric: ScoreMetric, seconds: bool) -> Figure | None:
    """Return the chart of a metric against compute, with intervals and one color per recipe.

    Curves of the probe start with the accuracy from scratch at no compute. None where fewer than two recipes have values.

    Args:
        rows: Results of all recipes and shares.
        metric: The metric.
        seconds: Whether the compute is a time, not FLOPs.
    """
    curves = []
    names = list(dict.fromkeys(row.recipe for row in rows))
    for i, name in enumerate(names):
        own = sorted((row for row in rows if row.recipe == name), key=lambda row: row.share)
        found = [(row.seconds if seconds else row.flops, row.value(metric)) for row in own]
        if metric.field == "accuracy":
            found = [(0.0, own[0].scratch), *found]
        known = [(x, interval) for x, interval in found if interval is not None]
        if known:
            ends = [(math.nan, math.nan) if i.low is None or i.high is None else (i.low, i.high) for _, i in known]
            y = [i.mean for _, i in known]
            curves.append(
                Curve(name, [x for x, _ in known], y, points=True, intervals=ends, color=i, dashed=i >= DISTINCT)
            )
    if len(curves) < min(2, len(names)):
        return None
    axis = "seconds of training" if seconds else "FLOPs of training"
    note = "Vertical lines are 95% intervals over seeds, which include the draw of the labeled records."
    return Figure(f"{metric.name} against compute", axis, metric.axis, tuple(curves), note=note)


def result_table(title: str, results: Sequence[ResultRow]) -> Table:
    """Return results as a table of the page."""
    shown = [field for field in COLUMNS if any(getattr(row, field) is not None for row in results)]
    head = ["recipe", "share", "parameters", "FLOPs", "seconds", *(COLUMNS[field] for field in shown)]
    rows: list[list[Cell]] = []
    for row in results:
        found: list[Interval | None] = [getattr(row, field) for field in shown]
        cells = ["–" if interval is None else _two_lines(interval) for interval in found]
        rows.append([row.recipe, f"{row.share:.0%}", row.parameters, number(row.flops, 3), row.seconds, *cells])
    return Table(title, head, rows, "In parentheses: the 95% interval over seeds, clipped to possible values.")


def _two_lines(interval: Interval) -> str:
    """Return a mean and its interval, with a line break possible only before the interval."""
    mean, space, limits = str(interval).partition(" ")
    return mean + space + limits.replace(" ", "\N{NO-BREAK SPACE}")
