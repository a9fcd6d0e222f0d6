"""What a comparison came to: its table, and what may be said of the differences.

Every mean is over seeds, with a 95% interval by Student's t, cut to the values that the measure can take. Two recipes
are compared seed by seed (each seed has its own draw of labels and its own order of the text, the same for both), which
takes the luck they share out of the difference; a difference whose interval holds 0 is not called one. With few seeds
intervals are wide: that is what few seeds can say. No correction is made for how many recipes are compared, nor for the
best being picked after the fact: of twenty recipes that are equal, one will look better.

>>> scores = [Score("a", 1.0, seed, "", accuracy=0.7 + seed / 100) for seed in range(3)]
>>> scores += [Score("b", 1.0, seed, "", accuracy=0.75 + seed / 100 + seed % 2 / 100) for seed in range(3)]
>>> for sentence in differences(scores, MEASURES[0]): print(sentence)
Accuracy of the probe: b is best. It is above a by 0.053 (0.039 to 0.068).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from firth.evaluate.metrics import over_seeds


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
    """A score by its field; up: whether more is better; low, high: the least and the greatest possible value."""

    field: str
    name: str
    axis: str
    up: bool = True
    low: float = 0.0
    high: float = 1.0

    def of(self, score: Score) -> float | None:
        value: float | None = getattr(score, self.field)
        return value


MEASURES = (
    Measure("accuracy", "Accuracy of the probe", "share right, after finetuning"),
    Measure("bits_per_byte", "Held-out text", "bits per byte", up=False, high=math.inf),
    Measure("hidden", "Hidden tokens guessed", "share right, without finetuning"),
)
"""What is compared; the first that all contenders have puts them in order."""


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95% interval; low and high are None for a single seed.

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
    def clear(self) -> bool:
        """Whether 0 is outside the interval."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


@dataclass(frozen=True)
class ResultRow:
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

    def measured(self, measure: Measure) -> Interval | None:
        """What it reached by a measure."""
        found: Interval | None = getattr(self, measure.field)
        return found


def result_row(scores: Sequence[Score], recipe: str, share: float) -> ResultRow:
    """The means of a recipe at a share."""
    own = [s for s in scores if (s.recipe, s.share) == (recipe, share)]
    scratch = [s for s in scores if (s.recipe, s.share) == (recipe, 0.0)]

    def over(field: str, some: Sequence[Score], most: float = math.inf) -> Interval | None:
        return Interval.of([value for s in some if (value := getattr(s, field)) is not None], 0.0, most)

    return ResultRow(
        recipe, share, len(own), own[0].parameters, fmean(s.flops for s in own), fmean(s.seconds for s in own),
        fmean(s.steps for s in own), fmean(s.tokens for s in own), over("accuracy", own, 1.0), over("accuracy", scratch, 1.0),
        paired(own, scratch, MEASURES[0]), over("hidden", own, 1.0), over("hidden_bits", own), over("bits_per_byte", own),
    )  # fmt: skip


def paired(first: Sequence[Score], second: Sequence[Score], measure: Measure) -> Interval | None:
    """How far the first is above the second, over the seeds that both have."""
    by_seed = {s.seed: measure.of(s) for s in second}
    there = [(measure.of(s), by_seed.get(s.seed)) for s in first]
    span = measure.high - measure.low
    return Interval.of([a - b for a, b in there if a is not None and b is not None], -span, span)


def differences(scores: Sequence[Score], measure: Measure) -> list[str]:
    """Return one sentence that ranks the recipes at the whole compute; none where fewer than two are scored.

    A recipe is called best only where its interval of differences excludes 0 against every other.
    """
    share = max(s.share for s in scores)
    by_name: dict[str, list[Score]] = {}
    for score in scores:
        if score.share == share and measure.of(score) is not None:
            by_name.setdefault(score.recipe, []).append(score)
    if len(by_name) < 2:
        return []
    sign = 1.0 if measure.up else -1.0
    means = {
        name: sign * fmean(value for s in own if (value := measure.of(s)) is not None) for name, own in by_name.items()
    }
    best, *others = sorted(means, key=lambda name: -means[name])
    clear: list[str] = []
    unclear: list[str] = []
    for name in others:
        ahead = (by_name[best], by_name[name]) if measure.up else (by_name[name], by_name[best])
        gap = paired(*ahead, measure)
        if gap is not None:
            (clear if gap.clear else unclear).append(f"{name} by {gap.mean:.3f}{gap.limits('.3f')}")
    verdict = f"{best} {'has the ' + ('highest' if measure.up else 'lowest') + ' mean' if unclear else 'is best'}."
    sentences = [f"{measure.name}: {verdict}"]
    if clear:
        sentences.append(f"It is {'above' if measure.up else 'below'} {', '.join(clear)}.")
    if unclear:
        seeds = len(by_name[best])
        doubt = f"{seeds} seeds do not distinguish" if seeds > 1 else "One seed does not distinguish"
        sentences.append(f"{doubt} it from {', '.join(unclear)}.")
    return [" ".join(sentences)]


def gains(lines: Sequence[ResultRow]) -> list[str]:
    """What pretraining was worth to each, beside the same shape from scratch."""
    said = []
    for row in lines:
        if row.gain is None or row.scratch is None:
            continue
        gain = f"{row.gain.mean:+.3f}{row.gain.limits('+.3f')}"
        verdict = f"Pretraining {'helps' if row.gain.mean > 0 else 'harms'} {row.recipe}"
        if not row.gain.clear:
            verdict = f"These seeds cannot say whether pretraining helps {row.recipe}"
        said.append(f"{verdict}: {gain} over {row.scratch.mean:.3f} from scratch.")
    return said


COLUMNS: dict[str, str] = {
    "accuracy": "probe accuracy", "scratch": "from scratch", "gain": "gain", "hidden": "hidden tokens",
    "hidden_bits": "their bits", "bits_per_byte": "bits per byte",
}  # fmt: skip
"""Fields of a line that are intervals -> what the table calls them."""


def markdown(lines: Sequence[ResultRow]) -> str:
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


def ranked(lines: Sequence[ResultRow]) -> list[ResultRow]:
    """Best first, by the first measure that all of them have; in their order if there is none."""
    for measure in MEASURES:
        found = [interval for row in lines if (interval := row.measured(measure)) is not None]
        if len(found) == len(lines):
            sign = -1.0 if measure.up else 1.0
            order = sorted(range(len(lines)), key=lambda i: sign * found[i].mean)
            return [lines[i] for i in order]
    return list(lines)
