"""What a comparison came to: a table, a picture of score against compute, and what may be said of the differences.

Every mean is over seeds, with a 95% interval by Student's t. Two recipes are compared seed by seed (each seed has its own
draw of labels and its own order of the text, the same for both), which takes the luck they share out of the difference;
a difference whose interval holds 0 is not called one. With few seeds intervals are wide: that is what few seeds can say.

>>> scores = [Score("a", 1.0, seed, "", accuracy=0.7 + seed / 100) for seed in range(3)]
>>> scores += [Score("b", 1.0, seed, "", accuracy=0.75 + seed / 100 + seed % 2 / 100) for seed in range(3)]
>>> for sentence in differences(scores, MEASURES[0]): print(sentence)
Accuracy of the probe: b is best. Above a by 0.053 (0.039 to 0.068).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from firth.evaluate.metrics import over_seeds
from firth.report.figures import Curve, Figure, number
from firth.report.page import Cell, Command, Report, Section, Table
from firth.report.page import write as write_report


@dataclass(frozen=True)
class Score:
    """What one run came to; None where it was not asked. share: of the compute, 0 for the probe from random weights.

    accuracy: of the finetuned model on the records tested. hidden, hidden_bits: of the hidden tokens (`firth.evaluate.cloze`).
    bits_per_byte: of held-out text, where every token is asked from the left. key: of the recipe that was run.
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
    hidden: float | None = None
    hidden_bits: float | None = None
    bits_per_byte: float | None = None


@dataclass(frozen=True)
class Measure:
    """A score by its field; up: whether more is better."""

    field: str
    name: str
    axis: str
    up: bool = True

    def of(self, score: Score) -> float | None:
        value: float | None = getattr(score, self.field)
        return value


MEASURES = (
    Measure("accuracy", "Accuracy of the probe", "share right, after finetuning"),
    Measure("hidden", "Hidden tokens guessed", "share right, without finetuning"),
    Measure("bits_per_byte", "Held-out text", "bits per byte", up=False),
)


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and the half-width of its 95% interval: None for a single seed."""

    mean: float
    half: float | None

    @staticmethod
    def of(values: Sequence[float]) -> Interval | None:
        if not values:
            return None
        mean, half = over_seeds(values)
        return Interval(mean, None if math.isnan(half) else half)

    def __str__(self) -> str:
        return f"{self.mean:.3f}" if self.half is None else f"{self.mean:.3f} ± {self.half:.3f}"

    @property
    def clear(self) -> bool:
        """Whether 0 lies outside."""
        return self.half is not None and abs(self.mean) > self.half


@dataclass(frozen=True)
class Line:
    """A recipe at one share of the compute. gain: accuracy above the same shape from scratch, seed by seed."""

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
    hidden: Interval | None
    hidden_bits: Interval | None
    bits_per_byte: Interval | None


def line(scores: Sequence[Score], recipe: str, share: float) -> Line:
    """The means of a recipe at a share."""
    own = [s for s in scores if (s.recipe, s.share) == (recipe, share)]
    untrained = [s for s in scores if (s.recipe, s.share) == (recipe, 0.0)]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(values) / len(values)

    def measured(field: str, some: Sequence[Score]) -> Interval | None:
        return Interval.of([value for s in some if (value := getattr(s, field)) is not None])

    return Line(
        recipe, share, len(own), own[0].parameters, mean([s.flops for s in own]), mean([s.seconds for s in own]),
        mean([s.steps for s in own]), mean([s.tokens for s in own]), measured("accuracy", own),
        measured("accuracy", untrained), paired(own, untrained, MEASURES[0]), measured("hidden", own),
        measured("hidden_bits", own), measured("bits_per_byte", own),
    )  # fmt: skip


def paired(first: Sequence[Score], second: Sequence[Score], measure: Measure) -> Interval | None:
    """How far the first is above the second, over the seeds that both have."""
    by_seed = {s.seed: measure.of(s) for s in second}
    there = [(measure.of(s), by_seed.get(s.seed)) for s in first]
    return Interval.of([a - b for a, b in there if a is not None and b is not None])


def differences(scores: Sequence[Score], measure: Measure) -> list[str]:
    """At the whole compute: who is best, by how much, and of whom that cannot be said."""
    share = max(s.share for s in scores)
    whole = [s for s in scores if s.share == share]
    by_name = {s.recipe: [t for t in whole if t.recipe == s.recipe and measure.of(t) is not None] for s in whole}
    means = {name: Interval.of([v for s in own if (v := measure.of(s)) is not None]) for name, own in by_name.items()}
    known = {name: m.mean if measure.up else -m.mean for name, m in means.items() if m is not None}
    if len(known) < 2:
        return []
    best = max(known, key=lambda name: known[name])
    clear: list[str] = []
    open_: list[str] = []
    for name in sorted(known.keys() - {best}, key=lambda name: -known[name]):
        gap = paired(by_name[best], by_name[name], measure)
        assert gap is not None
        if gap.half is None:
            open_.append(f"{name} by {abs(gap.mean):.3f}")
            continue
        low, high = sorted((abs(gap.mean) - gap.half, abs(gap.mean) + gap.half))
        (clear if gap.clear else open_).append(f"{name} by {abs(gap.mean):.3f} ({low:.3f} to {high:.3f})")
    said = f"{measure.name}: {best} is best."
    if clear:
        said += f" {'Above' if measure.up else 'Below'} {', '.join(clear)}."
    if open_ and len(by_name[best]) < 2:
        said += f" One seed cannot tell it from {', '.join(open_)}."
    elif open_:
        said += f" Not told apart from {', '.join(open_)}."
    return [said]


def gains(lines: Sequence[Line]) -> list[str]:
    """What pretraining was worth to each, beside the same shape from scratch."""
    said = []
    for row in lines:
        if row.gain is None or row.scratch is None:
            continue
        verdict = "helps" if row.gain.mean > 0 else "harms"
        if not row.gain.clear:
            verdict = "makes no difference that these seeds can show:"
        said.append(f"Pretraining {verdict} {row.recipe}: {row.gain.mean:+.3f}" + (
            f" ({row.gain.mean - row.gain.half:+.3f} to {row.gain.mean + row.gain.half:+.3f})" if row.gain.half is not None else ""
        ) + f" over {row.scratch.mean:.3f} from scratch.")  # fmt: skip
    return said


COLUMNS: dict[str, str] = {
    "accuracy": "probe accuracy", "scratch": "from scratch", "gain": "gain", "hidden": "hidden tokens",
    "hidden_bits": "their bits", "bits_per_byte": "bits per byte",
}  # fmt: skip
"""Fields of a line that are intervals -> what the table calls them."""


def markdown(lines: Sequence[Line]) -> str:
    """A table that reads as text, too; columns that no recipe has are left out."""
    shown = [field for field in COLUMNS if any(getattr(row, field) is not None for row in lines)]
    head = ["recipe", "parameters", "FLOPs", "seconds", "steps", "tokens", *(COLUMNS[field] for field in shown)]
    rows = [
        [row.recipe, f"{row.parameters:,}", f"{row.flops:.3g}", f"{row.seconds:.1f}", f"{row.steps:,.0f}", f"{row.tokens:,.0f}"]
        + ["–" if getattr(row, field) is None else str(getattr(row, field)) for field in shown]
        for row in lines
    ]  # fmt: skip
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    padded = [[cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))]
              for row in [head, *rows]]  # fmt: skip
    rule = [("-" * w) if k == 0 else "-" * (w - 1) + ":" for k, w in enumerate(widths)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [padded[0], rule, *padded[1:]])


def ranked(lines: Sequence[Line]) -> list[Line]:
    """Best first, by the first measure that any of them has."""
    for measure in MEASURES:
        if any(getattr(row, measure.field) is not None for row in lines):

            def height(row: Line, measure: Measure = measure) -> float:
                found: Interval | None = getattr(row, measure.field)
                return -math.inf if found is None else found.mean if measure.up else -found.mean

            return sorted(lines, key=height, reverse=True)
    return list(lines)


def figure(lines: Sequence[Line], measure: Measure, seconds: bool) -> Figure | None:
    """Score against compute; the probe's curves begin where nothing was learnt."""
    curves = []
    for name in dict.fromkeys(row.recipe for row in lines):
        own = sorted((row for row in lines if row.recipe == name), key=lambda row: row.share)
        points = [
            (row.seconds if seconds else row.flops, found) for row in own if (found := getattr(row, measure.field))
        ]
        if points and measure.field == "accuracy" and own[0].scratch is not None:
            points = [(0.0, own[0].scratch), *points]
        if points:
            x, y = zip(*points, strict=True)
            spread = [math.nan if i.half is None else i.half for i in y]
            curves.append(Curve(name, x, [i.mean for i in y], points=True, spread=spread))
    if not curves:
        return None
    axis = "seconds of training" if seconds else "FLOPs of training"
    note = "Each point is a run of its own length; upright lines are 95% intervals over seeds."
    return Figure(f"{measure.name} against compute", axis, measure.axis, tuple(curves), note=note)


def conclude(scores: Sequence[Score], order: Sequence[str], facts: Mapping[str, str], out: Path) -> str:
    """Write table.md, results.json and report.html; return the table and the words for reading."""
    shares = sorted({s.share for s in scores} - {0.0})
    lines = [line(scores, name, share) for share in shares for name in order]
    whole = ranked([row for row in lines if row.share == shares[-1]])
    words = [said for measure in MEASURES for said in differences(scores, measure)] + gains(whole)
    table = markdown(whole)
    results = {
        "facts": dict(facts), "scores": [asdict(s) for s in scores], "table": [asdict(row) for row in whole],
        "lines": [asdict(row) for row in lines], "words": words,
    }  # fmt: skip
    _write(out / "results.json", json.dumps(results, indent=1))
    told = "\n".join(f"{name}: {value}" for name, value in facts.items())
    _write(out / "table.md", table + "\n\n" + "\n\n".join([*words, told.replace("\n", "  \n")]) + "\n")
    write_report(report(lines, whole, words, facts), out / "report.html")
    return "\n".join([table, "", *words, "", f"{out / 'table.md'}, results.json; open {out / 'report.html'}"])


def report(lines: Sequence[Line], whole: Sequence[Line], words: Sequence[str], facts: Mapping[str, str]) -> Report:
    """The page: words, pictures, numbers."""
    seconds = facts["compute"].endswith("training")
    figures = [drawn for measure in MEASURES if (drawn := figure(lines, measure, seconds)) is not None]
    names = [row.recipe for row in whole]
    every = ranked(lines) if len({row.share for row in lines}) == 1 else lines
    best = {COLUMNS["accuracy"]: "max", COLUMNS["hidden"]: "max", COLUMNS["bits_per_byte"]: "min"}
    head, rows = cells(whole)
    _, all_rows = cells(every)
    section = Section(
        "Score against compute",
        "Every run has a seed, an order of the text and a fall of the rate of its own; all read the same text with one "
        "tokenizer. The probe finetunes the whole model on few labels; hidden tokens are asked of each model in its "
        "objective's own way, with what that lets it see.",
        figures=figures,
        tables=(
            Table("With all of the compute", head, rows, "± is half of a 95% interval over seeds.",
                  {name: which for name, which in best.items() if name in head}),
            Table("With each share of it", head, all_rows),
        ) if len(every) > len(whole) else (Table("With all of the compute", head, rows, "± is half of a 95% interval over seeds.",
                  {name: which for name, which in best.items() if name in head}),),
    )  # fmt: skip
    return Report(
        f"{', '.join(names[:-1])} and {names[-1]} at equal compute" if len(names) > 1 else names[0],
        sections=(section,),
        text="\n\n".join(words),
        facts=dict(facts),
        commands=(
            Command("What each of the runs did", "firth evaluate RUN_DIRECTORY"),
            Command("Narrower intervals: the same command with more seeds; what is there is not done again", "firth compare ... --seeds 5"),
        ),
    )  # fmt: skip


def cells(lines: Sequence[Line]) -> tuple[list[str], list[list[Cell]]]:
    """A report's table: every interval as two columns."""
    shown = [field for field in COLUMNS if any(getattr(row, field) is not None for row in lines)]
    head = ["recipe", "share", "parameters", "FLOPs", "seconds", *(name for f in shown for name in (COLUMNS[f], "±"))]
    rows: list[list[Cell]] = []
    for row in lines:
        found: list[Interval | None] = [getattr(row, field) for field in shown]
        pairs: list[Cell] = [v for i in found for v in ((None, None) if i is None else (i.mean, i.half))]
        rows.append([row.recipe, f"{row.share:.0%}", row.parameters, number(row.flops, 3), row.seconds, *pairs])
    return head, rows


def _write(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, "utf-8")
    os.replace(partial, path)
