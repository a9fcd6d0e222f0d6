"""Statistics of collected preferences: progress, agreement of annotators, and scores of the runs.

A judgment of several answers is one decision for each two of them: the first is better, the second, or neither. Agreement is counted
over these decisions.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from firth.evaluate.agreement import cohen_kappa, fleiss_kappa
from firth.evaluate.ratings import Votes, rate
from firth.serve.preferences import Preferences

DRAWS = 400
"""Bootstrap samples of the intervals of scores."""

Judgment = Mapping[str, Any]
Decisions = dict[tuple[str, str], int]
"""Two answers, in alphabetical order -> -1 if the first is better, 1 if the second is, 0 for a tie."""


def statistics(preferences: Preferences, total: int) -> dict[str, Any]:
    """Return what the page shows of the judgments.

    Args:
        preferences: The judgments.
        total: The number of prompts, also of those that are not sampled yet.
    """
    judgments = preferences.judgments()
    events = preferences.journal.active.values()
    judged = Counter(one["item"] for one in judgments)
    items = list(preferences.items)
    return {
        "prompts": total,
        "sampled": len(items),
        "wanted": sum(map(preferences.wanted, items)),
        "done": sum(min(judged[id], preferences.wanted(id)) for id in items),
        "judgments": len(judgments),
        "annotators": dict(Counter(one["annotator"] for one in judgments)),
        "skipped": sum(one["event"] == "skip" for one in events),
        "corrections": sum(one["event"] == "correction" for one in events),
        "agreement": agreement(judgments),
        "runs": run_scores(judgments),
    }


def agreement(judgments: Sequence[Judgment]) -> dict[str, Any]:
    """Return the agreement of annotators on what two or more of them, or one of them twice, decided.

    Returns:
        "decisions", that were made by two or more; "share" of those by two on which they agree; "fleiss", kappa over the decisions that
        the most usual number of annotators made; "cohen", rows of first, second, decisions, kappa. Numbers are None where there are
        no decisions or kappa is not defined.
    """
    by_item: dict[str, list[tuple[str, Decisions]]] = {}
    for one in judgments:
        by_item.setdefault(one["item"], []).append((one["annotator"], decisions(one)))
    counts: list[list[int]] = []
    pairs: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for found in by_item.values():
        for (name, first), (other, second) in itertools.combinations(found, 2):
            (a, x), (b, y) = sorted(((name, first), (other, second)), key=lambda pair: pair[0])
            pairs.setdefault((a, b), []).extend((x[key], y[key]) for key in x)
        if len(found) > 1:
            counts += [
                [sum(made[key] == category for _, made in found) for category in (-1, 0, 1)] for key in found[0][1]
            ]
    usual = Counter(map(sum, counts)).most_common(1)
    same = [x == y for decided in pairs.values() for x, y in decided]
    return {
        "decisions": len(counts),
        "share": _known(float(np.mean(same))) if same else None,
        "fleiss": _known(fleiss_kappa(np.array([row for row in counts if sum(row) == usual[0][0]]))) if usual else None,
        "cohen": [
            {"first": a, "second": b, "decisions": len(decided), "kappa": _known(cohen_kappa(*zip(*decided, strict=True)))}
            for (a, b), decided in sorted(pairs.items())
        ],
    }  # fmt: skip


def decisions(judgment: Judgment) -> Decisions:
    """Return the decision of a judgment on each two answers."""
    ranked = sorted(zip(judgment["answers"], judgment["ranks"], strict=True))
    return {
        (first, second): int(np.sign(rank - other))
        for (first, rank), (second, other) in itertools.combinations(ranked, 2)
    }


def run_votes(judgments: Sequence[Judgment]) -> Votes | None:
    """Return the judgments as votes between runs: one for each two answers of two runs; None if there is no such vote."""
    found: list[tuple[str, str, float, str]] = []
    for one in judgments:
        answers = zip(one["runs"], one["ranks"], strict=True)
        written = [(run, rank) for runs, rank in answers for run in runs]
        for (run, rank), (other, other_rank) in itertools.combinations(written, 2):
            if run != other:
                outcome = 0.5 if rank == other_rank else float(rank < other_rank)
                found.append((run, other, outcome, one["annotator"]))
    if not found:
        return None
    index = {name: i for i, name in enumerate(sorted({name for vote in found for name in vote[:2]}))}
    return Votes(
        tuple(index),
        np.array([index[vote[0]] for vote in found]),
        np.array([index[vote[1]] for vote in found]),
        np.array([vote[2] for vote in found]),
        tuple(vote[3] for vote in found),
    )


def run_scores(judgments: Sequence[Judgment]) -> list[dict[str, Any]]:
    """Return the Bradley-Terry score of each run with its interval, the best first; none of fewer than two runs."""
    votes = run_votes(judgments)
    if votes is None:
        return []
    return [
        {"name": row["name"], "votes": row["votes"], "win_rate": row["win_rate"], "score": row["bradley_terry"],
         "low": row["bradley_terry_interval"][0], "high": row["bradley_terry_interval"][1]}
        for row in rate(votes, draws=DRAWS)["items"]
    ]  # fmt: skip


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value
