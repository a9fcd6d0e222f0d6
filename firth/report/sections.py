"""Sections of a run's report: results on held-out examples, and over-optimization.

held_out.json has the classes of a classifier, or the calibration of a reward model:

{"classes": [...], "confusion": [[...], ...], "per_class": [{"class", "examples", "precision", "recall", "f1"}, ...]}
{"calibration": [[mean probability, share correct, pairs], ...]}

Over-optimization is where a true score stops rising while the reward that is trained on still does.

Gao 2022 ("Scaling laws for reward model overoptimization", section 3) measures the gain of the true score over the initial
policy as a function of d = sqrt(KL), and finds for reinforcement learning

    R(d) = d (alpha - beta log d)

which rises, has its maximum at log d = alpha / beta - 1, and falls.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from firth.io.integrity import read_record
from firth.io.json_files import check_all
from firth.report.charts import Curve, Figure, Matrix
from firth.report.page import Section, Table
from firth.types import UserError

NUMBER = (int, float)
CLASS = {"class": (str, *NUMBER), "examples": int, "precision": NUMBER, "recall": NUMBER, "f1": NUMBER}
"""Fields of a class in held_out.json."""

CURE = "delete the file: only the report uses it"


def held_out_section(path: Path) -> Section | None:
    """Return the section of the held-out examples; None for a run without such results."""
    record = read_record(path, cure=CURE) if path.exists() else {}
    if "calibration" in record:
        return _calibration_section(path, record["calibration"])
    return _class_section(path, record) if record else None


def _calibration_section(path: Path, bins: Any) -> Section | None:
    """Return how often the preferred answer has the higher reward, by the probability that the rewards give it."""
    if type(bins) is not list or not all(
        type(row) is list and len(row) == 3 and all(type(x) in NUMBER for x in row) and row[2] > 0 for row in bins
    ):
        raise UserError(f"{path}: the field 'calibration' is not a table of probability, share and number: {CURE}")
    if not bins:
        return None
    total = sum(count for *_, count in bins)
    error = sum(abs(mean - share) * count for mean, share, count in bins) / total
    spread = [(share, 1.96 * (share * (1 - share) / count) ** 0.5) for _, share, count in bins]
    figure = Figure(
        "Calibration", "probability of the answer with the higher reward", "share of pairs in which it is the preferred one",
        (
            Curve("reward model", [row[0] for row in bins], [row[1] for row in bins], points=True,
                  intervals=[(share - half, share + half) for share, half in spread]),
            Curve("calibrated", [0.5, 1.0], [0.5, 1.0], dashed=True),
        ),
    )  # fmt: skip
    rows = [(round(mean, 3), round(share, 3), count) for mean, share, count in bins]
    text = (
        f"The difference of two rewards is the log-odds that the higher one belongs to the better answer. Over {total:,} held-out pairs, "
        f"the mean distance of this probability from the share of pairs in which it does is {error:.3f} (expected calibration error)."
    )
    table = Table("Pairs by probability", ("probability", "preferred", "pairs"), rows)
    return Section("Calibration", text, figures=(figure,), tables=(table,))


def _class_section(path: Path, record: Mapping[str, Any]) -> Section:
    """Return the class report."""
    check_all([record], {"per_class": list}, f"{path}", CURE)
    check_all(record["per_class"], CLASS, f"{path}, a class", CURE)
    names, table = record.get("classes", []), record.get("confusion", [])
    square = type(names) is list and type(table) is list and len(table) == len(names)
    if not square or any(
        type(row) is not list or len(row) != len(names) or any(type(n) is not int or n < 0 for n in row)
        for row in table
    ):
        raise UserError(
            f"{path}: the field 'confusion' is not a table of counts with a row and a column for each class: {CURE}"
        )
    rows = [[row["class"], row["examples"], row["precision"], row["recall"], row["f1"]] for row in record["per_class"]]
    table = Table("Metrics per class", ("class", "examples", "precision", "recall", "F1"), rows)
    matrices = []
    if "confusion" in record:
        note = "Rows are gold classes, columns are predictions; a cell is darker the larger its share of its row."
        matrices.append(Matrix("Confusion matrix", record["classes"], record["confusion"], note))
    text = "Predictions of the exported model for the held-out examples."
    return Section("Classes", text, matrices=matrices, tables=(table,))


MIN_PHASES = 8
"""Fewest rollout phases with a true score that are enough for a verdict."""

NOISE = 2.0
"""Standard errors by which the true score must have fallen."""


@dataclass(frozen=True)
class GaoFit:
    """Gao's form, fitted by least squares.

    Args:
        alpha: Gain per unit of d at first.
        beta: How fast it is lost.
        start: The true score of the initial policy.
        r_squared: The share of the variance that it explains.
    """

    alpha: float
    beta: float
    start: float
    r_squared: float

    def __call__(self, kl: float) -> float:
        """Return the fitted true score at a divergence in nats.

        >>> round(GaoFit(alpha=1.0, beta=0.5, start=2.0, r_squared=1.0)(4.0), 4)
        3.3069
        """
        d = float(np.sqrt(kl))
        return self.start + d * (self.alpha - self.beta * float(np.log(d))) if d else self.start


def gao_fit(kl: Sequence[float], truth: Sequence[float]) -> GaoFit | None:
    """Fit Gao's form to true scores over divergences, the initial policy's score included; None for too few points."""
    x, y = np.array(kl, float), np.array(truth, float)
    far = x > 1e-4
    if far.sum() < MIN_PHASES:
        return None
    d = np.sqrt(np.where(far, x, 1.0))
    design = np.stack((np.where(far, d, 0), np.where(far, -d * np.log(d), 0), np.ones_like(d)), 1)
    [alpha, beta, start], *_ = np.linalg.lstsq(design, y, rcond=None)
    rest = y - design @ np.array([alpha, beta, start])
    variance = float(y.var())
    return GaoFit(float(alpha), float(beta), float(start), 1 - float(rest.var()) / variance if variance else 0.0)


@dataclass(frozen=True)
class Parting:
    """Where reward and true score part. The scores are means over a tenth of the phases.

    Args:
        step: The step at which the true score was best.
        kl: The divergence there, in nats per answer.
        truth: The true score there, and at the end.
        reward: The reward there, and at the end.
    """

    step: int
    kl: float
    truth: tuple[float, float]
    reward: tuple[float, float]


def parting(phases: Sequence[Mapping[str, Any]]) -> Parting | None:
    """Return where the true score was best, if it has fallen since by more than noise while the reward rose; else None.

    Args:
        phases: Rows of rollout phases with "step", "kl_per_answer", "reward" and "truth".
    """
    rows = [row for row in phases if None not in (row.get("kl_per_answer"), row.get("reward"), row.get("truth"))]
    if len(rows) < MIN_PHASES:
        return None
    width = max(2, len(rows) // 10)
    kernel = np.ones(width) / width
    truth, reward, kl = (
        np.convolve([float(row[name]) for row in rows], kernel, "valid")
        for name in ("truth", "reward", "kl_per_answer")
    )
    # Differences of neighbors have twice the variance of the noise, whatever the trend.
    noise = np.diff([float(row["truth"]) for row in rows]).std() / np.sqrt(2)
    best = int(truth.argmax())
    fallen = truth[best] - truth[-1]
    if fallen <= NOISE * noise * np.sqrt(2 / width) or reward[-1] <= reward[best]:
        return None
    step = int(rows[best + width // 2]["step"])
    return Parting(
        step, float(kl[best]), (float(truth[best]), float(truth[-1])), (float(reward[best]), float(reward[-1]))
    )
