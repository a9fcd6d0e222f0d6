"""Results of an exported model on held-out examples, from held_out.json: the classes of a classifier, or the calibration of a reward model.

{"classes": [...], "confusion": [[...], ...], "per_class": [{"class", "examples", "precision", "recall", "f1"}, ...]}
{"calibration": [[mean probability, share correct, pairs], ...]}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
