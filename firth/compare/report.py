"""What a comparison leaves behind: table.md, results.json, and a page with the picture of score against compute.

print(conclude(scores, ["roberta", "electra"], {"text": "sarcasm"}, Path("runs/compare"), seconds=False))
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from firth.compare.statistics import (
    COLUMNS,
    MEASURES,
    Interval,
    Measure,
    ResultRow,
    Score,
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

HOW = """Every point is a run of its own, with a seed, an order of the text and a fall of the rate of its own; all read the
same text with one tokenizer. The probe finetunes the whole model on few labels, and begins at the left with the same shape
from random numbers. Hidden tokens are asked of each model in its objective's own way, with what that lets it see."""


def write_comparison(
    scores: Sequence[Score], order: Sequence[str], facts: Mapping[str, str], out: Path, *, seconds: bool
) -> str:
    """Write the three files; return the table and the words for reading. seconds: whether the compute was a time."""
    shares = sorted({s.share for s in scores} - {0.0})
    lines = [result_row(scores, name, share) for share in shares for name in order]
    whole = ranked([row for row in lines if row.share == shares[-1]])
    words = [said for measure in MEASURES for said in differences(scores, measure)] + gains(whole)
    results = {
        "facts": dict(facts), "words": words, "table": [asdict(row) for row in whole],
        "lines": [asdict(row) for row in lines], "scores": [asdict(s) for s in scores],
    }  # fmt: skip
    write_text(out / "results.json", json.dumps(results, indent=1))
    told = [f"- {name}: {value}" for name, value in facts.items()]
    table = markdown(whole)
    write_text(out / "table.md", "\n\n".join([table, *words, "\n".join(told)]) + "\n")
    figures = [drawn for measure in MEASURES if (drawn := figure(lines, measure, seconds)) is not None]
    tables = [listed("With all of the compute", whole)]
    if len(shares) > 1:
        tables.append(listed("With each share of it", lines))
    best = out / "runs" / whole[0].recipe / f"share-{shares[-1]:g}" / "seed-0"
    page = Report(
        f"{', '.join(order[:-1])} and {order[-1]} at equal compute" if len(order) > 1 else order[0],
        sections=(Section("Score against compute", HOW, figures=figures, tables=tables),),
        text="\n\n".join(words),
        facts=dict(facts),
        commands=(Command(f"Finetune {whole[0].recipe}, the first of the table, on labels of your own",
                          f"firth train classification init_from={best} data.path=labelled.jsonl"),),
    )  # fmt: skip
    write_report(page, out / "report.html")
    return "\n".join([table, "", *words, "", f"report: {out / 'report.html'}   every figure: {out / 'results.json'}"])


def figure(lines: Sequence[ResultRow], measure: Measure, seconds: bool) -> Figure | None:
    """Score against compute, with intervals, a recipe in one colour throughout; the probe's curves begin where nothing was
    learnt. None where there is nothing to compare."""
    curves = []
    names = list(dict.fromkeys(row.recipe for row in lines))
    for i, name in enumerate(names):
        own = sorted((row for row in lines if row.recipe == name), key=lambda row: row.share)
        found = [(row.seconds if seconds else row.flops, row.measured(measure)) for row in own]
        if measure.field == "accuracy":
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
    note = "Upright lines are 95% intervals over seeds, the luck of the labels' draw included."
    return Figure(f"{measure.name} against compute", axis, measure.axis, tuple(curves), note=note)


def listed(title: str, lines: Sequence[ResultRow]) -> Table:
    """Lines as a table of the page."""
    shown = [field for field in COLUMNS if any(getattr(row, field) is not None for row in lines)]
    head = ["recipe", "share", "parameters", "FLOPs", "seconds", *(COLUMNS[field] for field in shown)]
    rows: list[list[Cell]] = []
    for row in lines:
        found: list[Interval | None] = [getattr(row, field) for field in shown]
        cells = ["–" if interval is None else _two_lines(interval) for interval in found]
        rows.append([row.recipe, f"{row.share:.0%}", row.parameters, number(row.flops, 3), row.seconds, *cells])
    return Table(title, head, rows, "In parentheses: the 95% interval over seeds, cut to what is possible.")


def _two_lines(interval: Interval) -> str:
    """Return a mean and its interval with one place where a narrow column may break: before the interval."""
    mean, space, limits = str(interval).partition(" ")
    return mean + space + limits.replace(" ", "\N{NO-BREAK SPACE}")
