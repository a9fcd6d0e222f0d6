"""Statistics and report of a comparison of objectives.

Statistics of a comparison: its table, and which differences are significant.

Every mean is over seeds, with a 95% Student's t interval clipped to the range of the metric. Two recipes are compared by
their differences per seed: a seed fixes the draw of labeled records and the order of the text for both, which removes this
shared variance. A difference is reported as one only if its interval excludes 0. With few seeds the intervals are wide.
There is no correction for multiple comparisons or for selecting the best afterwards: of 20 equal recipes, one will look
better.

>>> scores = [Score("a", 1.0, seed, "", accuracy=0.7 + seed / 100) for seed in range(3)]
>>> scores += [Score("b", 1.0, seed, "", accuracy=0.75 + seed / 100 + seed % 2 / 100) for seed in range(3)]
>>> for sentence in differences(scores, METRICS[0]): print(sentence)
Accuracy of the probe: b is best. It is above a by 0.053 (0.039 to 0.068).

Output of a comparison: table.md, results.json, and a page with charts of score against compute.

print(write_comparison(scores, ["roberta", "electra"], {"text": "sarcasm"}, Path("runs/compare"), seconds=False))
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean

from firth.evaluate.metrics import over_seeds
from firth.io.atomic import write_text
from firth.report.charts import DISTINCT, Curve, Figure, number
from firth.report.page import Cell, Command, Report, Section, Table
from firth.report.page import write as write_report


@dataclass(frozen=True)
class Score:
    """Result of one run; metrics that were not measured are None.

    Args:
        recipe: Name of the recipe.
        share: Share of the compute; 0 for finetuning from random weights.
        seed: The seed.
        key: Hash of the recipe that was run.
        flops: Counted FLOPs of pretraining.
        seconds: Seconds of pretraining.
        steps: Steps of pretraining.
        tokens: Tokens read in pretraining.
        parameters: Number of parameters.
        accuracy: Accuracy of the finetuned model on the test records.
        cloze_accuracy: Cloze accuracy (`firth.evaluate.perplexity`).
        cloze_bits: Cloze bits.
        bits_per_byte: Bits per byte of held-out text, for causal objectives.
    """

    recipe: str
    share: float
    seed: int
    key: str
    flops: float = 0.0
    seconds: float = 0.0
    steps: int = 0
    tokens: int = 0
    parameters: int = 0
    accuracy: float | None = None
    cloze_accuracy: float | None = None
    cloze_bits: float | None = None
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class ScoreMetric:
    """Metric of a score.

    Args:
        field: Field of `Score` and `ResultRow`.
        name: Name in sentences and titles.
        axis: Label of the axis.
        higher_is_better: Whether a higher value is better.
        low: Least possible value.
        high: Greatest possible value.
    """

    field: str
    name: str
    axis: str
    higher_is_better: bool = True
    low: float = 0.0
    high: float = 1.0

    def of(self, score: Score) -> float | None:
        """Return the value of a score; None if it was not measured."""
        value: float | None = getattr(score, self.field)
        return value


METRICS = (
    ScoreMetric("accuracy", "Accuracy of the probe", "share correct, after finetuning"),
    ScoreMetric("bits_per_byte", "Held-out text", "bits per byte", higher_is_better=False, high=math.inf),
    ScoreMetric("cloze_accuracy", "Cloze accuracy", "share correct, without finetuning"),
)
"""Compared metrics; the first that all recipes have orders the table."""


@dataclass(frozen=True)
class Interval:
    """Mean over seeds and its 95% interval; low and high are None for a single seed.

    >>> str(Interval.of([0.7, 0.97], 0.0, 1.0)), str(Interval.of([0.7])), str(Interval.of([0.70, 0.72, 0.74]))
    ('0.835 (0.000 to 1.000)', '0.700', '0.720 (0.670 to 0.770)')
    """

    mean: float
    low: float | None = None
    high: float | None = None

    @staticmethod
    def of(values: Sequence[float], least: float = -math.inf, most: float = math.inf) -> Interval | None:
        """Return the mean and interval of the values of several seeds; None without values.

        Args:
            values: One value per seed.
            least: The least value that the quantity can take; the interval ends there.
            most: The greatest value that it can take.
        """
        if not values:
            return None
        mean, half = over_seeds(values)
        return Interval(mean) if math.isnan(half) else Interval(mean, max(least, mean - half), min(most, mean + half))

    def __str__(self) -> str:
        return f"{self.mean:.3f}{self.limits('.3f')}"

    def limits(self, form: str) -> str:
        """Return " (LOW to HIGH)" with both formatted by `form`; an empty string for a single seed."""
        return "" if self.low is None or self.high is None else f" ({self.low:{form}} to {self.high:{form}})"

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 is outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class ResultRow:
    """Means of a recipe at one share of the compute.

    The fields are those of `Score` over seeds, and:

    Args:
        seeds: Number of seeds.
        scratch: Accuracy of the same config finetuned from random weights.
        gain: Accuracy minus that from scratch, paired by seed.
    """

    recipe: str
    share: float
    seeds: int
    parameters: int
    flops: float
    seconds: float
    steps: float
    tokens: float
    accuracy: Interval | None
    scratch: Interval | None
    gain: Interval | None
    cloze_accuracy: Interval | None
    cloze_bits: Interval | None
    bits_per_byte: Interval | None

    def value(self, metric: ScoreMetric) -> Interval | None:
        """Return the mean and interval of a metric."""
        found: Interval | None = getattr(self, metric.field)
        return found


def result_row(scores: Sequence[Score], recipe: str, share: float) -> ResultRow:
    """Return the means of a recipe at a share of the compute."""
    own = [s for s in scores if (s.recipe, s.share) == (recipe, share)]
    scratch = [s for s in scores if (s.recipe, s.share) == (recipe, 0.0)]

    def interval(field: str, some: Sequence[Score], most: float = math.inf) -> Interval | None:
        return Interval.of([value for s in some if (value := getattr(s, field)) is not None], 0.0, most)

    return ResultRow(
        recipe, share, len(own), own[0].parameters, fmean(s.flops for s in own), fmean(s.seconds for s in own),
        fmean(s.steps for s in own), fmean(s.tokens for s in own), interval("accuracy", own, 1.0), interval("accuracy", scratch, 1.0),
        paired(own, scratch, METRICS[0]), interval("cloze_accuracy", own, 1.0), interval("cloze_bits", own), interval("bits_per_byte", own),
    )  # fmt: skip


def paired(first: Sequence[Score], second: Sequence[Score], metric: ScoreMetric) -> Interval | None:
    """Return the mean difference of first minus second over the seeds that both have."""
    by_seed = {s.seed: metric.of(s) for s in second}
    pairs = [(metric.of(s), by_seed.get(s.seed)) for s in first]
    span = metric.high - metric.low
    return Interval.of([a - b for a, b in pairs if a is not None and b is not None], -span, span)


def differences(scores: Sequence[Score], metric: ScoreMetric) -> list[str]:
    """Return one sentence that ranks the recipes at the full compute; none where fewer than two have scores.

    A recipe is called best only where its interval of differences excludes 0 against every other.
    """
    share = max(s.share for s in scores)
    by_name: dict[str, list[Score]] = {}
    for score in scores:
        if score.share == share and metric.of(score) is not None:
            by_name.setdefault(score.recipe, []).append(score)
    if len(by_name) < 2:
        return []
    sign = 1.0 if metric.higher_is_better else -1.0
    means = {
        name: sign * fmean(value for s in own if (value := metric.of(s)) is not None) for name, own in by_name.items()
    }
    best, *others = sorted(means, key=lambda name: -means[name])
    significant: list[str] = []
    undecided: list[str] = []
    for name in others:
        ahead = (by_name[best], by_name[name]) if metric.higher_is_better else (by_name[name], by_name[best])
        gap = paired(*ahead, metric)
        if gap is not None:
            (significant if gap.excludes_zero else undecided).append(f"{name} by {gap.mean:.3f}{gap.limits('.3f')}")
    verdict = f"{best} {'has the ' + ('highest' if metric.higher_is_better else 'lowest') + ' mean' if undecided else 'is best'}."
    sentences = [f"{metric.name}: {verdict}"]
    if significant:
        sentences.append(f"It is {'above' if metric.higher_is_better else 'below'} {', '.join(significant)}.")
    if undecided:
        seeds = len(by_name[best])
        doubt = f"{seeds} seeds do not distinguish" if seeds > 1 else "One seed does not distinguish"
        sentences.append(f"{doubt} it from {', '.join(undecided)}.")
    return [" ".join(sentences)]


def gains(rows: Sequence[ResultRow]) -> list[str]:
    """Return one sentence per recipe on the gain of pretraining over the same config from scratch."""
    sentences = []
    for row in rows:
        if row.gain is None or row.scratch is None:
            continue
        gain = f"{row.gain.mean:+.3f}{row.gain.limits('+.3f')}"
        verdict = f"Pretraining {'helps' if row.gain.mean > 0 else 'harms'} {row.recipe}"
        if not row.gain.excludes_zero:
            verdict = f"These seeds cannot say whether pretraining helps {row.recipe}"
        sentences.append(f"{verdict}: {gain} over {row.scratch.mean:.3f} from scratch.")
    return sentences


COLUMNS: dict[str, str] = {
    "accuracy": "probe accuracy", "scratch": "from scratch", "gain": "gain", "cloze_accuracy": "cloze accuracy",
    "cloze_bits": "cloze bits", "bits_per_byte": "bits per byte",
}  # fmt: skip
"""Interval fields of a result row -> their column names."""


def markdown(results: Sequence[ResultRow]) -> str:
    """Return results as an aligned Markdown table, without columns that no recipe has."""
    shown = [field for field in COLUMNS if any(getattr(row, field) is not None for row in results)]
    head = ["recipe", "parameters", "FLOPs", "seconds", "steps", "tokens", *(COLUMNS[field] for field in shown)]
    rows = [
        [row.recipe, f"{row.parameters:,}", f"{row.flops:.3g}", f"{row.seconds:.1f}", f"{row.steps:,.0f}", f"{row.tokens:,.0f}"]
        + ["–" if getattr(row, field) is None else str(getattr(row, field)) for field in shown]
        for row in results
    ]  # fmt: skip
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    padded = [[cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))]
              for row in [head, *rows]]  # fmt: skip
    rule = [("-" * w) if k == 0 else "-" * (w - 1) + ":" for k, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [padded[0], rule, *padded[1:]])


def ranked(results: Sequence[ResultRow]) -> list[ResultRow]:
    """Return results with the best first, by the first metric that all of them have; unchanged if there is none."""
    for metric in METRICS:
        found = [interval for row in results if (interval := row.value(metric)) is not None]
        if len(found) == len(results):
            sign = -1.0 if metric.higher_is_better else 1.0
            order = sorted(range(len(results)), key=lambda i: sign * found[i].mean)
            return [results[i] for i in order]
    return list(results)


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
